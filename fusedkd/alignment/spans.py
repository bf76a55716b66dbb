"""Which tokens of one tokenizer cover the same bytes as which of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def align(student_offsets: Tensor, teacher_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest pieces of text that both tokenizers cut out, as ranges of tokens.

    A piece begins and ends where a token of either side does. Tokens of no bytes (BOS, a prefix)
    are in no range unless they lie within one. Bytes between two tokens belong to the second.

    Args:
        student_offsets, teacher_offsets: (L, 2) bytes of each token (:func:`byte_offsets`), in the
            order of the text; tokens may overlap. A token of (-1, -1) belongs to no text that both
            have, such as a chat template of its own, and no range goes over it.

    Returns:
        student_spans, teacher_spans: (M, 2) int64 on the CPU: first token and the one after the
        last, of as many ranges on both sides, which cover the same bytes.

    Raises:
        ValueError, TypeError: of another shape, no whole numbers, or not in the order of the text.
    """
    student = _cuts("student_offsets", student_offsets)
    teacher = _cuts("teacher_offsets", teacher_offsets)
    both = np.intersect1d(student.cuts, teacher.cuts, assume_unique=True)
    if len(both) < 2:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
    a, b, whole = _between(student, both)
    c, d, too = _between(teacher, both)
    kept = whole & too
    return _tensor(student, a[kept], b[kept]), _tensor(teacher, c[kept], d[kept])


class _Cuts(NamedTuple):
    """Of one side, tokens without bytes left out."""

    cuts: np.ndarray  # bytes at which it can be cut, sorted
    ends: np.ndarray  # (l,) of each token, no less than the one before
    opens: np.ndarray  # (l,) where its stretch of text begins, if it is the first there; else -1
    stretch: np.ndarray  # (l,) counts these
    tokens: np.ndarray  # (l,) their places in the sequence


def _cuts(name: str, offsets: Tensor) -> _Cuts:
    array = _checked(name, offsets)
    outside = array[:, 0] < 0
    tokens = np.flatnonzero(array[:, 1] > array[:, 0])
    start, end = array[tokens].T
    stretch = np.cumsum(outside)[tokens]
    first = np.ones(len(tokens), bool)
    first[1:] = stretch[1:] != stretch[:-1]
    ends = np.maximum.accumulate(end)
    # a token that begins before this one's end shares bytes with it: no cut between them
    later = np.full(len(tokens), np.iinfo(np.int64).max)
    later[:-1] = np.minimum.accumulate(start[::-1])[::-1][1:]
    # two sorted runs; np.unique, which hashes, takes 2 s for a million (2026-11-28, busy machine)
    cuts = np.sort(np.concatenate([start[first], ends[ends <= later]]), kind="stable")
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    return _Cuts(cuts, ends, np.where(first, start, -1), stretch, tokens)


def _between(side: _Cuts, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first token after each cut, the one after the last before the next, and whether there are
    any, which cover all that is between."""
    after = np.searchsorted(side.ends, cuts, side="right")
    a, b = after[:-1], after[1:]
    first, last = np.minimum(a, len(side.tokens) - 1), np.maximum(b - 1, 0)
    whole = (a < b) & (side.stretch[first] == side.stretch[last])
    whole &= side.ends[last] == cuts[1:]  # a stretch may begin after bytes that no token covers
    opens = side.opens[first]
    return a, b, whole & ((opens < 0) | (opens == cuts[:-1]))


def _tensor(side: _Cuts, a: np.ndarray, b: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([side.tokens[a], side.tokens[b - 1] + 1], 1))


def _checked(name: str, offsets: Tensor) -> np.ndarray:
    array = offsets.detach().cpu().numpy() if isinstance(offsets, Tensor) else np.asarray(offsets)
    if array.size == 0:
        return np.zeros((0, 2), np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} is {array.dtype}: expected whole numbers of bytes.")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}: expected (L, 2), first byte and the one after "
            "the last of each token of one text."
        )
    array = array.astype(np.int64)
    inside = array[array[:, 0] >= 0]
    backwards = (inside[:, 1] < inside[:, 0]).any() or (np.diff(inside[:, 1]) < 0).any()
    if backwards or ((array < 0).any(1) & (array != -1).any(1)).any():
        raise ValueError(
            f"{name}: expected bytes in the order of the text, none ending before it begins or "
            "before an earlier one ends, or (-1, -1)."
        )
    return array


def pad_spans(spans: Sequence[Tensor]) -> Tensor:
    """Spans of several sequences, (M_i, 2) each, as one (B, M, 2), filled up with -1."""
    found = torch.full((len(spans), max(map(len, spans), default=0), 2), -1)
    for row, span in zip(found, spans, strict=True):
        row[: len(span)] = span
    return found
