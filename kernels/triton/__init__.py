"""The Triton backend. Importing it does not import triton; the first call does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, empty

from fusedkd.distributions.sparse import SparseRows
from fusedkd.kernels import RowCall, Rows
from fusedkd.kernels.pieces import block_rows, compare, finish, observe
from fusedkd.kernels.tokens import token_gradient, token_statistics

__all__ = [
    "block_rows",
    "compare",
    "empty",
    "finish",
    "head_dtypes",
    "mm_",
    "observe",
    "rows",
    "scale_",
    "token_gradient",
    "token_statistics",
    "unavailable",
]


def unavailable() -> str | None:
    try:
        from . import device
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux, `pip install 'fusedkd[triton]'`"
    return device.unavailable()


def rows(call: RowCall, *fields: Any) -> Rows:
    """``fields``: where ``call`` is only the student, the other fields of a RowCall (the form of
    0.1, which goes with release 0.3)."""
    from . import ops, sparse_ops

    call = RowCall(call, *fields) if fields else call  # type: ignore[arg-type]
    return (sparse_ops if isinstance(call.teacher, SparseRows) else ops).rows(call)


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    from . import ops

    ops.scale_(grad, factor, out)


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    from . import ops

    return ops.head_dtypes(dtype)


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    from . import ops

    ops.mm_(out, a, b, accumulate)
