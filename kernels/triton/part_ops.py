"""The launchers for rows of which only some columns lie here. Contract: :mod:`fusedkd.kernels`.

Each verb is one stage of the dense or the sparse teacher's kernel, over the columns here; where
those are many and the rows are few, several programs share a row's, and what they leave is merged
as the ranks' is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fusedkd import debug
from fusedkd.distributions.sparse import SparseRows
from fusedkd.kernels import Comparison, RowCall, Rows, Statistics

from . import config, device, ops, sparse_ops
from .launcher import Launcher
from .merging import merge

# Logits of either side in a block of rows: an H200 reads them twice and writes their gradient in
# half a millisecond, some times as long as the host takes to launch a block and the ranks to tell
# one another of it. Arithmetic; not measured.
BLOCK = 1 << 28


def block_rows(widest: int) -> int:
    return max(1, BLOCK // widest)


def observe(call: RowCall) -> Tensor:
    call = _read(call)
    variant, launch = _how(call)
    shape = (launch.pieces, call.row_scale.numel(), len(Statistics._fields))
    found = call.row_scale.new_empty(shape, dtype=torch.float64)
    _launch("statistics", call, variant, launch, partial=found)
    return found[0] if launch.pieces == 1 else merge(found.unbind())


def compare(call: RowCall, statistics: Tensor) -> Comparison | None:
    """Also where the statistics say all: of which rows they do not, only the device knows. Against
    a sparse teacher the ids' logits are kept, also for cross-entropy's gradient."""
    sparse = isinstance(call.teacher, SparseRows)
    if not (call.spec.kd_scale or call.metrics or sparse):
        return None
    call = _read(call)
    variant, launch = _how(call)
    shape = (call.row_scale.numel(), config.SUMS, launch.pieces)
    sums = call.row_scale.new_zeros(shape, dtype=torch.float64)
    kept = sparse_ops.id_logits(call) if sparse else None
    _launch("middle", call, variant, launch, partial=statistics, sums=sums, kept=kept)
    return Comparison(sums.sum(-1), kept)


def finish(call: RowCall, statistics: Tensor, comparison: Comparison | None) -> tuple[Rows, None]:
    if (read := _read(call)) is not call:
        return Rows(finish(read, statistics, comparison)[0].loss, None), None
    variant, launch = _how(call)
    results = call.results()
    sums, kept = (None, None) if comparison is None else comparison
    _launch("gradient", call, variant, launch, statistics, sums, results, kept)
    return results, None


def _read(call: RowCall) -> RowCall:
    """With the metrics, if a row rule reads them."""
    read = call.metrics or ops.rule_of(call.spec) is not None
    return call if read == call.metrics else call._replace(metrics=read)


def _how(call: RowCall) -> tuple[config.Variant, config.Launch]:
    assert call.part is not None
    device.check(call.student)
    n, columns = call.row_scale.numel(), call.part.columns
    launch = config.choose(n, columns, device.processors(call.student.device))
    kind = sparse_ops if isinstance(call.teacher, SparseRows) else ops
    return kind.variant_of(call), launch


def _launch(
    stage: str,
    call: RowCall,
    variant: config.Variant,
    launch: config.Launch,
    partial: Tensor,
    sums: Tensor | None = None,
    results: Rows | None = None,
    kept: Tensor | None = None,
) -> None:
    n, part = call.row_scale.numel(), call.part
    assert part is not None
    if n == 0:
        return
    if debug.ENABLED:
        debug.note(f"{stage} of {n:,} rows by {launch}")
    loss, metrics = results or (None, None)
    tail = None
    if isinstance(call.teacher, SparseRows):
        tail = sparse_ops.tail_of(call.teacher.tail)
        kept = sparse_ops.id_logits(call) if kept is None else kept
        arguments = sparse_ops.inputs(call, variant, kept)
    else:
        arguments = ops.inputs(call, variant) | {"arrived": None}
    arguments |= {"vocab": part.columns, "offset": part.offset}
    arguments |= {"partial": partial, "sums": sums, "loss": loss, "metrics": metrics}
    launcher, pieces = _launcher(variant, launch, stage, tail)
    with device.guard(call.student):
        launcher((n, pieces), arguments)


@functools.cache
def _launcher(
    variant: config.Variant, launch: config.Launch, stage: str, tail: str | None
) -> tuple[Launcher, int]:
    """And its programs a row."""
    if tail is not None:
        return sparse_ops.stage_launcher(variant, launch, stage, tail)
    count = ops.programs_a_row(variant, launch, stage)
    return ops.stage_launcher(variant, launch, stage), count
