"""Named statistics of the pieces of rows, merged: :func:`fusedkd.kernels.pieces.merge` in one
launch instead of twenty."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedkd.kernels import Statistics
from fusedkd.kernels.pieces import Tables

from . import device
from .launcher import Launcher
from .numerics import LN2, exp_wide, reciprocal

INFINITY = tl.constexpr(float("inf"))
COLUMNS = tl.constexpr(len(Statistics._fields))
WIDTH = tl.constexpr(triton.next_power_of_2(len(Statistics._fields)))
ROWS, WARPS = 4, 4  # a warp has a row
# what becomes of a column; all else is added up
LARGEST, SMALLEST, MEAN, TOP = (tl.constexpr(i) for i in range(1, 5))


def merge(pieces: Sequence[Tensor]) -> Tensor:
    """See :mod:`fusedkd.kernels`."""
    merged = torch.empty_like(pieces[0])
    n = len(merged)
    if n:
        arguments = {
            "pieces": torch.stack(tuple(pieces)),
            "merged": merged,
            "table": _table(merged.device),
            "rows": n,
            "count": len(pieces),
        }
        with device.guard(merged):
            _launcher()((triton.cdiv(n, ROWS), 1), arguments)
    return merged


@functools.cache
def _launcher() -> Launcher:
    return Launcher(merge_kernel, {"BLOCK": ROWS}, {"num_warps": WARPS})


@functools.cache
def _table(where: torch.device) -> Tensor:
    """(3, COLUMNS) int32: what becomes of a column, which one is its exponent (-1: none), and which
    one weighs it, or says whose piece it is taken from."""
    of = Tables.on(torch.device("cpu"))
    table = torch.zeros(3, len(Statistics._fields), dtype=torch.int32)
    kinds = (LARGEST, of.maxima), (SMALLEST, of.minima), (MEAN, of.expected), (TOP, of.tops)
    for kind, columns in kinds:
        table[0, columns] = kind.value
    table[1] = torch.cat([of.exponents, torch.tensor([-1])])[of.unit]
    table[2, of.expected], table[2, of.tops] = of.sums.int(), of.top_of.int()
    table[1, of.expected] = table[1, of.sums]
    return table.to(where)


@triton.jit(
    do_not_specialize=("rows", "count"),
    do_not_specialize_on_alignment=("pieces", "merged", "table"),
)
def merge_kernel(
    pieces, merged,  # fp64 (count, rows, COLUMNS), (rows, COLUMNS)
    table,  # see _table
    rows: tl.int32, count: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows / BLOCK,)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    there, mask = column < COLUMNS, (n < rows) & (column < COLUMNS)
    kind = tl.load(table + column, mask=there, other=0)
    unit = tl.load(table + COLUMNS + column, mask=there, other=-1)
    other = tl.load(table + 2 * COLUMNS + column, mask=there, other=0)
    scaled, tops = mask & (unit >= 0), mask & (kind == TOP)
    row = n.to(tl.int64) * COLUMNS
    first = tl.load(pieces + row + column, mask=mask, other=0.0)
    exponent = tl.load(pieces + row + unit, mask=scaled, other=0.0)
    chosen, best = first, tl.load(pieces + row + other, mask=tops, other=0.0)
    for piece in range(1, count):
        at = pieces + rows.to(tl.int64) * piece * COLUMNS + row
        x = tl.load(at + column, mask=mask, other=0.0)
        here = tl.load(at + unit, mask=scaled, other=0.0)
        exponent = tl.where((here > exponent) | (here != here), here, exponent)
        top = tl.load(at + other, mask=tops, other=0.0)
        larger = tl.where(kind == TOP, (top > best) | ((top != top) & (best == best)), x > chosen)
        better = tl.where(kind == SMALLEST, x < chosen, larger)
        best = tl.where(larger, top, best)
        chosen = tl.where(better | ((x != x) & (kind != TOP)), x, chosen)
    zero = tl.full([BLOCK, WIDTH], 0, tl.float64)
    total, weights, largest = zero, zero, tl.where(exponent == -INFINITY, 0.0, exponent)
    for piece in range(count):
        at = pieces + rows.to(tl.int64) * piece * COLUMNS + row
        x = tl.load(at + column, mask=mask, other=0.0)
        here = tl.load(at + unit, mask=scaled, other=0.0)
        weight = tl.load(at + other, mask=mask & (kind == MEAN), other=1.0)
        below = here - largest
        factor = tl.where(here == -INFINITY, 0.0, exp_wide(below * LN2) + below * 0.0)
        total += x * (weight * factor)
        weights += weight * factor
    mean = total * reciprocal(weights)
    merge = tl.where(kind == 0, total, tl.where(kind == MEAN, mean, chosen))
    tl.store(merged + row + column, merge, mask=mask)
