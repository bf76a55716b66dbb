"""Weighted means of what is measured, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedkd import KDMetrics

Measured = Mapping[str, tuple[Tensor, Tensor]]  # a mean, and over how many tokens it is one


def measured(metrics: KDMetrics) -> dict[str, tuple[Tensor, Tensor]]:
    """The metrics of one call of the loss, each with the number of tokens behind it."""
    *means, tokens = metrics
    return {name: (mean, tokens) for name, mean in zip(KDMetrics._fields, means, strict=False)}


class Meter:
    """Adds up means without asking the device for a number; reading it starts it afresh."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Measured) -> None:
        """Take in one batch."""
        for name, (mean, tokens) in batch.items():
            row = torch.stack([mean.double() * tokens, tokens.double()])
            self._sums[name] = row if name not in self._sums else self._sums[name] + row

    def means(self, accelerator: Any) -> dict[str, float]:
        """The means over every process since the last call, by name, of what was measured on some
        token."""
        if not self._sums:
            return {}
        rows = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum").tolist()
        means = {
            name: value / tokens
            for name, (value, tokens) in zip(self._sums, rows, strict=True)
            if tokens
        }
        self.reset()
        return means
