"""Fused knowledge-distillation losses for large vocabularies. See :func:`kd_loss`."""

from typing import TYPE_CHECKING

from fusedkd.lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fusedkd import divergences, row_rules
    from fusedkd.distributions import LMHead, SparseTeacher
    from fusedkd.log_probs import TokenLogProbs, token_log_probs
    from fusedkd.loss import KDLoss, KDMetrics, kd_loss, kd_loss_and_metrics
    from fusedkd.routed import Routed
    from fusedkd.sampled import SampledMetrics, sampled_kd_loss, sampled_kd_loss_and_metrics
    from fusedkd.top import TopK, top_k

__all__ = [
    "KDLoss",
    "KDMetrics",
    "LMHead",
    "Routed",
    "SampledMetrics",
    "SparseTeacher",
    "TokenLogProbs",
    "TopK",
    "divergences",
    "kd_loss",
    "kd_loss_and_metrics",
    "row_rules",
    "sampled_kd_loss",
    "sampled_kd_loss_and_metrics",
    "token_log_probs",
    "top_k",
]

# torch takes a second to import, which `fusedkd --help` should not
_HOMES = dict.fromkeys(__all__, "loss")
_HOMES |= dict.fromkeys(("LMHead", "SparseTeacher"), "distributions")
_HOMES["Routed"] = "routed"
_HOMES |= dict.fromkeys(("TokenLogProbs", "token_log_probs"), "log_probs")
_HOMES |= dict.fromkeys(
    ("SampledMetrics", "sampled_kd_loss", "sampled_kd_loss_and_metrics"), "sampled"
)
_HOMES |= dict.fromkeys(("TopK", "top_k"), "top")
_HOMES |= {name: name for name in ("divergences", "row_rules")}
# by what this package is called: a Hub kernel is another (fusedkd.hub)
__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{home}" for name, home in _HOMES.items()})
