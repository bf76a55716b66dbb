"""What a loss is made of, checked once and then passed whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fusedkd.checks import check_whole, is_finite
from fusedkd.divergences import Divergence

__all__ = ["IDENTITY", "METRIC_COLUMNS", "OF_TEACHER", "LossSpec", "Transform"]

# The columns of the per-token metrics that a backend returns, in this order.
METRIC_COLUMNS = (
    "kd",
    "ce",
    "teacher_entropy",
    "student_entropy",
    "top1_agreement",
    "student_accuracy",
    "teacher_accuracy",
)

# Of these, what only a teacher can tell.
OF_TEACHER = ("kd", "teacher_entropy", "top1_agreement", "teacher_accuracy")

MOST_WEIGHT = 1e18  # with T^2 still a number in fp32, and as an int in 64 bits
REDUCTIONS = ("mean", "sum", "none")


class Transform(NamedTuple):
    """What happens to a logit between the matrix product and the softmax: ``cap tanh(scale x /
    cap)``.
    """

    scale: float = 1.0
    softcap: float = 0.0  # 0: none


IDENTITY = Transform()


@dataclass(frozen=True)
class LossSpec:
    """The hyper-parameters of one call. Every number in it is a run-time value to the kernels."""

    divergence: Divergence
    vocab_size: int  # columns that count; any beyond are padding
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    scale_by_t2: bool = True
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    student_transform: Transform = IDENTITY
    teacher_transform: Transform = IDENTITY
    tail: str | None = None  # what a SparseTeacher's remaining mass becomes; None: another teacher
    inplace: bool = False
    chunk_bytes: int | None = None
    chunk_columns: int | None = None  # that a chunk's bytes are counted with; None: what is here
    num_counted: int | None = None  # tokens that count, where the caller knows
    backend: Any = None  # as fusedkd.backends.resolve takes it
    autocast: torch.dtype | None = None  # heads: the dtype to multiply in, where autocast is on

    def __post_init__(self) -> None:
        for name in ("temperature", "teacher_temperature"):
            if not is_finite(value := getattr(self, name)) or value <= 0:
                raise ValueError(
                    f"{name}={value!r}: expected a Python number above 0 (1.0 changes nothing)."
                )
        for name in ("kd_weight", "ce_weight"):
            if not is_finite(value := getattr(self, name)) or not 0 <= value <= MOST_WEIGHT:
                raise ValueError(
                    f"{name}={value!r}: expected a Python number from 0, which drops the term, to "
                    f"{MOST_WEIGHT:g}."
                )
        if not is_finite(self.label_smoothing) or not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r}: expected a Python number in [0, 1]."
            )
        for name in ("scale_by_t2", "inplace"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}={value!r}: expected True or False.")
        if not isinstance(self.reduction, str) or self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction={self.reduction!r}: expected one of {', '.join(map(repr, REDUCTIONS))}."
            )
        check_whole("vocab_size", self.vocab_size, 1)
        check_whole("ignore_index", self.ignore_index, -(2**63), "the usual one is -100")
        for name, least in (("chunk_bytes", 1), ("num_counted", 0)):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, least, "or None")

    @property
    def kd_scale(self) -> float:
        """The factor on the raw divergence: its weight, and T^2 so that soft gradients keep their
        size as T grows.
        """
        return self.kd_weight * (self.temperature**2 if self.scale_by_t2 else 1.0)
