"""Rows of which each rank of a group has some columns: what the ranks tell one another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedkd.backends import CustomRows
from fusedkd.kernels import Part, RowCall, Rows
from fusedkd.kernels.pieces import merge

__all__ = ["GroupRows"]


class GroupRows(CustomRows):
    """The rows of :mod:`fusedkd.kernels` in pieces, each rank's in its own backend.

    Args:
        name, device: the backend.
        group: the pieces' order is that of its ranks.
        part: the columns that lie here.
        widest: of any rank, and ``budget`` bytes: every rank takes as many rows at a time.
    """

    def __init__(
        self,
        name: str | None,
        device: torch.device,
        group: Any,
        part: Part,
        widest: int,
        budget: int,
    ) -> None:
        super().__init__(name, device)
        self.group, self.part = group, part
        self.step = self.inner.block_rows(widest, budget)

    def rows(self, call: RowCall) -> Rows:
        """Of (1, N, C), as the loop over chunks makes them. While the ranks wait for one block's
        statistics they observe the next one."""
        results, n = call.results(), call.row_scale.numel()
        blocks = [slice(i, min(i + self.step, n)) for i in range(0, n, self.step)]
        observed: _Observed | None = None
        for i, rows in enumerate(blocks):
            observed = observed or self._observe(call.of(rows, self.part))
            following = blocks[i + 1 : i + 2]
            then = self._observe(call.of(following[0], self.part)) if following else None
            results.put(rows, self._finish(observed))
            observed = then
        return results

    def _observe(self, call: RowCall) -> _Observed:
        return _Observed(call, self._gather(self.inner.observe(call)))

    def _finish(self, observed: _Observed) -> Rows:
        call, backend = observed.call, self.inner
        statistics = merge(observed.statistics.wait())
        comparison = backend.compare(call, statistics)
        if comparison is not None:
            shares = self._gather(comparison.sums).wait()
            comparison = comparison._replace(sums=torch.stack(shares).sum(0))
        results, again = backend.finish(call, statistics, comparison)
        if again is not None and again.any():
            self._finish_exactly(call, again.nonzero()[:, 0], results)
        return results

    def _finish_exactly(self, call: RowCall, rows: Tensor, results: Rows) -> None:
        """The rows that were left out."""
        assert call.part is not None
        some = call.of(rows, call.part._replace(exact=True))
        results.put(rows, self._finish(self._observe(some)))
        if call.grad is not None and some.grad is not None:
            call.grad[:, rows] = some.grad

    def _gather(self, piece: Tensor) -> _Gathered:
        pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size(self.group))]
        return _Gathered(pieces, dist.all_gather(pieces, piece, group=self.group, async_op=True))


class _Gathered(NamedTuple):
    """One tensor of each rank, on its way."""

    pieces: list[Tensor]
    work: Any

    def wait(self) -> list[Tensor]:
        self.work.wait()
        return self.pieces


class _Observed(NamedTuple):
    call: RowCall
    statistics: _Gathered
