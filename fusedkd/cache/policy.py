"""What of the teacher's distribution is kept, and for which losses that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedkd.cache.errors import CacheError, short
from fusedkd.checks import is_finite
from fusedkd.divergences import Divergence

MOST_ENTRIES = 4096  # per token
MOST_STATES = 2**20
HIDDEN = ("bf16", "int8")
ACTUAL = "actual"


@dataclass(frozen=True)
class Policy:
    """Which entries of the teacher's distribution a token keeps.

    Args:
        kind: ``"top"`` keeps the most probable entries and the mass of all others; ``"sample"``
            keeps ``k`` ids drawn from the distribution (Anshumann et al. 2025, arXiv 2503.16870),
            systematically: an id of probability p is there k p times, rounded up or down at random;
            ``"bf16"`` and ``"int8"`` keep the hidden states that the head turns into logits;
            ``"actual"`` keeps the log-probability of the token that is there, and no other.
        k: the most entries that a token keeps, or the number of draws; 1 to 4096. Of hidden states:
            how many numbers they are. With ``"actual"`` 1.
        top_p: keep no more of the ``k`` than reach this probability together, in (0, 1]; None
            keeps all of them. At T = 1, whatever the temperatures.

    Raises:
        CacheError: a number out of range or of another type, or ``top_p`` beside draws.
    """

    kind: str = "top"
    k: int = 64
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("top", "sample", ACTUAL, *HIDDEN):
            raise CacheError(
                f"policy {short(self.kind)}: expected 'actual', 'top' or 'sample', or of hidden "
                "states 'bf16' or 'int8'."
            )
        if self.kind == ACTUAL:
            if type(self.k) is not int or self.k != 1 or self.top_p is not None:
                raise CacheError(f"--actual of {short(self.k)}: expected 1 number a token.")
            return
        if self.hidden:
            if type(self.k) is not int or not 1 <= self.k <= MOST_STATES or self.top_p is not None:
                raise CacheError(f"--hidden of {short(self.k)}: expected 1 to {MOST_STATES}.")
            return
        if type(self.k) is not int or not 1 <= self.k <= MOST_ENTRIES:
            name = "--top-k" if self.kind == "top" else "--sample"
            raise CacheError(
                f"{name} {short(self.k)}: expected 1 to {MOST_ENTRIES} entries per token."
            )
        if self.top_p is not None and self.kind != "top":
            raise CacheError("--top-p does not go with --sample: draws are not cut.")
        if self.top_p is not None and not (is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise CacheError(f"--top-p {short(self.top_p)}: expected a probability in (0, 1].")

    @classmethod
    def of(
        cls,
        top_k: int | None = None,
        top_p: float | None = None,
        sample: int | None = None,
        hidden: str | None = None,
        temperatures: Sequence[float] = (1.0,),
        actual: bool = False,
    ) -> Policy:
        """The one of these that is given; top 64 where none is. Of hidden states ``k`` is 1, until
        the teacher tells how many numbers they are, and all temperatures can be made of them.

        Raises:
            CacheError: two that contradict each other, or as the policy.
        """
        others = any(x is not None for x in (top_k, top_p, sample))
        if actual:
            if others or hidden is not None:
                raise CacheError(
                    "--actual keeps one number a token: expected no --top-k, --top-p, --sample or "
                    "--hidden."
                )
            return cls(ACTUAL, 1)
        if hidden is not None:
            if others or tuple(temperatures) != (1.0,):
                raise CacheError(
                    "--hidden keeps what every entry and every temperature can be made of: "
                    "expected no --top-k, --top-p, --sample or --temperatures."
                )
            return cls(hidden, 1)
        if sample is None:
            return cls("top", 64 if top_k is None else top_k, top_p)
        if top_k is not None:
            raise CacheError("--top-k and --sample: expected one of them.")
        return cls("sample", sample, top_p)

    @property
    def hidden(self) -> bool:
        """Whether it keeps hidden states."""
        return self.kind in HIDDEN

    def __str__(self) -> str:
        if self.hidden:
            return f"hidden states, {self.k} in {self.kind}"
        if self.kind == ACTUAL:
            return "the actual token's log-probability"
        if self.kind == "sample":
            return f"{self.k} draws"
        cut = "" if self.top_p is None else f", as many as reach p = {self.top_p:g}"
        return f"top {self.k}{cut}"


def linear_in_teacher(divergence: Divergence) -> bool:
    """Whether the student's gradient is linear in the teacher's probabilities.

    Only then does a random p with the right mean give a gradient with the right mean, so that
    training on draws is unbiased: forward KL is linear, reverse KL and JSD are not. Nothing is
    known here about names: the formula's own derivative is tried on a grid, where it has to be
    additive and to vanish at p = 0.
    """
    p = torch.tensor([1e-6, 1e-3, 0.05, 0.2, 0.45], dtype=torch.float64)
    a, b, q = (grid.flatten() for grid in torch.meshgrid(p, p, p, indexing="ij"))
    together = _slope(divergence, a + b, q)
    apart = _slope(divergence, a, q) + _slope(divergence, b, q)
    nothing = _slope(divergence, torch.zeros_like(q), q)
    return torch.allclose(together, apart, rtol=1e-9, atol=1e-12) and not bool(nothing.any())


def _slope(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """d value / d log q, entry by entry."""
    log_q = q.log().requires_grad_()
    return torch.autograd.grad(divergence.value(p.log(), log_q).sum(), log_q)[0]
