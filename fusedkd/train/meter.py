"""Token-weighted means of the distillation metrics, kept on the device until somebody reads
them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd import KDMetrics

__all__ = ["Meter"]


class Meter:
    """Adds up metrics without asking the device for a number; reading it starts it afresh."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None

    def add(self, metrics: KDMetrics) -> None:
        """Take in one batch: ``num_tokens``, and the means over them."""
        *means, tokens = metrics
        row = torch.stack([*(mean.double() * tokens for mean in means), tokens.double()])
        self._sums = row if self._sums is None else self._sums + row

    def means(self, accelerator: Any) -> dict[str, float]:
        """The means over every process since the last call, by name; empty where nothing was
        added."""
        if self._sums is None:
            return {}
        *sums, tokens = accelerator.reduce(self._sums, reduction="sum").tolist()
        means = {
            name: value / max(tokens, 1)
            for name, value in zip(KDMetrics._fields, sums, strict=False)
        }
        self.reset()
        return means
