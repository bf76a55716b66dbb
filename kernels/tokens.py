"""Rows of logits without a teacher: log-probabilities of single tokens, entropies, their gradient;
the most probable tokens.

Three verbs beside those of :mod:`fusedkd.kernels`, on whole rows or on pieces of them:

    ``token_statistics(call: TokenCall) -> Tensor`` (N, len(FIELDS) + K) fp64 of the columns here,
        0 in rows that do not count; :func:`merged` makes whole rows' of them
    ``token_gradient(call, statistics, factors, out)``: write to ``out`` (B, T, C), perhaps the
        logits themselves, the gradient of the columns here, of
        ``sum_k factors.tokens[k] log q(token k) + factors.entropy H(q)``; rounded once, 0 in rows
        that do not count, in padding columns and where a logit is -inf

    ``top(call, k) -> Top`` of the columns here, the call's tokens distinct; :func:`merged_top`
        makes whole rows' of them

with q the softmax of the transformed logits over T and H its entropy in nats. Below are they in
plain torch, for any device, and what is common to all backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd.kernels import Part
from fusedkd.kernels.pieces import transform
from fusedkd.spec import Transform

# Of a row, before the z / T at its tokens (0 where they lie elsewhere): the largest z / T, the sum
# of exponentials beside it, and E_q[z / T] less the largest.
FIELDS = ("most", "total", "gap")
# Rows are worked on in blocks of so many bytes, of which several are alive at a time.
BLOCK_BYTES = 64 << 20
_LAST = 2**31 - 1


class TokenCall(NamedTuple):
    """N = B T rows; row n = b T + t."""

    logits: Tensor  # (B, T, C) raw, last stride 1
    tokens: Tensor  # (N, K) int64 contiguous, ids of the whole vocabulary; -1: none
    counts: Tensor  # (N,) bool contiguous
    temperature: float
    how: Transform
    part: Part  # the columns that lie here
    entropy: bool  # whether the gap is wanted

    def blocks(self, size: int) -> list[slice]:
        """Rows of a call with B = 1, so many bytes of logits at a time."""
        step = max(1, size // max(1, 8 * self.logits.shape[-1]))
        return [slice(a, a + step) for a in range(0, self.logits.shape[1], step)]

    def of(self, rows: slice) -> TokenCall:
        """Some rows of a call with B = 1."""
        logits, tokens, counts = self.logits[:, rows], self.tokens[rows], self.counts[rows]
        return self._replace(logits=logits, tokens=tokens, counts=counts)


class Factors(NamedTuple):
    """What the gradient is multiplied by, row by row."""

    tokens: Tensor  # (N, K) fp64, 0 where there is no token
    entropy: Tensor | None  # (N,) fp64


class Top(NamedTuple):
    """The largest of a row, 0 and -1 in rows that do not count."""

    values: Tensor  # (N, k) fp64 z / T, the largest first, of equal ones the smallest id; or -inf
    ids: Tensor  # (N, k) int64, -1 where there is no more above -inf
    # (N, len(FIELDS) + K) as above, of which ``gap`` is the sum of the exponentials of all that is
    # neither among them nor one of the K tokens
    statistics: Tensor


def merged(pieces: Sequence[Tensor]) -> Tensor:
    """The statistics of whole rows, from those of their pieces in order."""
    each = torch.stack(list(pieces))
    most, total, gap = each[..., 0], each[..., 1], each[..., 2]
    whole = most.amax(0)
    away = torch.where(total == 0, 0.0, most - whole)
    share = total * away.exp()
    sums = share.sum(0)
    mean = torch.where(share == 0, 0.0, share * (gap + away)).sum(0) / sums.masked_fill(
        sums == 0, 1.0
    )
    return torch.cat([torch.stack([whole, sums, mean], -1), each[..., 3:].sum(0)], -1)


def merged_top(pieces: Sequence[Top], tokens: Tensor) -> Top:
    """Of whole rows, from those of their pieces in order."""
    each = torch.stack([piece.statistics for piece in pieces])
    values, ids = (torch.cat(x, -1) for x in zip(*(piece[:2] for piece in pieces), strict=True))
    order = values.sort(dim=-1, descending=True, stable=True).indices
    k = pieces[0].ids.shape[1]
    most = each[..., 0].amax(0)
    factor = torch.where(each[..., 1] == 0, 0.0, (each[..., 0] - most).exp())
    total, outside = ((each[..., i] * factor).sum(0) for i in (1, 2))
    lost, lost_ids = (x.gather(1, order[:, k:]) for x in (values, ids))
    kept = (lost_ids[:, :, None] == tokens[:, None]).any(-1) | (lost_ids < 0)
    outside = outside + (lost - most[:, None]).exp().masked_fill(kept, 0.0).sum(-1)
    row = torch.stack([most, total, outside], -1)
    statistics = torch.cat([row, each[..., 3:].sum(0)], -1)
    return Top(values.gather(1, order[:, :k]), ids.gather(1, order[:, :k]), statistics)


def log_probs(statistics: Tensor) -> Tensor:
    """(N, K) of whole rows, in nats."""
    return statistics[:, 3:] - statistics[:, :1] - statistics[:, 1:2].log()


def entropy(statistics: Tensor) -> Tensor:
    """(N,) in nats, of whole rows."""
    return statistics[:, 1].log() - statistics[:, 2]


def here(call: TokenCall) -> tuple[Tensor, Tensor]:
    """(N, K): which tokens lie here, and their columns, or 0."""
    columns = call.tokens - call.part.offset
    inside = (call.tokens >= 0) & (columns >= 0) & (columns < call.part.columns)
    return inside & call.counts[:, None], columns.masked_fill(~inside, 0)


def row_factors(call: TokenCall, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """The gradient is ``q (constant + linear (z / T - its mean))``, each (N,) fp64, but at the
    tokens: this is it for all others."""
    over = 1 / call.temperature
    linear = None if factors.entropy is None else factors.entropy * -over
    return factors.tokens.sum(-1) * -over, linear


def put_tokens(call: TokenCall, statistics: Tensor, factors: Factors, out: Tensor) -> None:
    """Write the gradient at the tokens, in fp64 until it is rounded: where q is near 1 the two
    parts of it cancel."""
    if not call.tokens.shape[1] or not call.part.columns:
        return
    inside, columns = here(call)
    at = statistics[:, 3:]
    q, (constant, linear) = log_probs(statistics).exp(), row_factors(call, factors)
    value = _totals(call.tokens, factors.tokens) / call.temperature + constant[:, None] * q
    if linear is not None:
        mean = statistics[:, :1] + statistics[:, 2:3]
        value = value + linear[:, None] * q * (at - mean)
    slope: Tensor | float = call.how.scale
    if cap := call.how.softcap:
        slope = slope * (1 - (at * call.temperature / cap) ** 2)
    value = (value * slope).masked_fill(at == -math.inf, 0.0)
    # what lies elsewhere repeats one of those here, or writes what is there
    first = inside.int().argmax(1, keepdim=True)
    any_here = inside.gather(1, first)
    columns = torch.where(inside, columns, columns.gather(1, first))
    flat = out.view(-1, out.shape[-1]) if out.is_contiguous() else None
    for b in range(1 if flat is not None else out.shape[0]):
        length = out.shape[1]
        rows = slice(None) if flat is not None else slice(b * length, (b + 1) * length)
        grad = out[b] if flat is None else flat
        there = grad.gather(1, columns[rows])
        new = torch.where(inside, value, value.gather(1, first))[rows].to(grad.dtype)
        grad.scatter_(1, columns[rows], torch.where(any_here[rows], new, there))


def _totals(tokens: Tensor, factors: Tensor) -> Tensor:
    """(N, K) the factors of a token that a row names several times, added up."""
    if tokens.shape[1] == 1:
        return factors
    ids, order = tokens.sort(-1)
    sums = torch.nn.functional.pad(factors.gather(1, order).cumsum(-1), (1, 0))
    first, last = (torch.searchsorted(ids, tokens, right=right) for right in (False, True))
    alone = last - first == 1
    return torch.where(alone, factors, sums.gather(1, last) - sums.gather(1, first))


# ---------------------------------------------------------------------------------------------
# The verbs in plain torch


def token_statistics(call: TokenCall, dtype: torch.dtype | None = None) -> Tensor:
    """See above; computed in ``dtype``, by default the logits' if that is fp64, else fp32."""
    call = _flat(call)
    found = [_statistics(call.of(rows), dtype) for rows in call.blocks(BLOCK_BYTES)]
    return torch.cat(found) if found else _statistics(call, dtype)


def _statistics(call: TokenCall, dtype: torch.dtype | None) -> Tensor:
    z = _logits(call, dtype)
    most = z.amax(-1, keepdim=True)
    away = z - most.masked_fill(most == -math.inf, 0.0)
    e = away.exp()
    total = e.sum(-1, dtype=torch.float64)
    gap = torch.where(e == 0, 0.0, e * away).sum(-1, dtype=torch.float64)
    inside, columns = here(call)
    at = z.gather(1, columns).double().masked_fill(~inside, 0.0)
    row = torch.stack([most[:, 0].double(), total, gap / total.masked_fill(total == 0, 1.0)], -1)
    return torch.cat([row, at], -1).masked_fill(~call.counts[:, None], 0.0)


def token_gradient(
    call: TokenCall,
    statistics: Tensor,
    factors: Factors,
    out: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """See above."""
    call, grad = _flat(call), out.reshape(1, -1, out.shape[-1])
    constant, linear = row_factors(call, factors)
    for rows in call.blocks(BLOCK_BYTES):
        line = None if linear is None else linear[rows]
        grad[:, rows] = _gradient(call.of(rows), statistics[rows], constant[rows], line, dtype)
    if grad.data_ptr() != out.data_ptr():
        out.copy_(grad.view(out.shape))
    put_tokens(call, statistics, factors, out)


def _gradient(
    call: TokenCall,
    statistics: Tensor,
    constant: Tensor,
    linear: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    z = _logits(call, dtype)
    away = z - statistics[:, :1].to(z.dtype)
    grad = away.exp() * (constant / statistics[:, 1])[:, None].to(z.dtype)
    if linear is not None:
        share = (linear / statistics[:, 1])[:, None].to(z.dtype)
        grad = grad + away.exp() * share * (away - statistics[:, 2:3].to(z.dtype))
    if cap := call.how.softcap:
        grad = grad * (1 - (z * call.temperature / cap) ** 2)
    nothing = (z == -math.inf) | ~call.counts[:, None]
    full = grad.new_zeros(len(z), call.logits.shape[-1])
    full[:, : call.part.columns] = (grad * call.how.scale).masked_fill(nothing, 0.0)[
        :, : call.part.columns
    ]
    return full


def top(call: TokenCall, k: int, dtype: torch.dtype | None = None) -> Top:
    """See above."""
    call = _flat(call)
    found = [_top(call.of(rows), k, dtype) for rows in call.blocks(BLOCK_BYTES)]
    return Top(*map(torch.cat, zip(*found, strict=True))) if found else _top(call, k, dtype)


def _top(call: TokenCall, k: int, dtype: torch.dtype | None) -> Top:
    z, none = _logits(call, dtype), ~call.counts[:, None]
    k_here = min(k, z.shape[1])
    values, ids = _largest(z, k_here)
    most = z.amax(-1, keepdim=True)
    base = most.masked_fill(most == -math.inf, 0.0)
    inside, columns = here(call)
    known = (columns[:, :, None] == ids[:, None]).any(-1) | ~inside
    rest = z.scatter(1, ids, -math.inf)
    where = torch.where(inside, columns, z.shape[1])
    rest = torch.nn.functional.pad(rest, (0, 1)).scatter(1, where, -math.inf)[:, :-1]
    at = z.gather(1, columns).double().masked_fill(~inside, 0.0)
    outside = (rest - base).exp().sum(-1, dtype=torch.float64)
    own = (values - base).exp().sum(-1, dtype=torch.float64)
    also = (at - base).exp().masked_fill(known, 0.0)
    row = torch.stack([most[:, 0].double(), outside + own + also.sum(-1), outside], -1)
    ids = (ids + call.part.offset).masked_fill((values == -math.inf) | none, -1)
    pad = (0, k - k_here)
    return Top(
        torch.nn.functional.pad(values.double(), pad, value=-math.inf),
        torch.nn.functional.pad(ids, pad, value=-1),
        torch.cat([row, at], -1).masked_fill(none, 0.0),
    )


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, in order, and of equal ones the smallest columns first."""
    if z.dtype == torch.float64:
        values, ids = z.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    # A key is an entry's bits, in an order that integers have too, above its column's: all differ.
    bits = (z + 0.0).view(torch.int32)  # -0.0 is 0.0
    bits = bits ^ ((bits >> 31) & _LAST)
    columns = _LAST - torch.arange(z.shape[1], device=z.device)
    chosen = _largest_keys((bits.long() << 32) | columns, k)
    ids = _LAST - (chosen & _LAST)
    return z.gather(1, ids), ids


def _largest_keys(keys: Tensor, k: int) -> Tensor:
    """``keys.topk(k).values``. The k largest lie in the k groups with the largest maxima, so most
    of them are only looked at once."""
    size = keys.shape[1]
    depth = min(16, size // (4 * k))
    if depth < 2:
        return keys.topk(k).values
    groups = size // depth  # a group is every groups-th column
    grouped = keys[:, : groups * depth].unflatten(1, (depth, groups))
    best = grouped.amax(1).topk(k, sorted=False).indices
    few = grouped.gather(2, best[:, None].expand(-1, depth, -1)).flatten(1)
    return torch.cat([few, keys[:, groups * depth :]], 1).topk(k).values


def _flat(call: TokenCall) -> TokenCall:
    return call._replace(logits=call.logits.reshape(1, -1, call.logits.shape[-1]))


def _logits(call: TokenCall, dtype: torch.dtype | None) -> Tensor:
    """(N, C) z / T of the columns here; one of -inf if there are none."""
    logits = call.logits[0, :, : call.part.columns].detach()
    dtype = dtype or torch.promote_types(logits.dtype, torch.float32)
    if not call.part.columns:
        return logits.new_full((len(call.counts), 1), -math.inf, dtype=dtype)
    return transform(logits.to(dtype), call.how) / call.temperature
