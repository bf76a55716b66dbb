"""Peers that are installed separately: `pip install "fusedkd[bench]"`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import IGNORE, Case, Problem
from .formulas import mean_of_counted
from .provider import Forward, Provider, beta_of, gkd_missing


@cache
def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).split(".")[0]
        return f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}"
    except Exception as error:  # a peer at odds with the installed torch must not end the run
        return f"{module} does not import: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _needs(module: str, *checks: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """What the case rules out first, then whether the module is there."""

    def reason(case: Case) -> str | None:
        missing = next((r for check in checks if (r := check(case))), None)
        return missing or _import_problem(module)

    return reason


def _heads_only(case: Case) -> str | None:
    return None if case.form == "head" else "works from hidden states and heads, not from logits"


def _no_ce(case: Case) -> str | None:
    return "has no cross-entropy term (try --ce-weight 0)" if case.ce_weight else None


def _gpu_only(case: Case) -> str | None:
    return None if case.device == "cuda" else "its Triton kernels need a GPU"


def _ce_only(case: Case) -> str | None:
    return "cross-entropy only (try --kd-weight 0)" if case.kd_weight else None


# ----------------------------------------------------------------------------------------------


def _liger(case: Case, problem: Problem) -> Forward:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=case.ce_weight,
        weight_soft_loss=case.kd_scale,
        beta=beta_of(case),
        temperature=case.temperature,
    )
    p = problem
    return lambda: loss(p.student, p.student_weight, p.teacher, p.teacher_weight, p.labels)


def _liger_triton(case: Case, problem: Problem) -> Forward:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=beta_of(case), temperature=case.temperature)
    p = problem

    def forward() -> Tensor:
        kd = loss(p.student, p.student_weight, p.teacher, p.teacher_weight, p.labels)
        return case.kd_scale * kd

    return forward


def _trl(case: Case, problem: Problem) -> Forward:
    """As its trainer calls it: on a GPU with the rows that count, elsewhere with all of them."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta, p = beta_of(case), problem

    def forward() -> Tensor:
        student, teacher, labels = p.student, p.teacher, p.labels
        if case.counted < 1 and case.device == "cuda":
            valid = labels != IGNORE
            student, teacher, labels = student[valid], teacher[valid], labels[valid]
        rows, _entropy = ChunkedDivergenceFunction.apply(
            *(student, p.student_weight, None, teacher, p.teacher_weight, None),
            *(beta, case.temperature),
        )
        return case.kd_scale * mean_of_counted(rows, labels)

    return forward


def _cce(case: Case, problem: Problem) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if case.device == "cuda" else "torch_compile"
    p = problem

    def forward() -> Tensor:
        ce = linear_cross_entropy(p.student, p.student_weight, p.labels, impl=impl)
        return case.ce_weight * ce

    return forward


def _torch_lce_missing(case: Case) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)"
    if case.form != "head":
        return "works from hidden states and heads, not from logits"
    soft = case.divergence_object.name == "forward_kl" and case.temperature == 1
    if case.kd_weight and not (soft and not case.ce_weight):
        return "takes a soft target at T = 1 or labels, not both"
    if case.kd_weight and case.counted < 1:
        return "with a soft target every row counts"
    return None


def _torch_lce(case: Case, problem: Problem) -> Forward:
    p = problem
    weight = p.student_weight
    assert weight is not None and p.teacher_weight is not None
    teacher_weight = p.teacher_weight

    def forward() -> Tensor:
        if not case.kd_weight:
            return case.ce_weight * F.linear_cross_entropy(p.student, weight, p.labels)
        with torch.no_grad():
            target = F.softmax(F.linear(p.teacher, teacher_weight).float(), -1).to(p.student.dtype)
        return case.kd_scale * F.linear_cross_entropy(p.student, weight, target)

    return forward


PEERS = [
    Provider(
        "liger",
        "Liger's chunked JSD, torch.compiled per chunk",
        _needs("liger_kernel.chunked_loss", _heads_only, gkd_missing),
        _liger,
    ),
    Provider(
        "liger-triton",
        "Liger's fused linear JSD in Triton",
        _needs("liger_kernel.transformers", _heads_only, _gpu_only, _no_ce, gkd_missing),
        _liger_triton,
    ),
    Provider(
        "trl",
        "TRL's ChunkedDivergenceFunction",
        _needs("trl.kernels.chunked_divergence", _heads_only, _no_ce, gkd_missing),
        _trl,
    ),
    Provider(
        "cce",
        "Apple's cut-cross-entropy (on a CPU its torch.compile form)",
        _needs("cut_cross_entropy", _heads_only, _ce_only),
        _cce,
    ),
    Provider("torch-lce", "torch's F.linear_cross_entropy", _torch_lce_missing, _torch_lce, True),
]
