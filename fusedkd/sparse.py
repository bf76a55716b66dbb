"""What a sparse teacher's entries mean, settled once for all backends."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd import divergences
from fusedkd.divergences import Divergence
from fusedkd.spec import LossSpec

__all__ = ["PADDING", "SparseRows", "canonical"]

PADDING = 2**31 - 1  # sorts behind every id
INF = float("inf")
# How far above 1 probabilities may sum, besides the rounding of log_probs: what softmaxes in half
# precision leave.
EXCESS = 1e-3


class SparseRows(NamedTuple):
    """The teacher's side of N rows as backends read it, see :mod:`fusedkd.kernels`."""

    indices: Tensor  # (N, K) int32, ascending; PADDING behind all others
    log_probs: Tensor  # (N, K + 1) fp64; the last one is the tail's
    rounding: float  # a tail below this counts as 0 where the student has none
    tail: str  # "bucket", "renormalize" or "drop"; of the latter two nothing is left but the ids

    def part(self, rows: slice | Tensor) -> SparseRows:
        return self._replace(indices=self.indices[rows], log_probs=self.log_probs[rows])


def canonical(indices: Tensor, log_probs: Tensor, row_scale: Tensor, spec: LossSpec) -> SparseRows:
    """Sort, check and complete a :class:`fusedkd.SparseTeacher`'s entries (see its docstring).

    Args:
        indices, log_probs: (..., K), the token dimensions together N.
        row_scale: (N,) in the accumulation type; rows where it is 0 are not looked at.

    Raises:
        ValueError: ids outside the vocabulary or twice in a token, probabilities that sum to more
            than 1, nothing to renormalise, a divergence that is infinite for this ``tail``. On a
            GPU all but the last are one device-side assertion: no synchronisation.
    """
    tail = spec.tail or "drop"
    _check_tail(spec.divergence, tail)
    shape = (row_scale.numel(), indices.shape[-1])
    raw = indices.reshape(shape)
    dropped = (row_scale == 0)[:, None]
    near = raw.clamp(-1, spec.vocab_size - 1)
    outside = (near != raw) & ~dropped
    ids, order = _ascending(near.masked_fill((near < 0) | dropped, PADDING))
    # In fp64: where the student is close, rounding the tail's logarithm would be most of the loss.
    lp = log_probs.detach().reshape(shape).double().gather(-1, order)
    lp = lp.masked_fill_(ids == PADDING, -INF)
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != PADDING)

    p = lp.exp()
    total, spread = p.sum(-1), torch.linalg.vecdot(p, lp.clamp(min=-1e3)).abs()  # 0 log 0 is 0
    excess = total > 1 + EXCESS + torch.finfo(log_probs.dtype).eps * spread
    empty = (total == 0) & (row_scale != 0) if tail == "renormalize" else total < 0
    _check(outside, twice, excess, empty, raw, ids, total, spec)

    last = torch.full_like(total, -INF)
    if tail == "bucket":
        lost = spread * torch.finfo(row_scale.dtype).eps / 2
        last = torch.where(total < 1, 1 - total, lost).log()
    elif tail == "renormalize":
        lp = torch.where(lp == -INF, lp, lp - total.log()[:, None])
    # The sum's rounding is at most eps / 2 * spread, and spread <= log V < 16.
    rounding = 8 * torch.finfo(log_probs.dtype).eps
    return SparseRows(ids, torch.cat([lp, last[:, None]], -1), rounding, tail)


def _ascending(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) ids in order, as int32, and where they were."""
    if ids.device.type != "cpu":
        return ids.to(torch.int32).sort(-1)
    # NumPy's sort is vectorised: 0.1 ms where torch's takes 0.8 (512 x 64, Zen 3, November 2026).
    keys = (ids.long() << 32 | torch.arange(ids.shape[1], device=ids.device)).numpy()
    keys.sort(-1)
    ordered = torch.from_numpy(keys)
    return (ordered >> 32).to(torch.int32), ordered & 0xFFFFFFFF


def _check(
    outside: Tensor,
    twice: Tensor,
    excess: Tensor,
    empty: Tensor,
    raw: Tensor,
    ids: Tensor,
    total: Tensor,
    spec: LossSpec,
) -> None:
    if raw.device.type != "cpu":
        wrong = (outside.any(-1) | twice.any(-1) | excess | empty).any()
        torch._assert_async(
            ~wrong,
            f"SparseTeacher: expected distinct indices from 0 to {spec.vocab_size - 1} (or -1: "
            "padding) whose probabilities sum to at most 1, and with tail='renormalize' more than "
            "0, in every token that counts",
        )
    elif outside.any():
        raise ValueError(
            f"teacher.indices holds {int(raw[outside][0])}: expected 0 to {spec.vocab_size - 1} "
            "(the vocabulary; the student's columns, or vocab_size), or -1 for padding."
        )
    elif twice.any():
        raise ValueError(
            f"teacher.indices holds {int(ids[:, 1:][twice][0])} twice in one token: expected each "
            "id once. Add the probabilities of the two (logaddexp) into one entry."
        )
    elif excess.any():
        raise ValueError(
            f"teacher.log_probs: a token's probabilities sum to {float(total[excess][0]):.6g}: "
            "expected at most 1. They are natural logarithms of probabilities (log_softmax over "
            "the whole vocabulary, then topk), not logits or logits of the top k."
        )
    elif empty.any():
        raise ValueError(
            f"teacher has no entry with a probability above 0 for token {int(empty.nonzero()[0])}: "
            "tail='renormalize' has nothing to scale there. Leave the token out (ignore_index, or "
            "token_weights 0), or use tail='bucket' or 'drop'."
        )


@functools.cache
def _check_tail(divergence: Divergence, tail: str) -> None:
    """Refuse a divergence whose own formula is infinite at p = 0 < q where there are such entries.

    Every f of :mod:`fusedkd.divergences` is finite there for all q or for none.
    """
    if tail == "bucket" or _finite_without(divergence):
        return
    fine = [name for name in divergences.names() if _finite_without(divergences.make(name))]
    raise ValueError(
        f"divergence={divergence.name!r} is infinite where the teacher has no probability, and "
        f"tail={tail!r} leaves it none outside its entries: expected tail='bucket', or a "
        f"divergence that is finite there, such as {', '.join(fine)}."
    )


def _finite_without(divergence: Divergence) -> bool:
    absent, half = torch.tensor([-INF, -0.7], dtype=torch.float64, device="cpu")
    return bool(divergence.value(absent, half).isfinite())
