"""The losses in plain torch, as people write them: the eager peer, and at fp64 the truth.

Nothing here comes from fusedkd, so that agreeing with it means something; see is_independent for
the exception.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import IGNORE, Case


def _forward_kl(lp: Tensor, lq: Tensor) -> Tensor:
    return F.kl_div(lq, lp, reduction="none", log_target=True)


def _reverse_kl(lp: Tensor, lq: Tensor) -> Tensor:
    return F.kl_div(lp, lq, reduction="none", log_target=True)


def _mixed_kl(lp: Tensor, lq: Tensor, weight: float) -> Tensor:
    return weight * _forward_kl(lp, lq) + (1 - weight) * _reverse_kl(lp, lq)


def _jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    lm = (beta * lp.exp() + (1 - beta) * lq.exp()).log()
    return beta * _forward_kl(lp, lm) + (1 - beta) * _forward_kl(lq, lm)


def _skew_forward_kl(lp: Tensor, lq: Tensor, lam: float) -> Tensor:
    return _forward_kl(lp, (lam * lp.exp() + (1 - lam) * lq.exp()).log())


def _skew_reverse_kl(lp: Tensor, lq: Tensor, lam: float) -> Tensor:
    return _forward_kl(lq, (lam * lq.exp() + (1 - lam) * lp.exp()).log())


def _total_variation(lp: Tensor, lq: Tensor) -> Tensor:
    return 0.5 * (lp.exp() - lq.exp()).abs()


def _alpha(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    cross = (a * lp + (1 - a) * lq).exp()
    return (cross - a * lp.exp() - (1 - a) * lq.exp()) / (a * (a - 1))


def _alpha_beta(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    separate = a / (a + b) * ((a + b) * lp).exp() + b / (a + b) * ((a + b) * lq).exp()
    return (separate - (a * lp + b * lq).exp()) / (a * b)


POINTWISE: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "mixed_kl": _mixed_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "alpha": _alpha,
    "alpha_beta": _alpha_beta,
}


def plain_loss(s: Tensor, t: Tensor, labels: Tensor, case: Case, dtype: torch.dtype) -> Tensor:
    """The weighted loss from logits, computed in ``dtype``."""
    s, t = s.to(dtype), t.to(dtype)
    loss = torch.zeros((), dtype=dtype, device=s.device)
    if case.kd_weight:
        lp = F.log_softmax(t / case.temperature, dim=-1)
        lq = F.log_softmax(s / case.temperature, dim=-1)
        rows = _pointwise(case)(lp, lq).sum(-1)
        loss = case.kd_scale * mean_of_counted(rows, labels)
    if case.ce_weight:
        loss = loss + case.ce_weight * F.cross_entropy(s, labels)
    return loss


def _pointwise(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """(lp, lq) -> each entry's contribution."""
    divergence = case.divergence_object
    formula, tape = POINTWISE.get(divergence.name), divergence.tape
    if formula is None and tape is not None:  # one's own, as its operations: autograd's derivative
        return lambda lp, lq: tape(lp, lq, divergence.params)[0]
    if formula is None:
        return divergence.value
    return lambda lp, lq: formula(lp, lq, *divergence.params)


def is_independent(case: Case) -> bool:
    """Whether the truth of a case owes nothing to fusedkd: a divergence without a formula above is
    held to its own ``Divergence.value``, differentiated by autograd."""
    return not case.kd_weight or case.divergence_object.name in POINTWISE


def mean_of_counted(rows: Tensor, labels: Tensor) -> Tensor:
    """The mean over the rows with a label."""
    counted = labels != IGNORE
    return (rows * counted).sum() / counted.sum()


def gkd_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """``GKDTrainer.generalized_jsd_loss`` of TRL 1.16 ("batchmean"), for where TRL is not there."""
    lq = F.log_softmax(student_logits / temperature, dim=-1)
    lp = F.log_softmax(teacher_logits / temperature, dim=-1)
    if beta == 0:
        jsd = F.kl_div(lq, lp, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(lp, lq, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=lq.dtype, device=lq.device)
        lm = torch.logsumexp(torch.stack([lq + torch.log1p(-b), lp + torch.log(b)]), dim=0)
        kl_teacher = F.kl_div(lm, lp, reduction="none", log_target=True)
        kl_student = F.kl_div(lm, lq, reduction="none", log_target=True)
        jsd = b * kl_teacher + (1 - b) * kl_student
    if labels is None:
        return jsd.sum() / jsd.shape[0]
    mask = labels != IGNORE
    return jsd[mask].sum() / mask.sum().clamp_min(1)


def torchtune_loss(s: Tensor, t: Tensor, labels: Tensor, name: str, weight: float) -> Tensor:
    """torchtune 0.6's ``ForwardKLLoss``, ``ReverseKLLoss`` and ``SymmetricKLLoss``.

    Its forward KL is the teacher's cross-entropy: the same gradient, another number.
    """
    if name == "mixed_kl":
        forward = torchtune_loss(s, t, labels, "forward_kl", 1.0)
        return weight * forward + (1 - weight) * torchtune_loss(s, t, labels, "reverse_kl", 1.0)
    inf_mask = torch.isinf(s)
    lq = F.log_softmax(s, dim=-1, dtype=torch.float32)
    if name == "forward_kl":
        p = F.softmax(t, dim=-1, dtype=torch.float32)
        terms = torch.masked_fill(p * lq, inf_mask, 0)
    else:
        q = F.softmax(s, dim=-1, dtype=torch.float32)
        lp = F.log_softmax(t, dim=-1, dtype=torch.float32)
        terms = torch.masked_fill(q * lp, inf_mask, 0)
        terms = terms - torch.masked_fill(q * lq, inf_mask, 0)
    mask = (labels != IGNORE).int()
    return -torch.sum(terms.sum(-1).view(-1) * mask) / mask.sum()
