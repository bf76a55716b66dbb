"""Weighted means of what is measured, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedkd import KDMetrics, SampledMetrics


class Mean(NamedTuple):
    """0-d tensors without a graph: a mean, and over how many tokens it is one."""

    value: Tensor
    tokens: Tensor

    def item(self) -> float:
        """The mean as a number; waits for the device."""
        return float(self.value)


Measured = Mapping[str, Mean]


def measured(metrics: KDMetrics | SampledMetrics) -> dict[str, Mean]:
    """The metrics of one call of the loss, each with the number of tokens behind it."""
    means = metrics._asdict()
    tokens = means.pop("num_tokens")
    return {name: Mean(mean, tokens) for name, mean in means.items() if mean is not None}


class Meter:
    """Means over the tokens of many batches, and of every process: a batch counts as much as it has
    tokens. Adding does not wait for the device; reading does, and starts afresh."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was added."""
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Measured) -> None:
        """Take in what one call measured."""
        for name, (mean, tokens) in batch.items():
            row = torch.stack([mean.double() * tokens, tokens.double()])
            self._sums[name] = row if name not in self._sums else self._sums[name] + row

    def means(self) -> dict[str, float]:
        """The means since the last call, by name, of what was measured on some token; over all
        processes of the default group, where there is one: each of them has to call this, also one
        that has added nothing."""
        sums = {}
        if self._sums:
            sums = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True))
        self.reset()
        total: dict[str, list[float]] = {}
        for part in _of_every_process(sums):
            for name, row in part.items():
                before = total.get(name, [0.0, 0.0])
                total[name] = [a + b for a, b in zip(before, row, strict=True)]
        return {name: value / tokens for name, (value, tokens) in total.items() if tokens}


def _of_every_process(sums: dict[str, list[float]]) -> list[dict[str, list[float]]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [sums]
    found: list[dict[str, list[float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, sums)
    return found


def without_repeats(inputs: Mapping[str, Any], accelerator: Any) -> Mapping[str, Any]:
    """The batch, with labels that do not count in rows that are there twice.

    So that all processes have as many rows, accelerate ends an epoch with its first ones once more;
    only the last batch knows how many rows are new.
    """
    state, labels = accelerator.gradient_state, inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return inputs
    if not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    new = state.remainder - accelerator.process_index * len(labels)
    if accelerator.num_processes == 1 or new >= len(labels):
        return inputs
    again = torch.arange(len(labels), device=labels.device) >= new
    return {**inputs, "labels": labels.masked_fill(again.view(-1, *[1] * (labels.dim() - 1)), -100)}
