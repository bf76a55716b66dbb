"""The walk over a row: tiles, and one sweep for all that is done with them.

A row's columns are cut into whole tiles that start on a 16-byte boundary and need no mask, one more
tile of the whole 16-byte lines behind them (its mask is per line, so its accesses are 16 bytes
too), and the edges: the few columns before that boundary and behind the last line. So every
vocabulary, odd ones too, moves 16 bytes per load.

A tile is (unroll, lanes, width): a lane is a thread, and the ``width`` entries of each of its
``unroll`` lines are one access. What a sweep carries is (lanes,), so its loop has no reduction
across threads, no barrier and no shared memory.

A column is int32 within its row, a row is an int64 pointer. Everything known at compile time is in
``plan`` (config.Plan).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import transform

INFINITY = tl.constexpr(float("inf"))
NO_COLUMN = tl.constexpr(0x7FFFFFFF)


class Shape(NamedTuple):
    """How a row is cut."""

    head: Any  # columns before a 16-byte boundary
    tiles: Any  # whole ones
    lines: Any  # columns in whole lines behind those
    end: Any  # where these end
    columns: Any


class Span(NamedTuple):
    """What one program walks of a row."""

    first: Any  # tiles
    last: Any
    lines: Any  # 0, or 1 if the lines behind the tiles are here, and there are any
    edges: Any  # 0, or how many if they are here


class Transform(NamedTuple):
    """From raw logits to those that count; see numerics.transform."""

    scale: Any
    cap: Any


class Sides(NamedTuple):
    """Where a row starts, and what its logits go through."""

    student: Any
    teacher: Any
    of_student: Transform
    of_teacher: Transform


class Tile(NamedTuple):
    """Entries (unroll, lanes, width), or one edge per lane (1, lanes, 1)."""

    student: Any  # logits after the transform, -inf where there is no column
    teacher: Any
    slope: Any  # d student / d raw
    columns: Any  # None, or an edge's
    mask: Any  # None: there are all
    place: Any  # (lanes,): which tile, or -1 - column of an edge


@triton.jit
def row_start(base, n, length, stride_b, stride_t):
    """Where row n = b * length + t starts."""
    b = n // length  # both int32: a 64-bit division is a call
    return base + b.to(tl.int64) * stride_b + (n - b * length).to(tl.int64) * stride_t


@triton.jit
def cut(base, columns, plan: tl.constexpr):
    """The shape of a row; ``base`` decides where its lines are."""
    size: tl.constexpr = plan.unroll * plan.lanes * plan.width
    head = 0
    if plan.aligned:
        line: tl.constexpr = 16 // plan.item
        past = ((base.to(tl.int64) // plan.item) % line).to(tl.int32)
        head = tl.minimum((line - past) % line, columns)
    tiles = (columns - head) // size
    lines = (columns - head - tiles * size) // plan.width * plan.width
    return Shape(head, tiles, lines, head + tiles * size + lines, columns)


@triton.jit
def whole(shape):
    """The span of a program that has the row to itself."""
    edges = shape.columns - shape.end + shape.head
    return Span(0, shape.tiles, tl.minimum(shape.lines, 1), edges)


@triton.jit
def share(shape, piece, plan: tl.constexpr):
    """The span of one of ``plan.pieces``; what is not in whole tiles belongs to the last one."""
    each = tl.cdiv(shape.tiles, plan.pieces)
    first = tl.minimum(piece * each, shape.tiles)
    rest, final = whole(shape), piece == plan.pieces - 1
    lines, edges = tl.where(final, rest.lines, 0), tl.where(final, rest.edges, 0)
    return Span(first, tl.minimum(first + each, shape.tiles), lines, edges)


@triton.jit
def within(column, span, shape, plan: tl.constexpr):
    """Whether a column is the span's."""
    size: tl.constexpr = plan.unroll * plan.lanes * plan.width
    at = column - shape.head
    inside = (at >= span.first * size) & (at < span.last * size)
    behind = (at >= shape.tiles * size) & (column < shape.end) & (span.lines > 0)
    edge = ((at < 0) | (column >= shape.end)) & (span.edges > 0)
    return inside | behind | edge


# --------------------------------------------------------------------------------------------------
# tiles


@triton.jit
def offsets(plan: tl.constexpr):
    """(unroll, lanes, width) columns of a tile."""
    line = tl.arange(0, plan.unroll)[:, None, None] * plan.lanes
    line += tl.arange(0, plan.lanes)[None, :, None]
    return line * plan.width + tl.arange(0, plan.width)[None, None, :]


@triton.jit
def _start(base, shape, tile, unroll: tl.constexpr, plan: tl.constexpr):
    """Of a tile. The hint makes the accesses 16 bytes; config.aligned checked it."""
    start = base + shape.head
    if plan.aligned:
        start = tl.multiple_of(start, 16)
    return start + tile * (unroll * plan.lanes * plan.width)


@triton.jit
def _spread(start, width: tl.constexpr, unroll: tl.constexpr, plan: tl.constexpr):
    """Pointers to a tile; what differs by a constant is added last, as an address's offset."""
    lane = tl.arange(0, plan.lanes)[None, :, None] * width + tl.arange(0, width)[None, None, :]
    return (start + lane) + tl.arange(0, unroll)[:, None, None] * (plan.lanes * width)


@triton.jit
def pointers(base, shape, tile, unroll: tl.constexpr, plan: tl.constexpr):
    return _spread(_start(base, shape, tile, unroll, plan), plan.width, unroll, plan)


@triton.jit
def lines_behind(shape, k, unroll: tl.constexpr, plan: tl.constexpr):
    """Which lines there are of the k-th tile behind the whole ones, (unroll, lanes, 1)."""
    line = (k * unroll + tl.arange(0, unroll)[:, None, None]) * plan.lanes
    line += tl.arange(0, plan.lanes)[None, :, None]
    return line * plan.width < shape.lines


@triton.jit
def edge_columns(shape, edges, plan: tl.constexpr):
    """(1, lanes, 1) columns, and which of them there are."""
    edge = tl.arange(0, plan.lanes)[None, :, None]
    return tl.where(edge < shape.head, edge, edge - shape.head + shape.end), edge < edges


@triton.jit
def _lines(base, shape, tile, mask, policy: tl.constexpr, unroll: tl.constexpr, plan: tl.constexpr):
    """The raw logits of a tile, 0 where the mask is off."""
    start = _start(base, shape, tile, unroll, plan)
    pairs: tl.constexpr = plan.aligned and base.dtype.element_ty == tl.bfloat16
    if pairs:  # two to a register: a shift and an AND instead of three instructions
        half: tl.constexpr = plan.width // 2
        at = tl.multiple_of(start.to(tl.pointer_type(tl.int32), bitcast=True), 16)
        at = _spread(at, half, unroll, plan)
    else:
        at = _spread(start, plan.width, unroll, plan)
    if mask is None:  # noqa: SIM108 - one branch is compiled
        raw = tl.load(at, eviction_policy=policy)
    else:
        raw = tl.load(at, mask=mask, other=0)
    if pairs:
        low = (raw << 16).to(tl.float32, bitcast=True)
        high = (raw & -65536).to(tl.float32, bitcast=True)
        raw = tl.reshape(tl.join(low, high), [unroll, plan.lanes, plan.width])
    return raw.to(plan.acc)


@triton.jit
def through(raw, mask, by, transformed: tl.constexpr):
    """(logits after the transform, d of that / d raw); -inf where the mask is off."""
    z, slope = raw, by.scale
    if transformed:
        z, slope = transform(raw, by.scale, by.cap)
    if mask is not None:
        z = tl.where(mask, z, -INFINITY)
    return z, slope


@triton.jit
def _tile(sides, shape, tile, mask, policy: tl.constexpr, unroll: tl.constexpr, plan: tl.constexpr):
    raw = _lines(sides.student, shape, tile, mask, policy, unroll, plan)
    student, slope = through(raw, mask, sides.of_student, plan.transformed_s)
    teacher = student
    if plan.teacher:
        raw = _lines(sides.teacher, shape, tile, mask, policy, unroll, plan)
        teacher, _ = through(raw, mask, sides.of_teacher, plan.transformed_t)
    return student, teacher, slope


@triton.jit
def _columns_tile(sides, columns, mask, plan: tl.constexpr):
    """One column per lane, (1, lanes, 1)."""
    raw = tl.load(sides.student + columns, mask=mask, other=0.0).to(plan.acc)
    student, slope = through(raw, mask, sides.of_student, plan.transformed_s)
    teacher = student
    if plan.teacher:
        raw = tl.load(sides.teacher + columns, mask=mask, other=0.0).to(plan.acc)
        teacher, _ = through(raw, mask, sides.of_teacher, plan.transformed_t)
    return Tile(student, teacher, slope, columns, mask, -1 - tl.reshape(columns, [plan.lanes]))


@triton.jit
def sweep(
    STEP: tl.constexpr, state, sides, shape, span, context,
    backwards, policy: tl.constexpr, unroll: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """``state = STEP(state, tile, context, plan)`` over a span. Backwards, what was read last comes
    first: it is still in L2. ``unroll`` divides the plan's, for steps of many registers."""
    times: tl.constexpr = plan.unroll // unroll
    first, last = span.first * times, span.last * times
    for step in tl.range(first, last, num_stages=plan.stages):
        tile = last - 1 - (step - first) if backwards else step
        student, teacher, slope = _tile(sides, shape, tile, None, policy, unroll, plan)
        state = STEP(state, Tile(student, teacher, slope, None, None, tile), context, plan)
    for k in range(span.lines * times):
        tile, mask = shape.tiles * times + k, lines_behind(shape, k, unroll, plan)
        student, teacher, slope = _tile(sides, shape, tile, mask, "", unroll, plan)
        state = STEP(state, Tile(student, teacher, slope, None, mask, tile), context, plan)
    for _ in range(tl.minimum(span.edges, 1)):
        columns, mask = edge_columns(shape, span.edges, plan)
        state = STEP(state, _columns_tile(sides, columns, mask, plan), context, plan)
    return state


@triton.jit
def sweep_columns(
    STEP: tl.constexpr, state, sides, shape, span, context, plan: tl.constexpr
):  # fmt: skip
    """The same column by column: little code, for rows that hardly ever come."""
    size: tl.constexpr = plan.unroll * plan.lanes * plan.width
    lane = tl.arange(0, plan.lanes)[None, :, None]
    last = tl.where(span.edges + span.lines > 0, shape.columns - shape.head, span.last * size)
    for start in range(span.first * size, last, plan.lanes):
        columns = shape.head + start + lane
        tile = _columns_tile(sides, columns, columns - shape.head < last, plan)
        state = STEP(state, tile, context, plan)
    if span.edges > 0:
        state = STEP(state, _columns_tile(sides, lane, lane < shape.head, plan), context, plan)
    return state


# --------------------------------------------------------------------------------------------------
# writing


@triton.jit
def zeros(grad, shape, span, padding, columns, plan: tl.constexpr):
    """0 over a span; ``padding`` is where the columns begin that are beyond the vocabulary."""
    unroll: tl.constexpr = plan.unroll
    nothing = tl.full([unroll, plan.lanes, plan.width], 0, grad.dtype.element_ty)
    for tile in range(span.first, span.last):
        tl.store(pointers(grad, shape, tile, unroll, plan), nothing)
    for k in range(span.lines):
        at = pointers(grad, shape, shape.tiles + k, unroll, plan)
        tl.store(at, nothing, mask=lines_behind(shape, k, unroll, plan))
    if span.edges > 0:
        at, mask = edge_columns(shape, span.edges, plan)
        tl.store(grad + at, tl.zeros_like(at).to(grad.dtype.element_ty), mask=mask)
    for start in range(padding, columns, unroll * plan.lanes * plan.width):
        at = start + offsets(plan)
        tl.store(grad + at, nothing, mask=at < columns)
