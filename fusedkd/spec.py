"""What a loss is made of, checked once and then passed whole."""

from __future__ import annotations

from typing import NamedTuple

from fusedkd.checks import check_temperature, check_weight, check_whole, is_finite
from fusedkd.divergences import Divergence
from fusedkd.row_rules import RowRule

# The columns of the per-token metrics that a backend returns, in this order.
METRIC_COLUMNS = (
    "kd",
    "ce",
    "teacher_entropy",
    "student_entropy",
    "top1_agreement",
    "student_accuracy",
    "teacher_accuracy",
    "student_mass",
)

# Of these, what only a teacher can tell.
OF_TEACHER = ("kd", "teacher_entropy", "top1_agreement", "teacher_accuracy")

REDUCTIONS = ("mean", "sum", "none")


def temperature_class(temperature: float) -> int:
    """1, 2, or 0 for any other: each has kernels of its own on a GPU, for the cross-entropy is at
    temperature 1, and needs no exponentials of its own beside a divergence at 1 or 2."""
    return int(temperature) if temperature in (1, 2) else 0


class Transform(NamedTuple):
    """What happens to a logit between the matrix product and the softmax: ``cap tanh(scale x /
    cap)``.
    """

    scale: float = 1.0
    softcap: float = 0.0  # 0: none


IDENTITY = Transform()


class LossSpec(NamedTuple):
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
    z_loss_weight: float = 0.0
    reduction: str = "mean"
    student_transform: Transform = IDENTITY
    teacher_transform: Transform = IDENTITY
    row_rule: RowRule | None = None  # without a kd_scale it has no say

    @property
    def kd_scale(self) -> float:
        """The factor on the raw divergence: its weight, and T^2 so that soft gradients keep their
        size as T grows.
        """
        return self.kd_weight * (self.temperature**2 if self.scale_by_t2 else 1.0)

    def checked(self) -> LossSpec:
        """Itself.

        Raises:
            ValueError, TypeError: a hyper-parameter is none, naming it.
        """
        check_temperature("temperature", self.temperature)
        check_temperature("teacher_temperature", self.teacher_temperature)
        check_weight("kd_weight", self.kd_weight)
        check_weight("ce_weight", self.ce_weight)
        check_weight("z_loss_weight", self.z_loss_weight)
        if not is_finite(self.label_smoothing) or not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r}: expected a Python number in [0, 1]."
            )
        if not isinstance(self.scale_by_t2, bool):
            raise TypeError(f"scale_by_t2={self.scale_by_t2!r}: expected True or False.")
        if not isinstance(self.reduction, str) or self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction={self.reduction!r}: expected one of {', '.join(map(repr, REDUCTIONS))}."
            )
        check_whole("vocab_size", self.vocab_size, 1)
        check_whole("ignore_index", self.ignore_index, -(2**63), "the usual one is -100")
        return self
