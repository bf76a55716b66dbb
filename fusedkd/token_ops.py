"""The work of :mod:`fusedkd.token_rows`, and the custom ops that stand for it when a graph is
traced."""

from __future__ import annotations

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
    return torch.ops.fusedkd.token_statistics(*inputs, *_packed(spec, inputs), keep)


def gradients(
    inputs: TokenInputs, spec: TokenSpec, wanted: Wanted, known: Tensor, factors: Factors
) -> list[Tensor]:
    """As :func:`fusedkd.token_rows.gradients`."""
    if not stand_in(*inputs, known, *factors):
        return token_rows.gradients(inputs, spec, wanted, known, factors)
    return torch.ops.fusedkd.token_gradients(
        *inputs, *_packed(spec, inputs), list(wanted), known, *factors
    )


def judged(inputs: TokenInputs, spec: TokenSpec, wanted: Wanted, judge: Judged) -> list[Tensor]:
    """As :func:`fusedkd.token_rows.judged`."""
    if not stand_in(*inputs, *judge[:4]):
        return token_rows.judged(inputs, spec, wanted, judge)
    numbers, *rest = _packed(spec, inputs)
    bounds = [numbers.new_ones(()) * x for x in judge.clip or ()]
    numbers = torch.stack([*numbers.unbind(), *bounds])
    return torch.ops.fusedkd.token_judged(
        *inputs, numbers, *rest, list(wanted), *judge[:4], judge.loss_type
    )


@torch.library.custom_op("fusedkd::token_statistics", mutates_args=())
def _statistics(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: Tensor,
    counts: Tensor,
    ids: Tensor | None,
    numbers: Tensor,
    vocab_size: int,
    entropy: bool,
    backend: str | None,
    chunk_bytes: int | None,
    autocast: torch.dtype | None,
    keep: int,
) -> list[Tensor]:
    spec = _unpacked(numbers, vocab_size, entropy, backend, chunk_bytes, autocast)
    inputs = TokenInputs(student, weight, bias, tokens, counts, ids)
    return token_rows.statistics(inputs, spec, keep)


@_statistics.register_fake
def _(student: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    tokens, keep = rest[0], rest[-1]
    dtype = stored_dtype(student, head=True)
    kept = [student.new_empty(student.shape, dtype=dtype) for _ in range(keep)]
    return [_known(student, tokens), *kept]


@torch.library.custom_op("fusedkd::token_gradients", mutates_args=())
def _gradients(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: Tensor,
    counts: Tensor,
    ids: Tensor | None,
    numbers: Tensor,
    vocab_size: int,
    entropy: bool,
    backend: str | None,
    chunk_bytes: int | None,
    autocast: torch.dtype | None,
    wanted: list[bool],
    known: Tensor,
    of_tokens: Tensor,
    of_entropy: Tensor | None,
) -> list[Tensor]:
    spec = _unpacked(numbers, vocab_size, entropy, backend, chunk_bytes, autocast)
    inputs = TokenInputs(student, weight, bias, tokens, counts, ids)
    factors = Factors(of_tokens, of_entropy)
    return token_rows.gradients(inputs, spec, Wanted(*wanted), known, factors)


@_gradients.register_fake
def _(student: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    wanted = next(x for x in rest if isinstance(x, list))
    return _made(student, weight, bias, wanted)


@torch.library.custom_op("fusedkd::token_judged", mutates_args=())
def _judged(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: Tensor,
    counts: Tensor,
    ids: Tensor | None,
    numbers: Tensor,
    vocab_size: int,
    entropy: bool,
    backend: str | None,
    chunk_bytes: int | None,
    autocast: torch.dtype | None,
    wanted: list[bool],
    scale: Tensor,
    teacher: Tensor | None,
    old: Tensor | None,
    advantages: Tensor | None,
    loss_type: str,
) -> list[Tensor]:
    spec = _unpacked(numbers[:3], vocab_size, entropy, backend, chunk_bytes, autocast)
    low, high = numbers[3:].tolist() or (None, None)
    clip = None if low is None or high is None else (low, high)
    judge = Judged(scale, teacher, old, advantages, loss_type, clip)
    inputs = TokenInputs(student, weight, bias, tokens, counts, ids)
    return token_rows.judged(inputs, spec, Wanted(*wanted), judge)


@_judged.register_fake
def _(student: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    tokens, wanted = rest[0], next(x for x in rest if isinstance(x, list))
    return [_known(student, tokens), *_made(student, weight, bias, wanted)]


def _known(student: Tensor, tokens: Tensor) -> Tensor:
    """Statistics without memory."""
    shape = (tokens.shape[0], len(FIELDS) + tokens.shape[1])
    return student.new_empty(shape, dtype=torch.float64)


def _made(
    student: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: list[bool]
) -> list[Tensor]:
    """Gradients without memory."""
    return [
        x.new_empty(x.shape, dtype=stored_dtype(x, weight is not None))
        for x, want in zip((student, weight, bias), wanted, strict=False)
        if want and x is not None
    ]


def _packed(spec: TokenSpec, inputs: TokenInputs) -> tuple[Any, ...]:
    """A spec as arguments of an op; its numbers in a tensor, for dynamo would burn them into the
    graph. See :mod:`fusedkd.tracing`."""
    one = inputs.student.new_ones((), dtype=torch.float64, device="cpu")
    numbers = torch.stack([one * x for x in (spec.temperature, *spec.how)])
    return (
        *(numbers, spec.vocab_size, spec.entropy),
        *(spec.backend, spec.chunk_bytes, spec.autocast),
    )


def _unpacked(
    numbers: Tensor,
    vocab_size: int,
    entropy: bool,
    backend: str | None,
    chunk_bytes: int | None,
    autocast: torch.dtype | None,
) -> TokenSpec:
    temperature, scale, softcap = numbers.tolist()
    how = Transform(scale, softcap)
    return TokenSpec(vocab_size, temperature, how, entropy, backend, chunk_bytes, autocast=autocast)
