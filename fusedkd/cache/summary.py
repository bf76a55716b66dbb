"""From the teacher's logits to what a cache keeps of them. Plain torch, on the logits' device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fusedkd.cache.codes import LARGEST_GAP
from fusedkd.cache.errors import CacheError
from fusedkd.cache.layout import Answers, Layout
from fusedkd.distributions import LMHead
from fusedkd.top import top_k

PRODUCT_BYTES = 256 << 20  # of fp32 logits made at a time: a product of few rows reads all weights
CACHE_BYTES = 4 << 20  # of them looked at at a time on a CPU
_NEVER = -1e30  # a logit that stands for probability 0 and can be multiplied by 0


def summarize(
    distribution: Tensor | LMHead, layout: Layout, keys: Sequence[bytes]
) -> Iterator[Answers]:
    """The answers for each sequence of a batch.

    Args:
        distribution: logits (B, L, columns) or a head with hidden states (B, L, H). Columns beyond
            ``layout.vocab_size`` are padding.
        layout: what is kept.
        keys: the sequences' hashes, B of them: they seed the draws, which therefore depend on
            nothing but the sequence and the teacher.

    Raises:
        CacheError: the teacher answers with NaN or infinity.
    """
    logits = distribution.hidden if isinstance(distribution, LMHead) else distribution
    batch, length = logits.shape[:2]
    uniform = _uniform(layout.k, keys, length) if layout.policy.kind == "sample" else None
    parts: list[tuple[Tensor, ...]] = []
    for start, rows in _chunks(distribution, layout.vocab_size):
        if uniform is None:
            parts.append(_top(rows, layout))
        else:
            drawn = uniform[start : start + len(rows)].to(rows.device)
            parts.append(_draw(rows, drawn, layout))
    merged = [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]
    if not np.isfinite(merged[3]).all():
        row = int((~np.isfinite(merged[3])).argmax())
        raise CacheError(
            f"the teacher's logits are NaN or infinite at token {row % length} of the sequence "
            f"{keys[row // length].hex()}: nothing can be learnt from that. A teacher in float16 "
            "may need --teacher-dtype float32 or bfloat16."
        )
    for row in range(batch):
        yield Answers(*(part[row * length : (row + 1) * length] for part in merged))


def _chunks(distribution: Tensor | LMHead, size: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, logits (rows, size) in fp32 that may be written to) over all rows."""
    source = distribution.hidden if isinstance(distribution, LMHead) else distribution
    flat = source.reshape(-1, source.shape[-1])
    many = max(1, PRODUCT_BYTES // (4 * size))
    few = many if flat.is_cuda else max(1, CACHE_BYTES // (4 * size))
    for start in range(0, len(flat), many):
        part = flat[start : start + many]
        if isinstance(distribution, LMHead):
            logits = _logits(distribution, part, size)
        else:
            logits = part[:, :size].to(torch.float32, copy=True)
        for offset in range(0, len(logits), few):
            yield start + offset, logits[offset : offset + few]


def _logits(head: LMHead, hidden: Tensor, size: int) -> Tensor:
    weight = head.weight[:size].to(hidden.dtype)
    bias = None if head.bias is None else head.bias[:size].to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if head.logit_scale != 1.0:
        logits *= head.logit_scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _top(logits: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """ids, log-probabilities, odds, entropy of rows of logits, which are overwritten."""
    ids = top_k(logits, layout.k).indices
    columns = torch.where(ids < 0, ids[:, :1], ids).clamp_(min=0)  # a row of fewer: its first again
    values = logits.gather(1, columns).masked_fill_(ids < 0, -math.inf)
    first = values[:, :1]
    logits -= first
    gaps = (values - first).clamp_min_(_NEVER)
    kept = _kept(logits, gaps, layout)
    logits.scatter_(1, columns, torch.where(kept, _NEVER, gaps))  # what remains is the tail
    logits.clamp_min_(_NEVER)
    heads = torch.where(kept, gaps, _NEVER)
    exps, head_exps = logits.exp(), heads.exp()
    odds = [_log_sum(heads, head_exps, t) - _log_sum(logits, exps, t) for t in layout.temperatures]
    total = exps.sum(1) + head_exps.sum(1)
    slant = _dot(exps, logits) + _dot(head_exps, heads)
    normalizer = total.log()
    return (
        torch.where(kept, ids, -1),
        gaps - normalizer[:, None],
        torch.stack(odds, 1),
        normalizer - slant / total,
    )


def _kept(logits: Tensor, gaps: Tensor, layout: Layout) -> Tensor:
    """Which of the most probable entries: those in reach of the codes, and up to ``top_p``."""
    kept = gaps >= -LARGEST_GAP
    if layout.policy.top_p is not None:
        probabilities = gaps.exp() / logits.exp().sum(1, keepdim=True)
        before = probabilities.cumsum(1) - probabilities
        kept &= before < layout.policy.top_p
    return kept


def _log_sum(gaps: Tensor, exps: Tensor, temperature: float) -> Tensor:
    """log sum exp(gaps / T), with exp(gaps) at hand; -inf where nothing is left."""
    return (exps if temperature == 1.0 else (gaps / temperature).exp_()).sum(1).log()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] @ b[:, :, None]).view(-1)


def _draw(logits: Tensor, uniform: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """ids, how often each was drawn, nothing, entropy. Repeated ids are -1."""
    first = logits.amax(1, keepdim=True)
    gaps = (logits - first).clamp_min_(_NEVER)
    exps = gaps.exp()
    total = exps.sum(1)
    entropy = total.log() - _dot(exps, gaps) / total
    weights = exps if layout.temperatures[0] == 1.0 else (gaps / layout.temperatures[0]).exp_()
    ids = _inverse_cdf(weights, uniform)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
    return torch.where(new, ids, -1), counts, ids[:, :0], entropy


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The column in whose share of the row's weight each number falls: first the group of 32
    columns, then the column, so that nothing is summed up in order over the whole row."""
    depth = 32
    grouped = torch.nn.functional.pad(weights, (0, -weights.shape[1] % depth))
    grouped = grouped.unflatten(1, (-1, depth))
    ends = grouped.sum(2, dtype=torch.float64).cumsum(1)
    wanted = uniform * ends[:, -1:]
    group = torch.searchsorted(ends, wanted, right=True).clamp_max_(ends.shape[1] - 1)
    wanted -= torch.nn.functional.pad(ends, (1, 0)).gather(1, group)
    inner = grouped.gather(1, group[:, :, None].expand(-1, -1, depth)).double().cumsum(2)
    column = (inner <= wanted[:, :, None]).sum(2).clamp_max_(depth - 1)
    return (group * depth + column).clamp_max_(weights.shape[1] - 1)


def _uniform(draws: int, keys: Sequence[bytes], length: int) -> Tensor:
    """(B * L, draws) numbers in [0, 1), ascending; the same for a sequence wherever it appears.

    Systematic sampling: one number in each of ``draws`` equal parts, at the same place in all of
    them. Each is uniform by itself, so means are as unbiased as those of independent draws, and an
    id is drawn ``draws * p`` times, rounded up or down.
    """
    parts = np.arange(draws)
    rows = [
        np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random((length, 1))
        for key in keys
    ]
    spread = (np.concatenate(rows) + parts) / draws
    return torch.from_numpy(np.minimum(spread, np.nextafter(1.0, 0.0)))  # a sum may round to 1
