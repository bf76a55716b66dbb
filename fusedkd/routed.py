"""Several teachers for one batch, each of some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedkd.distributions import LMHead, SparseTeacher

if TYPE_CHECKING:
    from fusedkd.call import Arguments

Answers = Tensor | LMHead | SparseTeacher


@dataclass(frozen=True, eq=False)
class Routed:
    """A teacher of which each row of the batch, along its first dimension, has its own.

    The rows of each are compared in a call of their own, one after the other, so that one teacher's
    head at a time is where the student's is: a head's weight that lies elsewhere is copied for its
    call. The loss and its gradient are those of the rows together.

    Args:
        teachers: by name, the distributions of the rows that have it, in the order of the batch:
            logits (B_n, ..., V), :class:`LMHead` or :class:`SparseTeacher`; or a function without
            arguments that gives them when it is their turn.
        names: B of them.

    Raises:
        ValueError: a row has a name that is none of the teachers'.
    """

    teachers: Mapping[str, Answers | Callable[[], Answers]]
    names: Sequence[str]

    def __post_init__(self) -> None:
        for row, name in enumerate(self.names):
            if name not in self.teachers:
                raise ValueError(
                    f"names: row {row} is taught by {name!r}: expected one of "
                    f"{', '.join(self.teachers)}."
                )

    def rows(self) -> dict[str, list[int]]:
        """Of each teacher that has some."""
        found: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault(name, []).append(row)
        return found

    def calls(self, given: Arguments) -> Iterator[tuple[str, list[int], Arguments]]:
        """(name, rows, arguments) of each teacher's call; their losses are to be added up.

        Raises:
            ValueError: the student has another number of rows than there are names.
        """
        hidden = given.student.hidden if isinstance(given.student, LMHead) else given.student
        if len(hidden) != len(self.names):
            raise ValueError(
                f"the student has {len(hidden)} rows and there are {len(self.names)} names: "
                "expected a name for each."
            )
        normalizer = given.normalizer
        if given.reduction == "mean" and normalizer is None:
            normalizer = _weight(given, hidden)
        for name, rows in self.rows().items():
            side: Any = self.teachers[name]
            side = side if isinstance(side, Answers) else side()
            yield (
                name,
                rows,
                given._replace(
                    student=_taken(given.student, rows),
                    teacher=_here(side, hidden.device),
                    labels=_taken(given.labels, rows),
                    token_weights=_taken(given.token_weights, rows),
                    normalizer=normalizer,
                    num_counted=None,
                ),
            )


def routed_loss(
    given: Arguments, routed: Routed, metrics: bool, compute: Callable[[Arguments, bool], Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The loss by ``compute`` of each teacher's rows, and its metrics by the teacher's name."""
    losses, places, found = [], [], {}
    for name, rows, part in routed.calls(given):
        loss, found[name] = compute(part, metrics)
        losses.append(loss)
        places += rows
    if given.reduction != "none":
        return torch.stack(losses).sum(), found
    order = torch.tensor(places, device=losses[0].device).argsort()
    return torch.cat(losses).index_select(0, order), found


def together(parts: list[Any]) -> Any:
    """The metrics of all rows, which are means over tokens; None where some rows have none."""
    counts = torch.stack([part.num_tokens for part in parts])
    total = counts.sum()
    found: dict[str, Tensor | None] = {"num_tokens": total}
    for name in parts[0]._fields:
        values = [getattr(part, name) for part in parts]
        if name == "num_tokens" or any(value is None for value in values):
            continue
        sums = torch.where(counts > 0, torch.stack(values) * counts, 0.0)  # NaN of no tokens is 0
        found[name] = sums.sum() / total.clamp(min=1)
    return type(parts[0])(**found)


def _taken(value: Any, rows: list[int]) -> Any:
    if value is None:
        return None
    if isinstance(value, LMHead):
        return replace(value, hidden=_taken(value.hidden, rows))
    if len(rows) == len(value):
        return value
    return value.index_select(0, torch.tensor(rows, device=value.device))


def _here(side: Answers, device: torch.device) -> Answers:
    if not isinstance(side, LMHead) or side.weight.device == device:
        return side
    bias = None if side.bias is None else side.bias.to(device)
    return replace(side, weight=side.weight.to(device), bias=bias)


def _weight(given: Arguments, hidden: Tensor) -> Tensor:
    """What the sum is divided by: the weight of all rows together."""
    weights = given.token_weights
    if weights is None:
        weights = torch.ones(hidden.shape[:-1], device=hidden.device)
    if given.labels is not None:
        weights = weights.masked_fill(given.labels == given.ignore_index, 0.0)
    return weights.detach().sum(dtype=torch.float64)
