"""What a cache holds as teachers of :func:`fusedkd.kd_loss`, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fusedkd.cache.answers import Target
from fusedkd.distributions import LMHead, SparseTeacher

Side = TypeVar("Side", SparseTeacher, LMHead)

if TYPE_CHECKING:
    from fusedkd.cache.reader import TeacherCache


def teacher_of(
    cache: TeacherCache,
    rows: Sequence[np.ndarray],
    there: np.ndarray,
    temperature: float,
    device: torch.device,
) -> SparseTeacher | LMHead:
    """(B, L, ...) of B sequences, row b's at the places ``there[b]`` (B, L); nothing at others."""
    places = torch.from_numpy(there)
    if cache.hidden:
        head = cache.head(device)
        hidden = torch.zeros(*there.shape, cache.layout.k, dtype=head.weight.dtype)
        hidden[places] = torch.cat([cache.states(ids) for ids in rows]).to(hidden.dtype)
        return replace(head, hidden=hidden.to(device))
    found = cache.get_many(rows, temperature)
    width = max(target.ids.shape[1] for target in found)
    indices = torch.full((*there.shape, width), -1)
    log_probs = torch.full((*there.shape, width), -torch.inf)
    indices[places] = torch.from_numpy(np.concatenate([_wide(t, width).ids for t in found]))
    log_probs[places] = torch.from_numpy(np.concatenate([_wide(t, width).log_probs for t in found]))
    every = np.concatenate([target.entropy for target in found])
    entropy = None
    if temperature == 1 and not np.isnan(every).any():
        entropy = torch.zeros(there.shape).masked_scatter_(places, torch.from_numpy(every))
    tail = "drop" if cache.sampled else "bucket"
    return on(SparseTeacher(indices, log_probs, tail, entropy), device)


def _wide(target: Target, width: int) -> Target:
    """With so many entries a token."""
    more = ((0, 0), (0, width - target.ids.shape[1]))
    ids = np.pad(target.ids, more, constant_values=-1)
    return Target(ids, np.pad(target.log_probs, more, constant_values=-np.inf), target.entropy)


def on(side: Side, device: torch.device) -> Side:
    """The same on a device."""
    names = type(side).__dataclass_fields__
    values = {name: getattr(side, name) for name in names}
    moved: Any = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
    return replace(side, **moved)
