"""The Triton backend. Importing it does not import triton; the first call does."""

from __future__ import annotations

import torch
from torch import Tensor, empty

from fusedkd.distributions.sparse import SparseRows
from fusedkd.spec import LossSpec

__all__ = ["empty", "head_dtypes", "mm_", "rows", "scale_", "sparse_rows", "unavailable"]


def unavailable() -> str | None:
    """See :mod:`fusedkd.kernels`."""
    try:
        from . import ops
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux, `pip install 'fusedkd[triton]'`"
    return ops.unavailable()


def rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_scale: Tensor,
    spec: LossSpec,
    grad: Tensor | None,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`."""
    from . import ops

    return ops.rows(student, teacher, labels, row_scale, spec, grad, metrics)


def sparse_rows(
    student: Tensor,
    teacher: SparseRows,
    labels: Tensor | None,
    row_scale: Tensor,
    spec: LossSpec,
    grad: Tensor | None,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`."""
    from . import sparse_ops

    return sparse_ops.sparse_rows(student, teacher, labels, row_scale, spec, grad, metrics)


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """See :mod:`fusedkd.kernels`."""
    from . import ops

    ops.scale_(grad, factor, out)


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """See :mod:`fusedkd.kernels`."""
    from . import ops

    return ops.head_dtypes(dtype)


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """See :mod:`fusedkd.kernels`."""
    from . import ops

    ops.mm_(out, a, b, accumulate)
