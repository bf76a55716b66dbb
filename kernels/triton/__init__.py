"""The Triton backend. Importing it does not import triton; the first call does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, empty

from fusedkd.distributions.sparse import SparseRows
from fusedkd.kernels import Comparison, RowCall, Rows
from fusedkd.kernels.tokens import Factors, TokenCall, Top
from fusedkd.spec import LossSpec

__all__ = [
    "block_rows",
    "compare",
    "empty",
    "finish",
    "head_dtypes",
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


def unavailable() -> str | None:
    try:
        from . import device
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux, `pip install 'fusedkd[triton]'`"
    return device.unavailable()


def rows(call: RowCall, *fields: Any) -> Rows:
    """``fields``: where ``call`` is only the student, the other fields of a RowCall (the form of
    0.1, which goes with release 0.3)."""
    call = RowCall(call, *fields) if fields else call  # type: ignore[arg-type]
    ops, sparse_ops = _launchers()
    kind = sparse_ops if isinstance(call.teacher, SparseRows) else ops
    return kind.rows(call)  # type: ignore[no-any-return]


def observe(call: RowCall) -> Tensor:
    return _part_ops().observe(call)  # type: ignore[no-any-return]


def merge(pieces: Sequence[Tensor]) -> Tensor:
    return _part_ops().merge(pieces)  # type: ignore[no-any-return]


def compare(call: RowCall, statistics: Tensor) -> Comparison | None:
    return _part_ops().compare(call, statistics)  # type: ignore[no-any-return]


def finish(call: RowCall, statistics: Tensor, comparison: Comparison | None) -> tuple[Rows, None]:
    return _part_ops().finish(call, statistics, comparison)  # type: ignore[no-any-return]


def block_rows(call: RowCall, widest: int, budget: int) -> int:
    return _part_ops().block_rows(widest)  # type: ignore[no-any-return]


@functools.cache
def _part_ops() -> ModuleType:
    from . import part_ops

    return part_ops


def reduced(spec: LossSpec) -> Callable[..., tuple[Tensor, Tensor | None] | None] | None:
    from . import tally

    return tally.reduced(spec)


def token_statistics(call: TokenCall) -> Tensor:
    from . import token_ops

    return token_ops.token_statistics(call)


def token_gradient(call: TokenCall, statistics: Tensor, factors: Factors, out: Tensor) -> None:
    from . import token_ops

    token_ops.token_gradient(call, statistics, factors, out)


def top(call: TokenCall, k: int) -> Top:
    from . import token_ops

    return token_ops.top(call, k)


@functools.cache
def _launchers() -> tuple[ModuleType, ModuleType]:
    from . import ops, sparse_ops

    return ops, sparse_ops


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    _launchers()[0].scale_(grad, factor, out)


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    dtypes: tuple[torch.dtype, torch.dtype] = _launchers()[0].head_dtypes(dtype)
    return dtypes


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    _launchers()[0].mm_(out, a, b, accumulate)
