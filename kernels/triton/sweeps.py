"""The row kernels: statistics -> [middle sweep] -> gradient.

A row's columns are cut into a main part, whole tiles that start on a 16-byte boundary and need no
mask, and the edges: the few columns before that boundary and what is left at the end, walked
together as masked tiles. So every vocabulary, odd ones too, moves 16 bytes per load.

A tile is (lanes, width): the ``width`` entries of a lane are one 16-byte access of one thread.
Every lane keeps its own running statistics, a monoid (``_move`` shifts its maxima, then addition
merges), so the main loop has no reduction across threads, no barrier and no shared memory. Lanes,
and the pieces of a row that several programs read, are merged by the same two steps. A maximum
starts at the lowest finite number, not at -inf: an all-masked tile then needs no special case.

Optimism: the statistics sweep forms p * gap without looking for masked entries. Where there is one
(0 * inf), or an overflow, the sum comes out NaN or infinite, and that row alone goes through the
middle sweep, in which the divergence's own function settles every edge. Others pay nothing for it.

Everything known at compile time is in ``plan`` (config.Plan); no number of the loss is. A column is
int32 within its row, a row is an int64 pointer. ``numbers`` is what :func:`_numbers` makes.
"""

import triton
import triton.language as tl

from .numerics import LOG2E, lowest, rounded, transform

INFINITY = tl.constexpr(float("inf"))
NO_COLUMN = tl.constexpr(0x7FFFFFFF)

# --------------------------------------------------------------------------------------------------
# the walk over a row


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
def _load(pointers, mask, scale_cap, acc: tl.constexpr, bent: tl.constexpr, policy: tl.constexpr):
    """(logits after the transform, d of that / d raw); -inf where the mask is off."""
    scale, cap = scale_cap
    if mask is None:
        raw = tl.load(pointers, eviction_policy=policy).to(acc)
    else:
        raw = tl.load(pointers, mask=mask, other=0.0).to(acc)
    if bent:
        z, slope = transform(raw, scale, cap)
    else:
        z, slope = raw, scale
    if mask is not None:
        z = tl.where(mask, z, -INFINITY)
    return z, slope


# --------------------------------------------------------------------------------------------------
# statistics: a tuple, everything in log2 units with a = (z - top) log2(e) / T
#   top_s, top_t   largest logit                 one           sum e^(s - top_s), T = 1
#   sum_s, sum_t   sum 2^a                       mean          sum s / V
#   gap_t, gap_s   sum 2^a_t (a_t - a_s), and sum 2^a_s (a_s - a_t)
#   own_t, own_s   sum 2^a a (entropies)         at_s, at_t    first column that holds the maximum


@triton.jit
def _empty(plan: tl.constexpr):
    zero = tl.full([plan.lanes], 0, plan.acc)
    top, at = zero + lowest(plan.acc), tl.full([plan.lanes], 0, tl.int32)
    return top, top, zero, zero, zero, zero, zero, zero, zero, zero, at, at


@triton.jit
def _shifted(total, factor, shift, weight):
    """sum 2^(a + d) (g + shift) from total = sum 2^a g, weight = sum 2^a. A NaN total stays NaN."""
    return tl.where(factor == 0, total * 0.0, factor * (total + shift * weight))


@triton.jit
def _move(state, new_s, new_t, k_s, k_t):
    """The same statistics relative to other, not smaller, maxima."""
    top_s, top_t, sum_s, sum_t, one, mean, gap_t, gap_s, own_t, own_s, at_s, at_t = state
    by_s, by_t = (top_s - new_s) * k_s, (top_t - new_t) * k_t
    keep_s, keep_t = tl.exp2(by_s), tl.exp2(by_t)
    gap_t = _shifted(gap_t, keep_t, by_t - by_s, sum_t)
    gap_s = _shifted(gap_s, keep_s, by_s - by_t, sum_s)
    own_t = _shifted(own_t, keep_t, by_t, sum_t)
    own_s = _shifted(own_s, keep_s, by_s, sum_s)
    one = one * tl.exp2((top_s - new_s) * LOG2E)
    sum_s, sum_t = sum_s * keep_s, sum_t * keep_t
    return new_s, new_t, sum_s, sum_t, one, mean, gap_t, gap_s, own_t, own_s, at_s, at_t


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
def _observe(state, z_s, z_t, columns, mask, numbers, plan: tl.constexpr):
    """Take a tile into the statistics."""
    k_s, k_t, share, power = numbers
    old_s, old_t = state[0], state[1]
    here_s, here_t = tl.max(z_s, axis=1), tl.max(z_t, axis=1)
    top_s, top_t = tl.maximum(old_s, here_s), tl.maximum(old_t, here_t)
    state = _move(state, top_s, top_t, k_s, k_t)
    top_s, top_t, sum_s, sum_t, one, mean, gap_t, gap_s, own_t, own_s, at_s, at_t = state
    below = z_s - top_s[:, None]
    a_s, a_t = below * k_s, (z_t - top_t[:, None]) * k_t
    e_s, e_t = tl.exp2(a_s), tl.exp2(a_t)
    sum_s += tl.sum(e_s, axis=1)
    sum_t += tl.sum(e_t, axis=1)
    if plan.ce:
        one += tl.sum(_at_one(e_s, below, power), axis=1)
        mean += _total(z_s * share, mask)
    if plan.forward:
        gap_t += _total(e_t * (a_t - a_s), mask)
    if plan.reverse:
        gap_s += _total(e_s * (a_s - a_t), mask)
    if plan.metrics:
        own_t += tl.sum(tl.where(e_t == 0, 0.0, e_t * a_t), axis=1)
        own_s += tl.sum(tl.where(e_s == 0, 0.0, e_s * a_s), axis=1)
        at_s = _first(z_s, here_s, old_s, at_s, columns)
        at_t = _first(z_t, here_t, old_t, at_t, columns)
    return top_s, top_t, sum_s, sum_t, one, mean, gap_t, gap_s, own_t, own_s, at_s, at_t


@triton.jit
def _add(pieces):
    """Their sum in fp64: once per row it costs nothing, and the normalisers are everybody's."""
    return tl.sum(pieces.to(tl.float64), axis=0)


@triton.jit
def _merge(state, k_s, k_t):
    """Statistics of (pieces,) -> of the whole, the sums among them in fp64."""
    top_s, top_t = tl.max(state[0], axis=0), tl.max(state[1], axis=0)
    at_s = tl.min(tl.where(state[0] == top_s, state[10], NO_COLUMN), axis=0)
    at_t = tl.min(tl.where(state[1] == top_t, state[11], NO_COLUMN), axis=0)
    _, _, sum_s, sum_t, one, mean, gap_t, gap_s, own_t, own_s, _, _ = _move(
        state, top_s, top_t, k_s, k_t
    )
    sum_s, sum_t, one, mean = _add(sum_s), _add(sum_t), _add(one), _add(mean)
    gap_t, gap_s, own_t, own_s = _add(gap_t), _add(gap_s), _add(own_t), _add(own_s)
    return top_s, top_t, sum_s, sum_t, one, mean, gap_t, gap_s, own_t, own_s, at_s, at_t


# --------------------------------------------------------------------------------------------------
# sweeps over tiles [first, last) and the first ``edges`` of the edge columns (all or none)


@triton.jit
def statistics(row, shape, span, bend, numbers, plan: tl.constexpr):
    student, teacher = row
    first, last, edges = span
    bend_s, bend_t = bend
    state = _empty(plan)
    for tile in tl.range(first, last, num_stages=plan.stages):
        at = shape[0] + tile * (plan.lanes * plan.width) + _offsets(plan)
        at_s, at_t = _tile(student, shape[0], tile, plan), _tile(teacher, shape[0], tile, plan)
        z_s, _ = _load(at_s, None, bend_s, plan.acc, plan.bent_s, "evict_last")
        z_t, _ = _load(at_t, None, bend_t, plan.acc, plan.bent_t, "evict_last")
        state = _observe(state, z_s, z_t, at, None, numbers, plan)
    for start in range(0, edges, plan.lanes * plan.width):
        at, mask = _edge_columns(start, shape, plan)
        z_s, _ = _load(student + at, mask, bend_s, plan.acc, plan.bent_s, "")
        z_t, _ = _load(teacher + at, mask, bend_t, plan.acc, plan.bent_t, "")
        state = _observe(state, z_s, z_t, at, mask, numbers, plan)
    return _merge(state, numbers[0], numbers[1])


@triton.jit
def _log_prob(z, below, inverse_t, log_sum, plan: tl.constexpr):
    """log p. With T < 1 a finite mask (finfo.min) overflows; only a true -inf may mean p = 0."""
    lp = below * inverse_t - log_sum
    if plan.closed:  # the KLs are the ones that tell a huge gap from an infinite one
        lp = tl.where((lp == -INFINITY) & (z != -INFINITY), lowest(plan.acc), lp)
    return lp


@triton.jit
def _pair(z_s, z_t, norm, plan: tl.constexpr):
    """(lp, lq, lp - lq, p, q, what sums to the normaliser, s - top_s).

    Closed forms take p = 2^a / sum: next to the peak it is nearly exact. The others cancel p
    against log p, so there p is exp(log p), and the gap is made of the logits: its rounding error
    is in proportion to itself, not to log p, which is what counts at T = 1000.
    """
    top_s, top_t, k_s, k_t, t_s, t_t, log_s, log_t, over_s, over_t, log_ratio = norm
    below_s, below_t = z_s - top_s, z_t - top_t
    lq = _log_prob(z_s, below_s, t_s, log_s, plan)
    lp = _log_prob(z_t, below_t, t_t, log_t, plan)
    if plan.closed:
        e_s, e_t = tl.exp2(below_s * k_s), tl.exp2(below_t * k_t)
        return lp, lq, lp - lq, e_t * over_t, e_s * over_s, e_s, below_s
    else:
        q = tl.exp(lq)
        gap = (below_t * t_t - below_s * t_s) + log_ratio
        return lp, lq, gap, tl.exp(lp), q, q, below_s


@triton.jit
def middle(row, shape, span, bend, norm, a_b, DIVERGENCE: tl.constexpr, plan: tl.constexpr):
    """(value, sum of grad) of a divergence that the statistics do not give, or not at its edges."""
    student, teacher = row
    first, last, edges = span
    value = tl.full([plan.lanes], 0, plan.acc)
    slope = value
    for step in tl.range(first, last, num_stages=plan.stages):
        tile = last - 1 - (step - first)  # backwards: what was read last is still in L2
        at_s, at_t = _tile(student, shape[0], tile, plan), _tile(teacher, shape[0], tile, plan)
        z_s, _ = _load(at_s, None, bend[0], plan.acc, plan.bent_s, "evict_last")
        z_t, _ = _load(at_t, None, bend[1], plan.acc, plan.bent_t, "evict_last")
        lp, lq, gap, p, q, _, _ = _pair(z_s, z_t, norm, plan)
        v, g = DIVERGENCE(lp, lq, gap, p, q, a_b[0], a_b[1])
        value += tl.sum(v, axis=1)
        slope += tl.sum(g, axis=1)
    for start in range(0, edges, plan.lanes * plan.width):
        at, mask = _edge_columns(start, shape, plan)
        z_s, _ = _load(student + at, mask, bend[0], plan.acc, plan.bent_s, "")
        z_t, _ = _load(teacher + at, mask, bend[1], plan.acc, plan.bent_t, "")
        lp, lq, gap, p, q, _, _ = _pair(z_s, z_t, norm, plan)
        v, g = DIVERGENCE(lp, lq, gap, p, q, a_b[0], a_b[1])
        value += _total(v, mask)
        slope += _total(g, mask)
    return _add(value).to(plan.acc), _add(slope).to(plan.acc)


@triton.jit
def _slope(
    z_s, z_t, bent, at, start, norm, pull, a_b, DIVERGENCE: tl.constexpr, plan: tl.constexpr
):
    """The gradient of a tile; the label is looked for only within a tile of ``start``."""
    sum_grad, kd, one, smooth, hot, label, power = pull
    lp, lq, gap, p, q, powered, below = _pair(z_s, z_t, norm, plan)
    _, g = DIVERGENCE(lp, lq, gap, p, q, a_b[0], a_b[1])
    g = (g - q * sum_grad) * kd
    if kd == 0:  # left out, so that a NaN teacher has no say (uniform)
        g = tl.zeros_like(g)
    if plan.ce:
        g += _at_one(powered, below, power) * one - smooth
        if (label >= start) & (label - start < plan.lanes * plan.width):  # uniform
            g = tl.where(at == label, g - hot, g)
    if plan.bent_s:
        g *= bent
    return tl.where(z_s == -INFINITY, 0.0, g)


@triton.jit
def gradient(
    row, grad, shape, span, bend, norm, pull, a_b, DIVERGENCE: tl.constexpr, plan: tl.constexpr
):
    student, teacher = row
    first, last, edges = span
    size: tl.constexpr = plan.lanes * plan.width
    for step in tl.range(first, last, num_stages=plan.stages):
        tile = last - 1 - (step - first) if plan.closed else step  # against the sweep before
        start = shape[0] + tile * size
        at_s, at_t = _tile(student, shape[0], tile, plan), _tile(teacher, shape[0], tile, plan)
        z_s, bent = _load(at_s, None, bend[0], plan.acc, plan.bent_s, "evict_first")
        z_t, _ = _load(at_t, None, bend[1], plan.acc, plan.bent_t, "evict_first")
        at = start + _offsets(plan)
        g = _slope(z_s, z_t, bent, at, start, norm, pull, a_b, DIVERGENCE, plan)
        out = _tile(grad, shape[0], tile, plan)
        tl.store(out, rounded(g, grad.dtype.element_ty), eviction_policy="evict_first")
    for begin in range(0, edges, size):
        at, mask = _edge_columns(begin, shape, plan)
        z_s, bent = _load(student + at, mask, bend[0], plan.acc, plan.bent_s, "")
        z_t, _ = _load(teacher + at, mask, bend[1], plan.acc, plan.bent_t, "")
        g = _slope(z_s, z_t, bent, at, pull[5], norm, pull, a_b, DIVERGENCE, plan)
        tl.store(grad + at, rounded(g, grad.dtype.element_ty), mask=mask)


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
