"""fusedkd, and the formulas on full logits as people write them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd import LMHead, kd_loss

from .case import Case, Problem
from .formulas import gkd_jsd, plain_loss, torchtune_loss
from .provider import OURS, Forward, Provider, beta_of, gkd_missing


def _no_reason(case: Case) -> str | None:
    return None


def _side(rows: Tensor, weight: Tensor | None) -> Tensor | LMHead:
    return rows if weight is None else LMHead(rows, weight)


def _fusedkd(case: Case, problem: Problem) -> Forward:
    divergence, n_counted = case.divergence_object, case.n_counted

    def forward() -> Tensor:
        loss = kd_loss(
            _side(problem.student, problem.student_weight),
            _side(problem.teacher, problem.teacher_weight),
            problem.labels,
            divergence=divergence,
            temperature=case.temperature,
            kd_weight=case.kd_weight,
            ce_weight=case.ce_weight,
            chunk_bytes=case.chunk_bytes,
            inplace=case.inplace,
            reduction=case.reduction,
        )
        return loss if case.reduction == "mean" else loss.sum() / n_counted

    return forward


# ----------------------------------------------------------------------------------------------
# formulas on full logits


def logits_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both sides' full logits, made by a plain linear layer where the case has heads."""
    if problem.student_weight is None or problem.teacher_weight is None:
        return problem.student, problem.teacher
    with torch.no_grad():
        teacher = F.linear(problem.teacher, problem.teacher_weight)
    return F.linear(problem.student, problem.student_weight), teacher


def _compilable(case: Case) -> str | None:
    if case.device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            return "torch.compile needs a C++ compiler; none was found"
    return None


def _whole(case: Case, problem: Problem) -> Tensor:
    s, t = logits_of(problem)
    return plain_loss(s, t, problem.labels, case, torch.float32)


def _eager(case: Case, problem: Problem) -> Forward:
    return lambda: _whole(case, problem)


def _compiled(case: Case, problem: Problem) -> Forward:
    # Static shapes: the fastest code it can make, at the price of compiling for each shape.
    torch._dynamo.reset()

    def loss(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return plain_loss(s, t, labels, case, torch.float32)

    compiled = torch.compile(loss, dynamic=False)
    return lambda: compiled(*logits_of(problem), problem.labels)


TORCHTUNE = ("forward_kl", "reverse_kl", "mixed_kl")


def _torchtune_missing(case: Case) -> str | None:
    if not case.kd_weight:
        return "torchtune has no cross-entropy of its own"
    name = case.divergence_object.name
    return None if name in TORCHTUNE else f"torchtune has no {name}"


def _torchtune(case: Case, problem: Problem) -> Forward:
    divergence = case.divergence_object
    name, params = divergence.name, divergence.params
    weight = params[0] if params else 1.0

    def forward() -> Tensor:
        s, t = logits_of(problem)
        # It has no temperature and no T^2: its users divide the logits.
        kd = torchtune_loss(
            s / case.temperature, t / case.temperature, problem.labels, name, weight
        )
        return _with_ce(case.kd_scale * kd, s, problem.labels, case)

    return forward


def _with_ce(kd: Tensor, s: Tensor, labels: Tensor, case: Case) -> Tensor:
    return kd + case.ce_weight * F.cross_entropy(s.float(), labels) if case.ce_weight else kd


def _gkd(case: Case, problem: Problem) -> Forward:
    beta = beta_of(case)
    assert beta is not None
    loss = _trl_gkd() or gkd_jsd

    def forward() -> Tensor:
        s, t = logits_of(problem)
        kd = loss(s[None], t[None], problem.labels[None], beta=beta, temperature=case.temperature)
        return _with_ce(case.kd_scale * kd, s, problem.labels, case)

    return forward


def _trl_gkd() -> Callable[..., Tensor] | None:
    """TRL's own, if it is installed and imports."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    except Exception:  # not installed, or at odds with the installed transformers
        return None
    return GKDTrainer.generalized_jsd_loss


PLAIN = [
    Provider(OURS, "this library", _no_reason, _fusedkd),
    Provider("eager", "the formula in torch, at fp32", _no_reason, _eager),
    Provider("compile", "torch.compile of the same", _compilable, _compiled),
    Provider("torchtune", "torchtune's formula", _torchtune_missing, _torchtune, True),
    Provider("gkd", "Hugging Face TRL's generalized_jsd_loss", gkd_missing, _gkd),
]
