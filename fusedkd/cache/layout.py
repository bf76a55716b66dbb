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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedkd.cache.answers import Answers, Target
from fusedkd.cache.codes import (
    LEVELS,
    ODDS_FROM,
    ODDS_SPAN,
    check_codes,
    check_distinct,
    closed,
    filled,
    gap_codes,
    gap_log_probs,
    levels,
    spread,
    values,
)
from fusedkd.cache.errors import CacheError
from fusedkd.cache.packing import (
    bits_for,
    pack,
    pack_runs,
    pack_stairs,
    packed_size,
    unpack,
    unpack_runs,
    unpack_stairs,
)
from fusedkd.cache.policy import Policy

Array = NDArray[Any]
Columns = dict[str, bytes]

MOST_IDS = 2**31 - 1  # ids travel as int32
TEMPERATURES = (1e-4, 1e4)  # beyond, fp32 takes every entry for 0 or for the same


@dataclass(frozen=True)
class Layout:
    """The numbers that the bytes depend on.

    Raises:
        CacheError: temperatures that the policy cannot serve, or a number out of range.
    """

    policy: Policy
    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not 2 <= self.vocab_size <= MOST_IDS:
            raise CacheError(
                f"--vocab-size {self.vocab_size}: expected 2 to {MOST_IDS} entries, the "
                "tokenizer's."
            )
        low, high = TEMPERATURES
        if not self.temperatures or any(not low <= t <= high for t in self.temperatures):
            raise CacheError(
                f"--temperatures {self._listed()}: expected numbers above 0, such as 1,2; from "
                f"{low:g} to {high:g}."
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
            "entropy": levels(answers.entropy, 0.0, self._most_entropy),
        }
        if self.policy.kind == "sample":
            return columns | {"draws": pack_runs(answers.values[there], there.shape[0] * self.k)}
        codes, ranges = gap_codes(answers.values, there)
        return columns | {
            "counts": b"" if full else pack(counts, bits_for(self.k)).tobytes(),
            "codes": pack_stairs(codes, LEVELS) if self._stairs(full) else codes[there].tobytes(),
            "ranges": ranges.tobytes(),
            "odds": levels(closed(answers.odds), ODDS_FROM, ODDS_SPAN),
        }

    @property
    def _most_entropy(self) -> float:
        return math.log(self.vocab_size)

    # ---- and back ----

    def decode(
        self, columns: Mapping[str, Any], tokens: int, temperature: float, known: bool = False
    ) -> Target:
        """The answers for a sequence of ``tokens`` tokens at one of the declared temperatures.

        Args:
            columns: buffers by name, as :meth:`encode` makes them.
            known: they were decoded before, so their order need not be looked at again.

        Raises:
            CacheError: a temperature that was not declared.
            ValueError: columns that :meth:`encode` does not make.
        """
        slot = self.slot(temperature)
        raw = self._raw(columns, tokens)
        entropy = values(raw["entropy"], 0.0, self._most_entropy, np.nan)
        if self.policy.kind == "sample":
            draws, counts = unpack_runs(raw["draws"], tokens, self.k)
            there = filled(counts)
            share = np.log(draws.astype(np.float32) / np.float32(self.k))
            logs = spread(share, there, -np.inf)
        else:
            there = filled(self._counts(raw["counts"], tokens))
            codes = self._codes(raw, there)
            if not known:
                check_codes(codes, there)
            odds = self._odds(raw["odds"])[:, slot]
            logs = gap_log_probs(codes, there, raw["ranges"], odds, temperature)
        ids = self._ids(raw["ids"], there)
        if not known:
            check_distinct(ids, ascending=self.policy.kind == "sample")
        return Target(ids, logs, entropy)

    def _raw(self, columns: Mapping[str, Any], tokens: int) -> dict[str, Array]:
        """The bytes of each column; lengths that the number of tokens tells are checked first, so
        that no array is larger than what was written."""
        raw = {name: np.frombuffer(columns[name], np.uint8) for name in self.columns}
        sizes = {"entropy": 2 * tokens}
        if self.policy.kind == "sample":
            sizes["draws"] = packed_size(tokens * self.k, 1)
        else:
            sizes |= {"ranges": tokens, "odds": 2 * tokens * len(self.temperatures)}
        for name, size in sizes.items():
            _expect(name, raw[name], size)
        return raw

    def _counts(self, raw: Array, tokens: int) -> Array:
        if not raw.size:
            return np.full(tokens, self.k)
        _expect("counts", raw, packed_size(tokens, bits_for(self.k)))
        counts = unpack(raw, bits_for(self.k), tokens)
        if (most := counts.max(initial=0)) > self.k:
            raise ValueError(f"a token has {most} entries: expected at most {self.k}.")
        return counts

    def _codes(self, raw: Mapping[str, Array], there: Array) -> Array:
        if self._stairs(not raw["counts"].size):
            return unpack_stairs(raw["codes"], len(there), self.k, LEVELS)
        _expect("codes", raw["codes"], int(there.sum()))
        return spread(raw["codes"], there, 0)

    def _ids(self, raw: Array, there: Array) -> Array:
        count = int(there.sum())
        _expect("ids", raw, packed_size(count, self.id_bits))
        ids = unpack(raw, self.id_bits, count)
        if (most := ids.max(initial=0)) >= self.vocab_size:
            raise ValueError(f"there is an id {most}: expected 0 to {self.vocab_size - 1}.")
        return spread(ids, there, -1)

    def tails(self, columns: Mapping[str, Any], tokens: int) -> Array:
        """(L, number of temperatures): the mass outside their entries of those of a sequence's
        tokens that have entries. Of policy ``top``.

        Raises:
            ValueError: columns that :meth:`encode` does not make.
        """
        raw = self._raw(columns, tokens)
        odds = self._odds(raw["odds"])
        return 1 / (1 + np.exp(odds[self._counts(raw["counts"], tokens) > 0]))

    def _odds(self, raw: Array) -> Array:
        odds = values(raw, ODDS_FROM, ODDS_SPAN, np.inf)
        return odds.reshape(-1, len(self.temperatures))


def _expect(name: str, raw: Array, size: int) -> None:
    if raw.size != size:
        raise ValueError(f"its {name} have {raw.size:,} bytes: expected {size:,}.")
