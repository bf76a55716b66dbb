"""The work of :mod:`fusedkd.token_rows`, and the custom ops that stand for it when a graph is
traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkd import token_rows
from fusedkd.gradients import stored_dtype
from fusedkd.inputs import Wanted
from fusedkd.kernels.tokens import FIELDS, Factors
from fusedkd.modes import stand_in
from fusedkd.spec import Transform
from fusedkd.token_rows import Judged, TokenInputs, TokenSpec


def statistics(inputs: TokenInputs, spec: TokenSpec, keep: int) -> list[Tensor]:
    """As :func:`fusedkd.token_rows.statistics`."""
    if not stand_in(*inputs):
        return token_rows.statistics(inputs, spec, keep)
    return torch.ops.fusedkd.token_statistics(*_packed(spec, inputs), keep)


def gradients(
    inputs: TokenInputs, spec: TokenSpec, wanted: Wanted, known: Tensor, factors: Factors
) -> list[Tensor]:
    """As :func:`fusedkd.token_rows.gradients`."""
    if not stand_in(*inputs, known, *factors):
        return token_rows.gradients(inputs, spec, wanted, known, factors)
    packed = _packed(spec, inputs)
    return torch.ops.fusedkd.token_gradients(*packed, list(wanted), known, *factors)


def judged(inputs: TokenInputs, spec: TokenSpec, wanted: Wanted, judge: Judged) -> list[Tensor]:
    """As :func:`fusedkd.token_rows.judged`."""
    if not stand_in(*inputs, *judge[:4]):
        return token_rows.judged(inputs, spec, wanted, judge)
    packed = _packed(spec, inputs, judge.clip or ())
    return torch.ops.fusedkd.token_judged(*packed, list(wanted), *judge[:4], judge.loss_type)


# What the ops of all three begin with, as torch's schemas have it: the inputs, and a spec.
CALL = (
    "Tensor student, Tensor? weight, Tensor? bias, Tensor tokens, Tensor counts, Tensor? ids, "
    "Tensor numbers, SymInt vocab_size, bool entropy, str? backend, SymInt? chunk_bytes, "
    "ScalarType? autocast"
)
INPUTS, LENGTH = len(TokenInputs._fields), CALL.count(",") + 1
JUDGE = "Tensor scale, Tensor? teacher, Tensor? old, Tensor? advantages, str loss_type"


def _op(name: str, more: str) -> Callable[[Callable[..., list[Tensor]]], Any]:
    schema = f"({CALL}, {more}) -> Tensor[]"
    return torch.library.custom_op(f"fusedkd::{name}", mutates_args=(), schema=schema)


@_op("token_statistics", "SymInt keep")
def _statistics(*call: Any) -> list[Tensor]:
    inputs, spec, _, (keep,) = _unpacked(call)
    return token_rows.statistics(inputs, spec, keep)


@_statistics.register_fake
def _(*call: Any) -> list[Tensor]:
    student, keep = call[0], call[-1]
    dtype = stored_dtype(student, head=True)
    kept = [student.new_empty(student.shape, dtype=dtype) for _ in range(keep)]
    return [_known(call), *kept]


@_op("token_gradients", "bool[] wanted, Tensor known, Tensor of_tokens, Tensor? of_entropy")
def _gradients(*call: Any) -> list[Tensor]:
    inputs, spec, _, (wanted, known, *factors) = _unpacked(call)
    return token_rows.gradients(inputs, spec, Wanted(*wanted), known, Factors(*factors))


@_gradients.register_fake
def _(*call: Any) -> list[Tensor]:
    return _made(call)


@_op("token_judged", f"bool[] wanted, {JUDGE}")
def _judged(*call: Any) -> list[Tensor]:
    inputs, spec, clip, (wanted, *judge) = _unpacked(call)
    return token_rows.judged(inputs, spec, Wanted(*wanted), Judged._make([*judge, clip or None]))


@_judged.register_fake
def _(*call: Any) -> list[Tensor]:
    return [_known(call), *_made(call)]


def _known(call: Sequence[Any]) -> Tensor:
    """Statistics without memory."""
    tensors = TokenInputs(*call[:INPUTS])
    shape = (tensors.tokens.shape[0], len(FIELDS) + tensors.tokens.shape[1])
    return tensors.student.new_empty(shape, dtype=torch.float64)


def _made(call: Sequence[Any]) -> list[Tensor]:
    """Gradients without memory."""
    student, weight, bias, wanted = *call[:3], call[LENGTH]
    return [
        x.new_empty(x.shape, dtype=stored_dtype(x, weight is not None))
        for x, want in zip((student, weight, bias), wanted, strict=False)
        if want and x is not None
    ]


def _packed(spec: TokenSpec, inputs: TokenInputs, bounds: Sequence[float] = ()) -> tuple[Any, ...]:
    """The arguments of CALL. Numbers are in a tensor, for dynamo would burn them into the graph,
    see :mod:`fusedkd.tracing`."""
    one = inputs.student.new_ones((), dtype=torch.float64, device="cpu")
    numbers = torch.stack([one * x for x in (spec.temperature, *spec.how, *bounds)])
    named = (spec.vocab_size, spec.entropy, spec.backend, spec.chunk_bytes, spec.autocast)
    return *inputs, numbers, *named


def _unpacked(
    call: Sequence[Any],
) -> tuple[TokenInputs, TokenSpec, Any, Sequence[Any]]:
    """The inputs, the spec, the ratio's bounds, if any, and what an op is given besides."""
    numbers, vocab_size, entropy, backend, chunk_bytes, autocast = call[INPUTS:LENGTH]
    temperature, scale, softcap, *bounds = numbers.tolist()
    how = Transform(scale, softcap)
    spec = TokenSpec(vocab_size, temperature, how, entropy, backend, chunk_bytes, autocast=autocast)
    return TokenInputs(*call[:INPUTS]), spec, tuple(bounds), call[LENGTH:]
