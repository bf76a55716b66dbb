"""Rows of which each rank of a group has some columns: what the ranks tell one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedkd.backends import CustomRows
from fusedkd.kernels import Part, RowCall, Rows
from fusedkd.kernels.tokens import Factors, TokenCall, Top, merged, merged_top


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
        self.group, self.part, self.widest, self.budget = group, part, widest, budget

    def rows(self, call: RowCall) -> Rows:
        """Of (1, N, C), as the loop over chunks makes them, in blocks. While one waits for the
        other ranks the next is worked on; every rank takes the same steps in the same order."""
        results, n = call.results(), call.row_scale.numel()
        step = self.inner.block_rows(call, self.widest, self.budget)
        live: list[Iterator[None]] = []
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            live.insert(0, self._block(call.of(rows, self.part), results, rows))
            live = _advanced(live)
        while live:
            live = _advanced(live)
        return results

    def token_statistics(self, call: TokenCall) -> Tensor:
        """Of whole rows."""
        piece = self.inner.token_statistics(call._replace(part=self.part))
        return merged(self._gather(piece).wait())

    def token_gradient(
        self, call: TokenCall, statistics: Tensor, factors: Factors, out: Tensor
    ) -> None:
        """Of the columns here."""
        self.inner.token_gradient(call._replace(part=self.part), statistics, factors, out)

    def top(self, call: TokenCall, k: int) -> Top:
        """Of whole rows."""
        piece = self.inner.top(call._replace(part=self.part), k)
        fields = [self._gather(x.contiguous()) for x in piece]
        pieces = [Top(*x) for x in zip(*(field.wait() for field in fields), strict=True)]
        return merged_top(pieces, call.tokens)

    def _block(self, call: RowCall, results: Rows, rows: slice | Tensor) -> Iterator[None]:
        """Compute some rows, and stop wherever the other ranks have to be waited for."""
        backend, pieces = self.inner, self._gather(self.inner.observe(call))
        yield
        statistics = backend.merge(pieces.wait())
        comparison = backend.compare(call, statistics)
        if comparison is not None:
            shares = self._gather(comparison.sums)
            yield
            comparison = comparison._replace(sums=torch.stack(shares.wait()).sum(0))
        made, again = backend.finish(call, statistics, comparison)
        if again is not None and again.any():
            self._exactly(call, again.nonzero()[:, 0], made)
        results.put(rows, made)

    def _exactly(self, call: RowCall, rows: Tensor, results: Rows) -> None:
        """The rows of a block that were left out."""
        assert call.part is not None
        some = call.of(rows, call.part._replace(exact=True))
        for _ in self._block(some, results, rows):
            pass
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


def _advanced(blocks: list[Iterator[None]]) -> list[Iterator[None]]:
    """Each goes one step on, the last one that was begun first; those that are not at their end."""
    return [block for block in blocks if next(block, blocks) is not blocks]
