"""Liger-Kernel's distillation losses, by Liger's names, signatures and values.

Replacing the import is the whole migration; Liger need not be installed::

    from fusedkd.integrations.liger import LigerFusedLinearJSDLoss

Values are Liger's (0.8.5): no T^2, the mean over the tokens that count, beta 0 forward KL and beta
1 reverse KL, with M = beta * teacher + (1 - beta) * student between. Leading dimensions are
flattened. What differs is what was wrong there:

* all is computed in fp32, from products of half-precision operands that are not rounded;
* a teacher with more columns than the student is an error instead of a comparison with zeros: say
  how many are real, ``LigerFusedLinearJSDLoss(vocab_size=...)``;
* labels that are all ignored give 0 and zero gradients; probabilities of 0 give no NaN;
* the parts of ``return_soft_hard_loss`` carry no graph, as nothing flows through them;
* the teacher is a constant, also where its tensors require grad.

``compiled``, ``chunk_size`` and ``accum_dtype`` have no effect: nothing is compiled, logits are
held by bytes (see :func:`fusedkd.kd_loss`), weight gradients add up in fp32.

The linear losses run :func:`fusedkd.kd_loss`. Those on probabilities (:class:`LigerJSD`,
:class:`LigerKLDIVLoss`, :class:`LigerTVDLoss`) are plain torch, see
:mod:`fusedkd.integrations.liger.probabilities`; where logits are at hand ``kd_loss`` on them is
faster and takes less memory.
"""

from fusedkd.integrations.conventions import generalized_jsd
from fusedkd.integrations.liger.cross_entropy import (
    CrossEntropyOutput,
    LigerFusedCETVDFunction,
    LigerFusedCETVDLoss,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)
from fusedkd.integrations.liger.heads import (
    LigerFusedLinearCosineSimilarityFunction,
    LigerFusedLinearCosineSimilarityLoss,
    LigerFusedLinearJSD,
    LigerFusedLinearJSDFunction,
    LigerFusedLinearJSDLoss,
    liger_fused_linear_cosine,
    liger_fused_linear_jsd,
)
from fusedkd.integrations.liger.linear_kl import (
    LigerFusedLinearKLDivFunction,
    LigerFusedLinearKLDivLoss,
    liger_fused_linear_kl_div,
)
from fusedkd.integrations.liger.probabilities import (
    LigerJSD,
    LigerJSDFunction,
    LigerKLDIVLoss,
    LigerKLDivLossFunction,
    LigerTVDLoss,
    LigerTVDLossFunction,
    liger_jsd,
    liger_kl_div,
    liger_tvd,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedCETVDFunction",
    "LigerFusedCETVDLoss",
    "LigerFusedLinearCosineSimilarityFunction",
    "LigerFusedLinearCosineSimilarityLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDFunction",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivFunction",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "LigerJSDFunction",
    "LigerKLDIVLoss",
    "LigerKLDivLossFunction",
    "LigerTVDLoss",
    "LigerTVDLossFunction",
    "generalized_jsd",
    "liger_fused_linear_cosine",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kl_div",
    "liger_jsd",
    "liger_kl_div",
    "liger_tvd",
]
