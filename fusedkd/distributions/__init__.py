"""The forms in which a distribution can be handed to :func:`fusedkd.kd_loss`, one module each."""

from __future__ import annotations

from torch import Tensor

from fusedkd.distributions.dense import dense_side
from fusedkd.distributions.head import LMHead, head_side
from fusedkd.distributions.side import NOTHING, Side
from fusedkd.distributions.sparse import TAILS, SparseTeacher, sparse_side

__all__ = ["TAILS", "LMHead", "SparseTeacher", "lone_side", "student_side", "teacher_side"]


AS_TEACHER = "; as teacher also SparseTeacher(indices, log_probs)"


def student_side(value: Tensor | LMHead, fewest: int = 1) -> Side:
    """The student's tensors, checked; of no fewer columns than ``fewest``."""
    return lone_side("student", value, fewest, AS_TEACHER)


def teacher_side(value: Tensor | LMHead | SparseTeacher | None, fewest: int = 1) -> Side:
    """The teacher's, who alone may be sparse, or nothing."""
    if value is None:
        return NOTHING
    if isinstance(value, SparseTeacher):
        return sparse_side(value)
    return lone_side("teacher", value, fewest, AS_TEACHER)


def lone_side(name: str, value: Tensor | LMHead, fewest: int = 1, also: str = "") -> Side:
    """Logits or a head, as ``name``; ``also``: what else messages are to expect."""
    if isinstance(value, Tensor):
        return dense_side(name, value, fewest)
    if isinstance(value, LMHead):
        return head_side(name, value, fewest)
    raise TypeError(
        f"{name} is a {type(value).__name__}: expected logits (a Tensor) or LMHead(hidden, weight)"
        f"{also}. A transformers output has its logits in `.logits`."
    )
