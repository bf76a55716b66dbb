"""Fused knowledge-distillation losses for large vocabularies. See :func:`kd_loss`."""

from fusedkd import divergences
from fusedkd.distributions import LMHead, SparseTeacher
from fusedkd.loss import KDLoss, KDMetrics, kd_loss, kd_loss_and_metrics

__all__ = [
    "KDLoss",
    "KDMetrics",
    "LMHead",
    "SparseTeacher",
    "divergences",
    "kd_loss",
    "kd_loss_and_metrics",
]
