"""Numbers as small integers: gaps as codes of 8 bits, odds and entropies as levels of 16; and lists
of different lengths as matrices. What they mean: :mod:`fusedkd.cache.layout`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEVELS = 255  # of gaps, beside 0
RANGE_STEPS = 4  # per nat
LARGEST_GAP = 255 / RANGE_STEPS
ODDS_FROM, ODDS_SPAN = -16.0, 40.0
LEVELS_16 = 65534
SPECIAL_16 = 65535
_SQUARES = ((np.arange(256) / LEVELS) ** 2).astype(np.float32)


def gap_codes(log_probs: Array, there: Array) -> tuple[Array, Array]:
    """(codes (L, K), ranges (L,)) of the gaps below the first entry.

    Raises:
        ValueError: the entries do not descend, or by more than the codes reach.
    """
    with np.errstate(invalid="ignore"):  # -inf less -inf, where nothing is
        gaps = np.where(there, log_probs[:, :1] - log_probs, 0)
    largest = gaps.max(1, initial=0)
    if gaps.min(initial=0) < 0 or not largest.max(initial=0) <= LARGEST_GAP:
        raise ValueError(f"entries must descend, by at most {LARGEST_GAP} nats in all.")
    ranges = np.ceil(largest * RANGE_STEPS).astype(np.uint8)
    scale = LEVELS / np.sqrt(np.maximum(ranges, 1)[:, None] / RANGE_STEPS)
    return np.rint(np.sqrt(gaps) * scale).astype(np.uint8), ranges


def gap_log_probs(codes: Array, there: Array, ranges: Array, odds: Array, t: float) -> Array:
    """(L, K) at temperature ``t``, -inf for nothing."""
    steps = ranges.astype(np.float32) / np.float32(-RANGE_STEPS * t)
    heads = np.where(there, _SQUARES[codes] * steps[:, None], -np.inf)
    sums = np.exp(heads).sum(1)
    mass = -np.logaddexp(np.float32(0), -odds)  # log sigmoid
    shift = mass - np.log(np.where(sums > 0, sums, 1))  # 0: a token without entries
    return heads + shift[:, None]


def closed(odds: Array) -> Array:
    """A tail too small to write down is none."""
    return np.where(odds > ODDS_FROM + ODDS_SPAN, np.nan, odds)


def levels(numbers: Array, start: float, span: float) -> bytes:
    """16 bits per number; NaN is the special one."""
    scaled = np.rint((np.clip(numbers, start, start + span) - start) * (LEVELS_16 / span))
    return np.where(np.isnan(scaled), SPECIAL_16, scaled).astype("<u2").tobytes()


def values(raw: Array, start: float, span: float, special: float) -> Array:
    """The numbers that :func:`levels` wrote, in fp32."""
    found = raw.view("<u2")
    numbers = found * np.float32(span / LEVELS_16) + np.float32(start)
    return np.where(found == SPECIAL_16, np.float32(special), numbers)


def filled(counts: Array) -> Array:
    """(L, K) true where a token has an entry."""
    there: Array = np.arange(counts.max(initial=0)) < counts[:, None]
    return there


def spread(flat: Array, there: Array, nothing: float) -> Array:
    """(L, K) with ``flat`` where ``there`` is true, in order."""
    if flat.size == there.size:
        return flat.reshape(there.shape)
    wide = np.full(there.shape, nothing, flat.dtype)
    wide[there] = flat
    return wide


def check_codes(codes: Array, there: Array) -> None:
    """
    Raises:
        ValueError: they are not what :func:`gap_codes` makes.
    """
    if codes[:, :1].any() or ((codes[:, 1:] < codes[:, :-1]) & there[:, 1:]).any():
        raise ValueError("the codes of a token do not ascend from 0.")


def check_distinct(ids: Array, ascending: bool) -> None:
    """
    Raises:
        ValueError: a token has an id twice, or ``ascending`` and they do not.
    """
    ordered = ids if ascending else np.sort(ids.astype(np.int32), axis=1)
    twice = (ordered[:, 1:] <= ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        raise ValueError(f"token {int(twice.any(1).argmax())} has an id twice, or out of order.")
