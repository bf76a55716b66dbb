"""Who computes the loss. One small object each; what a peer cannot do it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .case import Case, Problem

OURS, FLOOR, EMPTY = "fusedkd", "floor", "empty"

Forward = Callable[[], Tensor | None]  # one forward; None where there is nothing to differentiate


@dataclass(frozen=True)
class Provider:
    """``reason_missing(case)``: why it cannot run the case, or None. ``prepare(case, problem)``:
    everything that happens once, then the function to be timed."""

    name: str
    what: str
    reason_missing: Callable[[Case], str | None]
    prepare: Callable[[Case, Problem], Forward]
    omits_entropy: bool = False  # its loss lacks the teacher's entropy: no error, said in a note
    bare: bool = False  # computes no loss: there is nothing to check, nor memory to speak of


def beta_of(case: Case) -> float | None:
    """The case's divergence as the beta that GKD, Liger and TRL take; None: they lack it."""
    divergence = case.divergence_object
    name, params = divergence.name, divergence.params
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": params[0] if params else None}.get(name)


def gkd_missing(case: Case) -> str | None:
    if not case.kd_weight:
        return "has no cross-entropy of its own"
    name = case.divergence_object.name
    return f"has forward and reverse KL and JSD, no {name}" if beta_of(case) is None else None
