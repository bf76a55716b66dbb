"""What a teacher says about the tokens of a sequence: before it is written, and as it is read."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]


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
