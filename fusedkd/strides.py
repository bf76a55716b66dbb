"""Tensors of any strides as rows, and whose memory is whose."""

from __future__ import annotations

import itertools

from torch import Tensor


def row_shapes(x: Tensor) -> list[tuple[int, int]]:
    """The (B, T) with which (..., C) can be viewed as rows."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return []
    leading, strides = x.shape[:-1], x.stride()[:-1]
    contiguous = x.is_contiguous()  # nearly always, and the checks take a while
    shapes = []
    if contiguous or _merge(leading, strides):
        shapes.append((1, leading.numel()))
    if contiguous or _merge(leading[:-1], strides[:-1]):
        shapes.append((leading[:-1].numel(), leading[-1] if leading else 1))
    return shapes


def _merge(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether dimensions can be stepped over as one: each stride is the next one's extent."""
    steps = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(
        stride == inner * extent for (_, stride), (extent, inner) in itertools.pairwise(steps)
    )


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as (B, T, C), without a copy."""
    return x.view(*row_shapes(x)[0], x.shape[-1])


def check_in_place(student: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raise unless the gradient may be written over ``student`` (..., V): every token has memory of
    its own, and nothing else that the call reads lies there.

    Raises:
        ValueError: naming what is in the way, and the remedy.
    """
    where = f"inplace=True, but the student's logits (shape {tuple(student.shape)}, strides "
    where += f"{student.stride()})"
    if not row_shapes(student) or (student.shape[-1] == 1 and student.stride(-1) != 1):
        why = "do not hold one contiguous row per token"
    elif _rows_overlap(student):
        why = "have tokens that share memory"
    else:
        shared = [name for name, x in others.items() if x is not None and _overlap(student, x)]
        if not shared:
            return
        why = f"share memory with {shared[0]}, which is read while they are written over"
    raise ValueError(
        f"{where} {why}: expected memory of their own. .clone() them, or leave inplace=False."
    )


def _rows_overlap(x: Tensor) -> bool:
    """Whether two of the rows of (..., C) may share an entry: from the innermost dimension on, each
    has to step over all that lies within."""
    extent = x.shape[-1]
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size > 1:
            if stride < extent:
                return x.numel() > 0
            extent += stride * (size - 1)
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share an entry, as far as their extents tell; rows of one step that take
    turns, as halves of the columns do, are told apart."""
    if (
        a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
        or not a.numel() * b.numel()
    ):
        return False
    (start_a, end_a), (start_b, end_b) = _extent(a), _extent(b)
    if end_a <= start_b or end_b <= start_a:
        return False
    step_a, step_b = _step(a), _step(b)
    if step_a is None or step_a != step_b:
        return True
    past = (start_b - start_a) % step_a
    return past < a.shape[-1] * a.itemsize or past > step_a - b.shape[-1] * b.itemsize


def _extent(x: Tensor) -> tuple[int, int]:
    """The first byte and the one after the last."""
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def _step(x: Tensor) -> int | None:
    """Bytes from row to row of (..., C), if that is one number."""
    shapes = row_shapes(x)
    if not shapes or shapes[0][0] != 1:
        return None
    strides = [s for s, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return strides[-1] * x.itemsize if strides else None
