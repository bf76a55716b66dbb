"""A distribution as logits."""

from __future__ import annotations

from torch import Tensor

from fusedkd.checks import check_logits
from fusedkd.distributions.side import Side


def dense_side(name: str, logits: Tensor, fewest: int) -> Side:
    """Logits as the side called ``name``, checked, of no fewer columns than ``fewest``."""
    check_logits(name, logits)
    if logits.dim() < 1 or logits.shape[-1] < fewest:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}: expected logits (..., V), vocabulary last."
        )
    return Side(name, logits, logits.shape[-1])
