"""How the teacher's answers for one sequence become bytes, and come back.

Everything of a sequence of L tokens is kept in byte strings, one per column; "packed" is
:mod:`fusedkd.cache.packing`, integers of 16 bits are little-endian, and per-token things are in the
order of the tokens. V is the true vocabulary, k the policy's.

Policy ``top``: the most probable entries of each token, in descending order.

=========== ==========================================================================
``counts``  packed, bits_for(k): how many entries a token keeps; empty where all keep k
``ids``     packed, bits_for(V - 1): their ids, token after token
``codes``   how far they lie below the token's most probable entry: 0 to 255 each
``ranges``  8 bits per token: r
``odds``    16 bits per declared temperature and token: the head against the tail
``entropy`` 16 bits per token: of the whole distribution at T = 1
=========== ==========================================================================

An entry with code c lies ``r / 4 * (c / 255) ** 2`` nats below the first, at T = 1: the step is
finest where the probability is largest, and the error at most ``sqrt(gap * r / 4) / 255 + r / 4 /
255**2``. Entries more than 63.75 nats below the first are not kept: they belong to the tail.

``odds`` holds x = log(head / tail) at that temperature, head the mass of the entries kept and tail
all other mass, computed from the full distribution: round((x + 16) / 40 * 65534), so to within
3.1e-4; 65535 is a tail of less than e^-24, taken for 0. It serves as the tail mass and as the
log-normaliser: at T the entries are ``softmax(-gap / T) * sigmoid(x_T)``, so head and tail always
sum to 1, and no error in the gaps can move mass between them.

The codes of a token never decrease. Where every token keeps k of them (``counts`` is empty) and it
is shorter, so from k = 37 on, a token's codes are k + 255 bits: the bits number ``c[i] + i`` are
set, i = 0 to k - 1, and the others are not; token after token, the first bit of a byte being the
least significant. Otherwise each code is a byte.

``entropy`` is round(H / log V * 65534) with 65535 for unknown.

Policy ``sample``: n = k ids drawn from the distribution at the one declared temperature; how is not
part of the format (summary.py).

=========== ==========================================================================
``ids``     packed, bits_for(V - 1): the different ids of each token, ascending
``draws``   n bits per token, one for each draw in the order of the ids: whether its id is another
            than that of the draw before; the first of a token's always is
``entropy`` as above
=========== ==========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedkd.cache.errors import CacheError
from fusedkd.cache.packing import (
    bits_for,
    pack,
    pack_runs,
    pack_stairs,
    unpack,
    unpack_runs,
    unpack_stairs,
)
from fusedkd.cache.policy import Policy

__all__ = ["Answers", "Layout", "Target"]

Array = NDArray[Any]
Columns = dict[str, bytes]

LEVELS = 255  # of gaps, beside 0
RANGE_STEPS = 4  # per nat
LARGEST_GAP = 255 / RANGE_STEPS
ODDS_FROM, ODDS_SPAN = -16.0, 40.0
LEVELS_16 = 65534
SPECIAL_16 = 65535
_SQUARES = ((np.arange(256) / LEVELS) ** 2).astype(np.float32)


class Answers(NamedTuple):
    """The teacher's answers for some tokens, as :mod:`fusedkd.cache.summary` makes them.

    ``ids`` (L, K) int64 with -1 for nothing; ``values`` (L, K) natural log-probabilities at T = 1
    in descending order, or how often an id was drawn; ``odds`` (L, number of temperatures), nothing
    for draws; ``entropy`` (L,) nats at T = 1, NaN for unknown.
    """

    ids: Array
    values: Array
    odds: Array
    entropy: Array


class Target(NamedTuple):
    """What a cache gives back: ``ids`` (L, K) int64, -1 for nothing; ``log_probs`` (L, K) fp32 at
    the temperature asked for, -inf for nothing; ``entropy`` (L,) fp32 nats at T = 1, NaN for
    unknown."""

    ids: Array
    log_probs: Array
    entropy: Array


@dataclass(frozen=True)
class Layout:
    """The numbers that the bytes depend on.

    Raises:
        CacheError: temperatures that the policy cannot serve.
    """

    policy: Policy
    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.temperatures or any(not math.isfinite(t) or t <= 0 for t in self.temperatures):
            raise CacheError(
                f"--temperatures {self._listed()}: expected numbers above 0, such as 1,2."
            )
        if len(set(self.temperatures)) < len(self.temperatures):
            raise CacheError(f"--temperatures {self._listed()}: each may be there only once.")
        if self.policy.kind == "sample" and len(self.temperatures) > 1:
            raise CacheError(
                f"--temperatures {self._listed()} with --sample: ids are drawn at one temperature. "
                "Make one cache for each, or keep the top entries (--top-k)."
            )

    def _listed(self) -> str:
        return ",".join(f"{t:g}" for t in self.temperatures)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the byte strings of a sequence."""
        if self.policy.kind == "sample":
            return ("ids", "draws", "entropy")
        return ("counts", "ids", "codes", "ranges", "odds", "entropy")

    @property
    def id_bits(self) -> int:
        """ceil(log2 V)."""
        return bits_for(self.vocab_size - 1)

    @property
    def k(self) -> int:
        """The most entries that a token can have."""
        return (
            self.policy.k if self.policy.kind == "sample" else min(self.policy.k, self.vocab_size)
        )

    @property
    def most_bytes_per_token(self) -> float:
        """Without counts where all are k; for draws, as if all were different."""
        k = self.k
        bits = k * self.id_bits + 16
        if self.policy.kind == "sample":
            return (bits + k) / 8
        full = self.policy.top_p is None
        counts = 0 if full else bits_for(k)
        codes = k + LEVELS if self._stairs(full) else 8 * k
        return (bits + counts + codes + 8 + 16 * len(self.temperatures)) / 8

    def _stairs(self, full: bool) -> bool:
        """Whether codes are written as steps of a stair."""
        return full and self.k + LEVELS < 8 * self.k

    def slot(self, temperature: float) -> int:
        """Which of the declared temperatures this one is.

        Raises:
            CacheError: none of them.
        """
        if temperature not in self.temperatures:
            raise CacheError(
                f"teacher temperature {temperature:g}: this cache was made for "
                f"{self._listed()}. Use one of them, or make a cache with --temperatures "
                f"{self._listed()},{temperature:g}."
            )
        return self.temperatures.index(temperature)

    # ---- to bytes ----

    def encode(self, answers: Answers) -> Columns:
        """One sequence's columns."""
        there = answers.ids >= 0
        counts = there.sum(1)
        full = bool((counts == self.k).all())
        columns = {
            "ids": pack(answers.ids if full else answers.ids[there], self.id_bits).tobytes(),
            "entropy": _levels(answers.entropy, 0.0, math.log(max(self.vocab_size, 2))),
        }
        if self.policy.kind == "sample":
            return columns | {"draws": pack_runs(answers.values[there], there.shape[0] * self.k)}
        codes, ranges = _codes(answers.values, there)
        return columns | {
            "counts": b"" if full else pack(counts, bits_for(self.k)).tobytes(),
            "codes": pack_stairs(codes, LEVELS) if self._stairs(full) else codes[there].tobytes(),
            "ranges": ranges.tobytes(),
            "odds": _levels(_closed(answers.odds), ODDS_FROM, ODDS_SPAN),
        }

    # ---- and back ----

    def decode(self, columns: Mapping[str, Any], tokens: int, temperature: float) -> Target:
        """The answers for a sequence of ``tokens`` tokens at one of the declared temperatures.

        Args:
            columns: buffers by name, as :meth:`encode` makes them.

        Raises:
            CacheError: a temperature that was not declared.
            ValueError: columns that do not fit each other.
        """
        slot = self.slot(temperature)
        raw = {name: np.frombuffer(columns[name], np.uint8) for name in self.columns}
        entropy = _values(raw["entropy"], 0.0, math.log(max(self.vocab_size, 2)), np.nan)
        if self.policy.kind == "sample":
            draws, counts = unpack_runs(raw["draws"], tokens, self.k)
            there = _filled(counts)
            share = np.log(draws.astype(np.float32) / np.float32(self.k))
            return Target(self._ids(raw, there), _spread(share, there, -np.inf), entropy)
        full = not raw["counts"].size
        there = _filled(
            np.full(tokens, self.k) if full else unpack(raw["counts"], bits_for(self.k), tokens)
        )
        if self._stairs(full):
            codes = unpack_stairs(raw["codes"], tokens, self.k, LEVELS)
        else:
            codes = _spread(raw["codes"], there, 0)
        odds = self._odds(raw["odds"])[:, slot]
        logs = _log_probs(codes, there, raw["ranges"], odds, temperature)
        return Target(self._ids(raw, there), logs, entropy)

    def _ids(self, raw: Mapping[str, Array], there: Array) -> Array:
        return _spread(unpack(raw["ids"], self.id_bits, int(there.sum())), there, -1)

    def tails(self, columns: Mapping[str, Any]) -> Array:
        """(L, number of temperatures): the mass outside their entries of those of a sequence's
        tokens that have entries. Of policy ``top``."""
        odds = self._odds(np.frombuffer(columns["odds"], np.uint8))
        counts = np.frombuffer(columns["counts"], np.uint8)
        if counts.size:
            odds = odds[unpack(counts, bits_for(self.k), len(odds)) > 0]
        return 1 / (1 + np.exp(odds))

    def _odds(self, raw: Array) -> Array:
        odds = _values(raw, ODDS_FROM, ODDS_SPAN, np.inf)
        return odds.reshape(-1, len(self.temperatures))


def _codes(log_probs: Array, there: Array) -> tuple[Array, Array]:
    """(codes (L, K), ranges (L,)) of the gaps below the first entry."""
    with np.errstate(invalid="ignore"):  # -inf less -inf, where nothing is
        gaps = np.where(there, log_probs[:, :1] - log_probs, 0)
    largest = gaps.max(1, initial=0)
    if gaps.min(initial=0) < 0 or not largest.max(initial=0) <= LARGEST_GAP:
        raise ValueError(f"entries must descend, by at most {LARGEST_GAP} nats in all.")
    ranges = np.ceil(largest * RANGE_STEPS).astype(np.uint8)
    scale = LEVELS / np.sqrt(np.maximum(ranges, 1)[:, None] / RANGE_STEPS)
    return np.rint(np.sqrt(gaps) * scale).astype(np.uint8), ranges


def _log_probs(codes: Array, there: Array, ranges: Array, odds: Array, t: float) -> Array:
    steps = ranges.astype(np.float32) / np.float32(-RANGE_STEPS * t)
    heads = np.where(there, _SQUARES[codes] * steps[:, None], -np.inf)
    sums = np.exp(heads).sum(1)
    mass = -np.logaddexp(np.float32(0), -odds)  # log sigmoid
    shift = mass - np.log(np.where(sums > 0, sums, 1))  # 0: a token without entries
    return heads + shift[:, None]


def _closed(odds: Array) -> Array:
    """A tail too small to write down is none."""
    return np.where(odds > ODDS_FROM + ODDS_SPAN, np.nan, odds)


def _levels(values: Array, start: float, span: float) -> bytes:
    """16 bits per value; NaN is the special one."""
    scaled = np.rint((np.clip(values, start, start + span) - start) * (LEVELS_16 / span))
    return np.where(np.isnan(scaled), SPECIAL_16, scaled).astype("<u2").tobytes()


def _values(raw: Array, start: float, span: float, special: float) -> Array:
    levels = raw.view("<u2")
    values = levels * np.float32(span / LEVELS_16) + np.float32(start)
    return np.where(levels == SPECIAL_16, np.float32(special), values)


def _filled(counts: Array) -> Array:
    """(L, K) true where a token has an entry."""
    there: Array = np.arange(counts.max(initial=0)) < counts[:, None]
    return there


def _spread(flat: Array, there: Array, nothing: float) -> Array:
    """(L, K) with ``flat`` where ``there`` is true, in order."""
    if flat.size == there.size:
        return flat.reshape(there.shape)
    spread = np.full(there.shape, nothing, flat.dtype)
    spread[there] = flat
    return spread
