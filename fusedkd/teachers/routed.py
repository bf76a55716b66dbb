"""Several teachers, each of the rows that a column of the data gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from fusedkd.cache.reader import TeacherCache
from fusedkd.models.live import LiveTeacher
from fusedkd.routed import Routed
from fusedkd.teachers.cached import CachedTeacher
from fusedkd.teachers.served import ServedTeacher

NAMES = "teacher_names"  # of a batch's rows, in it
Teacher = nn.Module | TeacherCache | ServedTeacher
Side = LiveTeacher | CachedTeacher


class RoutedTeachers:
    """What :class:`fusedkd.train.DistillationTrainer` takes for several teachers.

    Args:
        teachers: models, caches or servers by name.
        column: of the data, which names each row's teacher.

    Raises:
        TypeError: something else is named.
    """

    def __init__(self, teachers: Mapping[str, Teacher], column: str) -> None:
        for name, teacher in teachers.items():
            if not isinstance(teacher, Teacher):
                raise TypeError(
                    f"teachers: {name} is a {type(teacher).__name__}: expected a model, a "
                    "TeacherCache or a ServedTeacher."
                )
        self.teachers, self.column = dict(teachers), column

    def __str__(self) -> str:
        return ", ".join(self.teachers)

    @staticmethod
    def parts(teacher: Teacher | RoutedTeachers) -> tuple[dict[str, Teacher], str | None]:
        """The teachers by name, and the column; one alone has neither."""
        if isinstance(teacher, RoutedTeachers):
            return teacher.teachers, teacher.column
        return {"": teacher}, None


class RoutedSide:
    """Them as a function from a batch to a :class:`fusedkd.Routed`.

    Args:
        column: see above.
        sides: of each name.
    """

    def __init__(self, column: str, sides: Mapping[str, Side]) -> None:
        self.column, self.sides = column, dict(sides)
        for side in self.sides.values():
            if isinstance(side, CachedTeacher):
                side.resident = False  # Routed copies the head of the teacher whose turn it is

    def __call__(self, inputs: dict[str, Any]) -> Routed:
        """Ask each teacher about its rows."""
        names = inputs.pop(NAMES)
        sides: Any = self.sides
        routed = Routed(sides, names)  # whether all are known
        found = {}
        for name, rows in routed.rows().items():
            own = inputs.pop(_answers(name), {})
            found[name] = self.sides[name]({**_rows(inputs, rows, len(names)), **own})
        return Routed(found, names)

    def collator(self, collate: Callable[..., Any]) -> Callable[..., Any]:
        """``collate``, with the names of the rows' teachers, and the answers of those that are
        looked up or asked."""
        looked_up = {n: s for n, s in self.sides.items() if isinstance(s, CachedTeacher)}
        return _Collator(collate, self.column, looked_up)

    def vocabulary(self, of: Callable[[Side], int | None]) -> int | None:
        """How many columns are real for all of them, by what that is for each."""
        found = [of(side) for side in self.sides.values()]
        return min((size for size in found if size is not None), default=None)

    def check(self, tokenizer: Any, **datasets: Any) -> None:
        """Whether each row has a teacher, and those that are looked up know their rows.

        Raises:
            ValueError: there is no such column, or a name in it that is none of the teachers'.
            CacheError: as :meth:`CachedTeacher.check`.
        """
        for kind, data in datasets.items():
            for part in data.values() if isinstance(data, dict) else [data]:
                if isinstance(part, Dataset):
                    self._check(kind, part, tokenizer)

    def _check(self, kind: str, data: Dataset, tokenizer: Any) -> None:
        if self.column not in data.column_names:
            raise ValueError(
                f"teacher_column={self.column!r}: the {kind} data have no such column, only "
                f"{', '.join(data.column_names)}."
            )
        names = np.asarray(data[self.column][:])
        for name in np.unique(names):
            side = self.sides.get(str(name))
            if side is None:
                raise ValueError(
                    f"teacher_column={self.column!r}: the {kind} data name a teacher {str(name)!r}:"
                    f" expected one of {', '.join(self.sides)}."
                )
            if isinstance(side, CachedTeacher):
                side.check(tokenizer, **{kind: data.select(np.flatnonzero(names == name))})


class _Collator:
    """Picklable."""

    def __init__(
        self, collate: Callable[..., Any], column: str, sides: dict[str, CachedTeacher]
    ) -> None:
        self.collate, self.column, self.sides = collate, column, sides

    def __call__(self, features: Any) -> Any:
        names = [str(row[self.column]) for row in features]
        batch = self.collate([_without(row, self.column) for row in features])
        every: Any = dict.fromkeys(names)
        for name, rows in Routed(every, names).rows().items():
            if name in self.sides:
                asked = _rows(batch, rows, len(names))
                answered = self.sides[name].collator(dict)(asked)
                batch[_answers(name)] = {k: x for k, x in answered.items() if k not in asked}
        batch[NAMES] = names
        return batch


def _without(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != column}


def _answers(name: str) -> str:
    return f"answers of {name}"


def _rows(batch: Mapping[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """These rows of what has one for each."""
    every = {k: x for k, x in batch.items() if isinstance(x, Tensor)}
    if len(rows) == count:
        return every
    return {
        k: x.index_select(0, torch.tensor(rows, device=x.device)) if len(x) == count else x
        for k, x in every.items()
    }
