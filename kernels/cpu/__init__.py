"""The `cpu` backend: one fused pass per row in C++, on torch's own threads. Contract:
:mod:`fusedkd.kernels`.

The extension is optional and loaded on first use. It carries AVX-512, AVX2 and plain builds of the
same code and picks one at run time; ``FUSEDKD_CPU_ISA`` (``avx512``, ``avx2``, ``base``) overrules
that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedkd.distributions.sparse import SparseRows
from fusedkd.spec import METRIC_COLUMNS, LossSpec

from .products import head_dtypes, mm_

__all__ = [
    "empty",
    "head_dtypes",
    "instruction_set",
    "mm_",
    "rows",
    "scale_",
    "sparse_rows",
    "unavailable",
]

LARGE_BYTES = 8 << 20  # a few huge pages of 2 MB: less is reused by the allocator, or soon touched

SISTER_FILES = "fusedkd/divergences.py, kernels/triton/pointwise.py and kernels/cpu/pointwise.h"


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    libraries = sorted(Path(__file__).parent.glob("_native*.so"))
    if not libraries:
        return "the C++ extension was not built (no compiler, or the build failed)"
    try:
        torch.ops.load_library(str(libraries[0]))
        torch.ops.fusedkd_cpu.instruction_set()
        _register_fakes()
    except (OSError, RuntimeError) as error:
        return f"the C++ extension does not load: {str(error).splitlines()[0]}"
    return None


def _register_fakes() -> None:
    """For tensors without memory: what the operators write to is all that they give."""
    for name in ("rows", "sparse_rows", "scale_", "matmul"):
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


@functools.cache
def _check(divergence: str) -> None:
    """Raise unless the extension has the divergence; once, for asking it costs 2 us."""
    if not _ops().knows(divergence):
        raise NotImplementedError(
            f"divergence={divergence!r} has no function in kernels/cpu/pointwise.h. Each is "
            "one function of "
            f"the same name in each of {SISTER_FILES}."
        )


def rows(
    student: Tensor,  # (B, T, C)
    teacher: Tensor,  # (B, T, C')
    labels: Tensor | None,  # (B T,)
    row_scale: Tensor,  # (B T,)
    spec: LossSpec,
    grad: Tensor | None,  # (B, T, C)
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`."""
    _check(spec.divergence.name)
    t = spec.teacher_transform
    ends, results = _arguments(labels, row_scale, spec, (t.scale, t.softcap), grad, metrics)
    _ops().rows.default(student, teacher, *ends)
    return results


def sparse_rows(
    student: Tensor,  # (B, T, C)
    teacher: SparseRows,
    labels: Tensor | None,  # (B T,)
    row_scale: Tensor,  # (B T,)
    spec: LossSpec,
    grad: Tensor | None,  # (B, T, C)
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`."""
    _check(spec.divergence.name)
    own = (float(teacher.tail == "bucket"), teacher.rounding)
    ends, results = _arguments(labels, row_scale, spec, own, grad, metrics)
    _ops().sparse_rows.default(student, teacher.indices, teacher.log_probs, *ends)
    return results


def _arguments(
    labels: Tensor | None,
    row_scale: Tensor,
    spec: LossSpec,
    own: tuple[float, float],
    grad: Tensor | None,
    metrics: bool,
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor | None]]:
    """What follows student and teacher in both operators, and the results among it."""
    loss = torch.empty_like(row_scale)
    metric_rows = row_scale.new_empty(row_scale.numel(), len(METRIC_COLUMNS)) if metrics else None
    s = spec.student_transform
    numbers = [spec.temperature, spec.teacher_temperature, spec.kd_scale, spec.ce_weight]
    numbers += [spec.label_smoothing, s.scale, s.softcap, *own, *spec.divergence.params]
    vocabulary = spec.vocab_size
    ends = labels, row_scale, spec.divergence.name, numbers, vocabulary, loss, grad, metric_rows
    return ends, (loss, metric_rows)


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """See :mod:`fusedkd.kernels`. Large memory that the last call gave back is used again."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    made: Tensor = _ops().spare.default(shape, dtype, size)
    return made


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """See :mod:`fusedkd.kernels`."""
    _ops().scale_.default(grad if out is None else out, grad, factor)
