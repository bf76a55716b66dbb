"""The walk of the kernels for sparse teachers, in tiles of one 16-byte access per thread."""

import triton
import triton.language as tl

from .numerics import LOG2E, lowest, scalar, transform
from .row import INFINITY, NO_COLUMN


@triton.jit
def _row(base, n, length, stride_b, stride_t):
    """Where row n = b * length + t starts."""
    b = n // length  # both int32: a 64-bit division is a call
    return base + b.to(tl.int64) * stride_b + (n - b * length).to(tl.int64) * stride_t


@triton.jit
def _geometry(base, columns, plan: tl.constexpr):
    """(head, tiles, edges): columns before a 16-byte boundary, whole tiles, columns in neither."""
    head = 0
    if plan.aligned:
        line: tl.constexpr = 16 // plan.item
        past = ((base.to(tl.int64) // plan.item) % line).to(tl.int32)
        head = tl.minimum((line - past) % line, columns)
    tiles = (columns - head) // (plan.lanes * plan.width)
    return head, tiles, columns - tiles * (plan.lanes * plan.width)


@triton.jit
def _offsets(plan: tl.constexpr):
    lane = tl.arange(0, plan.lanes)[:, None]
    return lane * plan.width + tl.arange(0, plan.width)[None, :]


@triton.jit
def _edge_columns(start, shape, plan: tl.constexpr):
    """Edge e is column e in the head, and behind it column e + (what the tiles cover)."""
    head, tiles, edges = shape
    edge = start + _offsets(plan)
    return tl.where(edge < head, edge, edge + tiles * (plan.lanes * plan.width)), edge < edges


@triton.jit
def _tile(base, head, tile, plan: tl.constexpr):
    """Pointers to a main tile. The hint makes the accesses 16 bytes; config.aligned checked it."""
    start = base + head
    if plan.aligned:
        start = tl.multiple_of(start, 16)
    return start + tile * (plan.lanes * plan.width) + _offsets(plan)


@triton.jit
def _load(
    pointers, mask, scale_cap, acc: tl.constexpr, transformed: tl.constexpr, policy: tl.constexpr
):
    """(logits after the transform, d of that / d raw); -inf where the mask is off."""
    scale, cap = scale_cap
    if mask is None:
        raw = tl.load(pointers, eviction_policy=policy).to(acc)
    else:
        raw = tl.load(pointers, mask=mask, other=0.0).to(acc)
    if transformed:
        z, slope = transform(raw, scale, cap)
    else:
        z, slope = raw, scale
    if mask is not None:
        z = tl.where(mask, z, -INFINITY)
    return z, slope


@triton.jit
def _shifted(total, factor, shift, weight):
    """sum 2^(a + d) (g + shift) from total = sum 2^a g, weight = sum 2^a. A NaN total stays NaN."""
    return tl.where(factor == 0, total * 0.0, factor * (total + shift * weight))


@triton.jit
def _first(z, top, old_top, old_at, columns):
    """The first column that holds the maximum, given the maximum so far and where that was."""
    here = tl.min(tl.where(z == top[:, None], columns, NO_COLUMN), axis=1)
    at = tl.where(top == old_top, tl.minimum(here, old_at), old_at)
    return tl.where(top > old_top, here, at)


@triton.jit
def _at_one(powered, below, power):
    """2^(below log2 e) from powered = 2^(below log2(e) / T); at T = 1, 2 no other exponential.

    The branch is uniform. With four exponentials per entry over both sweeps an H200 stays
    memory-bound, with six it does not (config.py).
    """
    if power == 1:
        one = powered
    elif power == 2:
        one = powered * powered
    else:
        one = tl.exp2(below * LOG2E)
    return one


@triton.jit
def _total(part, mask):
    """Sum over a lane's entries; what is masked may be anything."""
    if mask is not None:
        part = tl.where(mask, part, 0.0)
    return tl.sum(part, axis=1)


@triton.jit
def _add(pieces):
    """Their sum in fp64: once per row it costs nothing, and the normalisers are everybody's."""
    return tl.sum(pieces.to(tl.float64), axis=0)


@triton.jit
def _log_prob(z, below, inverse_t, log_sum, plan: tl.constexpr):
    """log p. With T < 1 a finite mask (finfo.min) overflows; only a true -inf may mean p = 0."""
    lp = below * inverse_t - log_sum
    if plan.kls:  # the KLs are the ones that tell a huge gap from an infinite one
        lp = tl.where((lp == -INFINITY) & (z != -INFINITY), lowest(plan.acc), lp)
    return lp


@triton.jit
def zeros(grad, shape, span, padding, columns, plan: tl.constexpr):
    """0 over a span; ``padding`` is where the columns begin that are beyond the vocabulary."""
    first, last, edges = span
    nothing = tl.full([plan.lanes, plan.width], 0, grad.dtype.element_ty)
    for tile in range(first, last):
        tl.store(_tile(grad, shape[0], tile, plan), nothing)
    for begin in range(0, edges, plan.lanes * plan.width):
        at, mask = _edge_columns(begin, shape, plan)
        tl.store(grad + at, nothing, mask=mask)
    for begin in range(padding, columns, plan.lanes * plan.width):
        at = begin + _offsets(plan)
        tl.store(grad + at, nothing, mask=at < columns)


@triton.jit
def _drop(grad, loss, metrics, n, shape, span, vocab, columns, leader, plan: tl.constexpr):
    """A row that does not count."""
    if leader:
        tl.store(loss + n, scalar(0.0, plan.acc))
        if metrics is not None:
            field = tl.arange(0, 8)
            nothing = tl.full([8], 0, plan.acc)
            tl.store(metrics + n.to(tl.int64) * 8 + field, nothing)
    if grad is not None:
        zeros(grad, shape, span, vocab if leader else columns, columns, plan)


@triton.jit
def _pieces(partial, n, field: tl.constexpr, of: tl.constexpr, plan: tl.constexpr):
    at = partial + n.to(tl.int64) * (of * plan.pieces) + field * plan.pieces
    return tl.load(at + tl.arange(0, plan.pieces))


@triton.jit
def _span(shape, piece, plan: tl.constexpr):
    """(first tile, last tile, edges) of a piece; the edges belong to the last piece."""
    _, tiles, edges = shape
    share = tl.cdiv(tiles, plan.pieces)
    first = tl.minimum(piece * share, tiles)
    last = tl.minimum(first + share, tiles)
    return first, last, tl.where(piece == plan.pieces - 1, edges, 0)
