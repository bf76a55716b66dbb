"""Distillation on ``transformers.Trainer``. Needs the ``train`` extra: ``pip install
fusedkd[train]``."""

from typing import TYPE_CHECKING

from fusedkd.lazy import lazy

if TYPE_CHECKING:
    from fusedkd.divergences import make as parse_divergence
    from fusedkd.students.copy import StudentPlan, build_student
    from fusedkd.train.arguments import DistillationArguments
    from fusedkd.train.trainer import DistillationTrainer

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "StudentPlan",
    "build_student",
    "parse_divergence",
]

_HOMES = dict.fromkeys(("StudentPlan", "build_student"), "fusedkd.students.copy")
_HOMES["DistillationArguments"] = "fusedkd.train.arguments"
_HOMES["DistillationTrainer"] = "fusedkd.train.trainer"
_HOMES["parse_divergence"] = "fusedkd.divergences:make"
__getattr__, __dir__ = lazy(__name__, _HOMES)
