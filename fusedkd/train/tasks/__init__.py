"""What models can be distilled to do: a :class:`Task` each. A new one is a class in this room, and
an entry of ``TASKS``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fusedkd.errors import UserError
from fusedkd.models.columns import base_model
from fusedkd.models.loading import architectures
from fusedkd.models.saved import SavedModel
from fusedkd.train.tasks.base import Task, TaskData, config_of
from fusedkd.train.tasks.classes import (
    AudioClassification,
    ImageClassification,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from fusedkd.train.tasks.language import Causal, Masked, Seq2Seq

__all__ = ["TASKS", "Task", "TaskData", "saved_task", "task_between", "task_named", "task_of"]

# where a class does two things, the first that fits its config
TASKS: tuple[Task, ...] = (
    Masked(),
    Causal(),
    Seq2Seq(),
    SequenceClassification(),
    TokenClassification(),
    MultipleChoice(),
    QuestionAnswering(),
    ImageClassification(),
    AudioClassification(),
)


def task_between(student: Any, teacher: Any, name: str | None = None) -> Task:
    """What ``student`` is distilled to do by ``teacher``, a model, or a cache of its answers.

    Args:
        name: of the task, for a class that is not known by itself.

    Raises:
        ValueError: there is no such task, the teacher does something else, or the two answer about
            different things.
    """
    kind = type(base_model(student)).__name__
    task = task_of(student) if name is None else task_named(name)
    if task is None:
        raise ValueError(unknown("the student", [kind]))
    if task.asked_for and name is None:
        raise ValueError(
            f"the student is a {kind}, which gives no 'logits' but two distributions over "
            f"positions: pass task={task.name!r} to train on the mean of both divergences."
        )
    if not isinstance(teacher, nn.Module):
        return task
    theirs = task_of(teacher) if name is None else task
    inner = type(base_model(teacher))
    if theirs is None and inner.__module__.startswith("transformers."):
        raise ValueError(unknown("the teacher", [inner.__name__]))
    if theirs not in (None, task):  # a module of one's own is taken at its word
        raise ValueError(
            f"the student is a {task.name} model, the teacher ({inner.__name__}) a {theirs.name} "
            "one: expected one task."
        )
    task.check(student, teacher)
    return task


def task_named(name: str) -> Task:
    """
    Raises:
        ValueError: there is none of that name.
    """
    found = {task.name: task for task in TASKS}
    if name not in found:
        raise ValueError(f"task={name!r}: expected one of {', '.join(found)}.")
    return found[name]


def task_of(model: Any) -> Task | None:
    """What a model does, by its class or the nearest of those that it inherits from."""
    inner = base_model(model)
    return _find([kind.__name__ for kind in type(inner).__mro__], config_of(inner))


def saved_task(model: SavedModel, known: bool = True) -> Task | None:
    """What a saved model does, by the classes that its config names, or by its adapter; None where
    neither says.

    Args:
        known: raise where it is nothing that can be distilled, instead of returning None.

    Raises:
        UserError: there is no model, or see ``known``.
    """
    config = model.config()
    names = architectures(config)
    kind = None if model.adapter is None else model.adapter.task_type
    by_adapter = next((task for task in TASKS if kind and task.adapter == str(kind)), None)
    task = by_adapter or _find(names, config)
    if task is None and names and known:
        raise UserError(unknown(f"--{model.role} {model.name}", names))
    return task


def unknown(whose: str, names: Iterable[str]) -> str:
    """Of a message."""
    tasks = ", ".join(f"{task.title} ({task.auto})" for task in TASKS)
    return (
        f"{whose} is a {', '.join(names)}, whose head is none that can be distilled: expected one "
        f"for {tasks}. A class of your own is known by what it inherits from, or by task=..., "
        f"one of {', '.join(task.name for task in TASKS)}."
    )


def _find(names: Iterable[str], config: Any) -> Task | None:
    own_code = {
        entry.rpartition(".")[2]: auto
        for auto, entries in (getattr(config, "auto_map", None) or {}).items()
        for entry in ([entries] if isinstance(entries, str) else filter(None, entries))
    }
    for name in names:
        for task in TASKS:
            known = name in task.classes() or own_code.get(name) == task.auto
            if known and task.fits(config):
                return task
    return None
