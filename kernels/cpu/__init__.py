"""The `cpu` backend: one fused pass per row in C++, on torch's own threads. Contract:
:mod:`fusedkd.kernels`.

The extension is optional and loaded on first use. It carries AVX-512, AVX2 and plain builds of the
same code and picks one at run time; ``FUSEDKD_CPU_ISA`` (``avx512``, ``avx2``, ``base``) overrules
that.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import row_rules
from fusedkd.distributions.sparse import SparseRows
from fusedkd.divergences import Divergence, recorded_tape
from fusedkd.kernels import Comparison, RowCall, Rows, Statistics
from fusedkd.kernels.tokens import FIELDS, Factors, TokenCall, Top, put_tokens, row_factors
from fusedkd.spec import LossSpec

from .products import head_dtypes, mm_

__all__ = [
    "block_rows",
    "compare",
    "empty",
    "finish",
    "head_dtypes",
    "instruction_set",
    "merge",
    "mm_",
    "observe",
    "reduced",
    "rows",
    "scale_",
    "token_gradient",
    "token_statistics",
    "top",
    "unavailable",
]

CPU = torch.device("cpu")
LARGE_BYTES = 8 << 20  # a few huge pages of 2 MB: less is reused by the allocator, or soon touched

# Of rows in pieces, both sides in bf16; by whether d D / d log q is kept from one verb to the next,
# which takes as much again. Every block costs Python and a gather, and that the block before is
# still in the last cache gains nothing: JSD of 256 rows in 16, 32 and 64 MiB takes a process 27, 24
# and 22 ms of its time (half of 151,936 columns, busy AMD Zen 5, 2026-11-28).
BLOCK_BYTES = {False: 128 << 20, True: 64 << 20}
LONGEST_TILE, PARAMETERS = 4096, 8  # of kernel.h

SISTER_FILES = "fusedkd/divergences.py, kernels/triton/pointwise.py and kernels/cpu/pointwise.h"


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    libraries = sorted(Path(__file__).parent.glob("_native*.so"))
    if not libraries:
        return "the C++ extension was not built (no compiler, or the build failed)"
    try:
        torch.ops.load_library(str(libraries[0]))
        extension = torch.ops.fusedkd_cpu
        expected = len(Numbers._fields) + 2 * PARAMETERS
        if not hasattr(extension, "numbers") or extension.numbers() != expected:
            return "the C++ extension was built for another version of fusedkd: build it again"
        extension.instruction_set()
        _register_fakes()
    except (OSError, RuntimeError) as error:
        return f"the C++ extension does not load: {str(error).splitlines()[0]}"
    return None


def _register_fakes() -> None:
    """For tensors without memory: what the operators write to is all that they give."""
    for name in ("rows", "scale_", "matmul", "token_statistics", "token_gradient", "top"):
        torch.library.register_fake(f"fusedkd_cpu::{name}", lambda *_: None)


@functools.cache
def instruction_set() -> str:
    """Which build of the kernels runs: "avx512", "avx2" or "base"."""
    return str(_ops().instruction_set())


@functools.cache
def _ops() -> torch._ops._OpNamespace:
    if reason := unavailable():
        raise RuntimeError(f"fusedkd's cpu backend cannot run here: {reason}.")
    return torch.ops.fusedkd_cpu


def _listed(divergence: Divergence) -> tuple[str, tuple[float, ...]]:
    """What the extension calls it, and its parameters there."""
    if divergence.tape is None or divergence.key is None:
        _check(divergence.name, divergence.key)
        return divergence.name, divergence.params
    name, address = _own(divergence.key)
    if address is None:
        return name, divergence.params
    blank = (0.0,) * (PARAMETERS - 1 - len(divergence.params))
    return name, (*divergence.params, *blank, float(address))


@functools.cache
def _own(key: str) -> tuple[str, int | None]:
    """One of somebody's own: compiled where it is not yet, or else the address of its tape."""
    from . import emit

    tape = recorded_tape(key)
    assert tape is not None
    if emit.compiler() is not None:
        return emit.load(tape, instruction_set(), _ops().register_set), None
    warnings.warn(
        "fusedkd: there is no C++ compiler (set CXX, or install g++ or clang), so a divergence of "
        "your own runs operation by operation, several times slower.",
        RuntimeWarning,
        stacklevel=9,
    )
    _TAPES.append(emit.assemble(tape))  # its memory stays
    return "tape", ctypes.addressof(_TAPES[-1])


@functools.cache
def _rule(key: str) -> int:
    """The address of a row rule's tape."""
    from . import emit

    _TAPES.append(emit.assemble(row_rules.recorded_tape(key)))
    return ctypes.addressof(_TAPES[-1])


_TAPES: list[Any] = []


@functools.cache
def _check(divergence: str, key: str | None) -> None:
    """Raise unless the extension has the divergence; once, for asking it costs 2 us."""
    if key is None or not _ops().knows(divergence):
        raise NotImplementedError(
            f"divergence={divergence!r} has no function in kernels/cpu/pointwise.h. Each is "
            "one function of "
            f"the same name in each of {SISTER_FILES}; "
            "one of your own, @divergences.custom makes."
        )


class Numbers(NamedTuple):
    """What a row is computed with, in the order of kernel.h; a row rule's parameters follow, and
    the divergence's."""

    temperature: float
    teacher_temperature: float
    kd_scale: float
    ce_weight: float
    label_smoothing: float
    z_loss_weight: float
    student_scale: float
    student_softcap: float
    teacher_scale: float
    teacher_softcap: float
    rounding: float  # SparseRows.rounding
    rule: float  # the address of a row rule's tape; its parameters are behind it


def reduced(spec: LossSpec) -> Callable[..., tuple[Tensor, Tensor | None] | None]:
    operator, mean = _ops().reduced.default, spec.reduction == "mean"
    settings = *_settings(spec), spec.ignore_index, mean

    def compute(
        student: Tensor, teacher: Tensor, labels: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        wide = student.dtype is torch.float64 or teacher.dtype is torch.float64
        loss = student.new_empty((), dtype=torch.float64 if wide else torch.float32)
        grad = empty(student.shape, dtype=student.dtype, device=CPU) if gradient else None
        done = operator(student, teacher, labels, *settings, loss, grad)
        return (loss, grad) if done else None

    return compute


def rows(call: RowCall) -> Rows:
    results = call.results()
    _ops().rows.default(*_arguments(call), results.loss, call.grad, results.metrics)
    return results


# Of a sparse teacher, as kernel.h numbers them; with all others p is 0 outside the ids.
TAILS = {"bucket": 1, "generalized": 2, "conditional": 3}

# The verbs on pieces, in the order of kernel.h.
OBSERVE, COMPARE, FINISH = 1, 2, 3


def observe(call: RowCall) -> Tensor:
    shape = (call.row_scale.numel(), len(Statistics._fields))
    statistics = call.row_scale.new_empty(shape, dtype=torch.float64)
    _piece(OBSERVE, call, statistics)
    return statistics


def merge(pieces: Sequence[Tensor]) -> Tensor:
    merged = torch.empty_like(pieces[0])
    _ops().merge.default(list(pieces), merged)
    return merged


def compare(call: RowCall, statistics: Tensor) -> Comparison | None:
    spec, part = call.spec, call.part
    sparse = isinstance(call.teacher, SparseRows)
    entrywise = _ops().keeps(_listed(spec.divergence)[0])
    if not (spec.kd_scale or call.metrics) or not (sparse or entrywise):
        return None
    assert part is not None
    n, kept = call.row_scale.numel(), None
    if call.grad is not None and spec.kd_scale and _keeps(call):
        wide = part.exact or call.row_scale.dtype == torch.float64
        lines = -(-(part.columns + LONGEST_TILE) // 16)
        size = lines * 16 * (8 if wide else 4)
        kept = empty((n, size), dtype=torch.uint8, device=call.student.device)
    sums = call.row_scale.new_empty((n, 2), dtype=torch.float64)
    _piece(COMPARE, call, statistics, sums, kept)
    return Comparison(sums, kept)


def finish(call: RowCall, statistics: Tensor, comparison: Comparison | None) -> tuple[Rows, Tensor]:
    results = call.results()
    again = torch.zeros(call.row_scale.numel(), dtype=torch.bool)
    _piece(FINISH, call, statistics, *(comparison or (None, None)), *results, again)
    return results, again


def _piece(verb: int, call: RowCall, statistics: Tensor, *results: Tensor | None) -> None:
    assert call.part is not None
    results += (None,) * (5 - len(results))
    _ops().piece.default(
        verb, *_arguments(call), list(call.part), call.metrics, call.grad, statistics, *results
    )


def block_rows(call: RowCall, widest: int, budget: int) -> int:
    # by nothing that the ranks may differ in
    return max(1, BLOCK_BYTES[_keeps(call)] // (4 * widest))


def _keeps(call: RowCall) -> bool:
    """Whether d D / d log q, entry by entry, goes from one verb to the next."""
    teacher = call.teacher
    everywhere = not isinstance(teacher, SparseRows) or teacher.tail not in TAILS
    return everywhere and _ops().keeps(_listed(call.spec.divergence)[0])


def _arguments(call: RowCall) -> tuple[Any, ...]:
    """What all operators on rows begin with."""
    spec, teacher = call.spec, call.teacher
    if isinstance(teacher, SparseRows):
        side, indices, rounding = teacher.log_probs, teacher.indices, teacher.rounding
        tail = TAILS.get(teacher.tail, 0)
    else:
        side, indices, rounding, tail = call.teacher_logits, None, 0.0, 0
    head = call.student, side, indices, tail, call.labels, call.row_scale
    return *head, *_settings(spec, rounding), spec.vocab_size


def _settings(spec: LossSpec, rounding: float = 0.0) -> tuple[str, tuple[float, ...]]:
    """The divergence's name in the extension, and every number."""
    numbers = Numbers(
        temperature=spec.temperature,
        teacher_temperature=spec.teacher_temperature,
        kd_scale=spec.kd_scale,
        ce_weight=spec.ce_weight,
        label_smoothing=spec.label_smoothing,
        z_loss_weight=spec.z_loss_weight,
        student_scale=spec.student_transform.scale,
        student_softcap=spec.student_transform.softcap,
        teacher_scale=spec.teacher_transform.scale,
        teacher_softcap=spec.teacher_transform.softcap,
        rounding=rounding,
        rule=0.0,
    )
    name, parameters = _listed(spec.divergence)
    of_rule = NO_RULE
    if spec.row_rule is not None and spec.kd_scale:
        numbers = numbers._replace(rule=float(_rule(spec.row_rule.key)))
        of_rule = (*spec.row_rule.params, *NO_RULE)[:PARAMETERS]
    return name, (*numbers, *of_rule, *parameters)


NO_RULE = (0.0,) * PARAMETERS


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Large memory that the last call gave back is used again."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    made: Tensor = _ops().spare.default(shape, dtype, size)
    return made


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    _ops().scale_.default(grad if out is None else out, grad, factor)


def token_statistics(call: TokenCall) -> Tensor:
    n, k = call.tokens.shape
    statistics = call.logits.new_empty((n, len(FIELDS) + k), dtype=torch.float64)
    _ops().token_statistics.default(*_of_tokens(call), call.entropy, statistics)
    return statistics


def token_gradient(call: TokenCall, statistics: Tensor, factors: Factors, out: Tensor) -> None:
    constant, linear = row_factors(call, factors)
    _ops().token_gradient.default(*_of_tokens(call), statistics, constant, linear, out)
    put_tokens(call, statistics, factors, out)


def top(call: TokenCall, k: int) -> Top:
    n, entries = call.tokens.shape
    values = call.logits.new_empty((n, k), dtype=torch.float64)
    found = Top(
        values,
        torch.empty_like(values, dtype=torch.int64),
        values.new_empty((n, len(FIELDS) + entries)),
    )
    _ops().top.default(*_of_tokens(call), found.statistics, found.values, found.ids)
    return found


def _of_tokens(call: TokenCall) -> tuple[Any, ...]:
    numbers = [call.temperature, *call.how]
    return call.logits, call.counts, call.tokens, numbers, [call.part.offset, call.part.columns]
