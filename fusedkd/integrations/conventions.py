"""What Liger and TRL mean by their words."""

from __future__ import annotations

from fusedkd import divergences
from fusedkd.divergences import Divergence


def generalized_jsd(beta: float) -> Divergence:
    """What Liger and TRL call JSD: forward KL at beta = 0, reverse KL at 1."""
    if beta in (0, 1):
        return divergences.reverse_kl() if beta else divergences.forward_kl()
    return divergences.jsd(float(beta))
