"""Distillation on ``transformers.Trainer``. Needs the ``train`` extra: ``pip install
fusedkd[train]``."""

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
