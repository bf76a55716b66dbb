"""Who computes the loss. One small object each; what a peer cannot do it says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd import LMHead, kd_loss

from .cases import DTYPES, Case, Problem, native_dtype
from .formulas import POINTWISE, gkd_jsd, plain_loss, torchtune_loss

__all__ = ["FLOOR", "OURS", "Forward", "Provider", "providers"]

OURS, FLOOR = "fusedkd", "floor"

Forward = Callable[[], Tensor | None]  # one forward; None where there is nothing to differentiate


@dataclass(frozen=True)
class Provider:
    """``reason_missing(case)``: why it cannot run the case, or None. ``prepare(case, problem)``:
    everything that happens once, then the function to be timed."""

    name: str
    what: str
    reason_missing: Callable[[Case], str | None]
    prepare: Callable[[Case, Problem], Forward]
    omits_entropy: bool = False  # its loss lacks the teacher's entropy: no error, said in a note


def providers() -> dict[str, Provider]:
    """By name, in the order of the table."""
    from .peers import PEERS

    plain = [
        Provider(OURS, "this library", _no_reason, _fusedkd),
        Provider("eager", "the formula in torch, at fp32", _known_formula, _eager),
        Provider("compile", "torch.compile of the same", _compilable, _compiled),
        Provider("torchtune", "torchtune's formula", _torchtune_missing, _torchtune, True),
        Provider("gkd", "Hugging Face TRL's generalized_jsd_loss", gkd_missing, _gkd),
    ]
    floor = Provider(FLOOR, "the bytes or matrix products alone", _no_reason, _floor)
    return {p.name: p for p in [*plain, *PEERS, floor]}


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


def _known_formula(case: Case) -> str | None:
    name = case.name_and_params[0]
    return None if name in POINTWISE else f"benchmarks/formulas.py has no plain {name}"


def _compilable(case: Case) -> str | None:
    if case.device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            return "torch.compile needs a C++ compiler; none was found"
    return _known_formula(case)


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
    name = case.name_and_params[0]
    return None if name in TORCHTUNE else f"torchtune has no {name}"


def _torchtune(case: Case, problem: Problem) -> Forward:
    name, params = case.name_and_params
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


def beta_of(case: Case) -> float | None:
    """The case's divergence as the beta that GKD, Liger and TRL take; None: they lack it."""
    name, params = case.name_and_params
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": params[0] if params else None}.get(name)


def gkd_missing(case: Case) -> str | None:
    if not case.kd_weight:
        return "has no cross-entropy of its own"
    name = case.name_and_params[0]
    return f"has forward and reverse KL and JSD, no {name}" if beta_of(case) is None else None


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


# ----------------------------------------------------------------------------------------------
# the floor


def _floor(case: Case, problem: Problem) -> Forward:
    return _products(case, problem) if case.form == "head" else _bytes_moved(problem, case)


def _bytes_moved(problem: Problem, case: Case) -> Forward:
    """Two tensors read and one written (evaluation: none written), with nothing computed. Of rows
    that do not count, only the gradient is written.

    One integer addition per 8 bytes runs at memory speed: 13.3 ms for 3 x 156 MB on 2 cores of an
    EPYC 9004, where copies that move the same bytes take 14.1 ms (2026-11-24).
    """
    m = case.n_counted
    s, t = _as_words(problem.student.detach()[:m]), _as_words(problem.teacher[:m])
    if case.mode == "eval":

        def read() -> None:
            s.amax()
            t.amax()

        return read
    out, rest = torch.empty_like(s), torch.empty_like(problem.student[m:])

    def move() -> None:
        torch.add(s, t, out=out)
        rest.zero_()

    return move


def _as_words(x: Tensor) -> Tensor:
    """The same bytes as integers, of the widest type that divides them."""
    flat = x.reshape(-1)
    size = flat.numel() * flat.element_size()
    wide = next(d for d in (torch.int64, torch.int32, torch.int16) if size % d.itemsize == 0)
    return flat.view(wide)


def _products(case: Case, problem: Problem) -> Forward:
    """The bare matrix products of the rows that count, into memory that is there already: two, and
    for training two more (three in all with a frozen head). On a CPU that does not multiply half
    precision, of operands that are fp32 already."""
    assert problem.student_weight is not None and problem.teacher_weight is not None
    dtype = DTYPES[case.dtype if native_dtype(case.device) == "bf16" else "fp32"]
    m = case.n_counted
    sides = problem.student[:m], problem.teacher[:m], problem.student_weight, problem.teacher_weight
    hs, ht, ws, wt = (x.detach().to(dtype) for x in sides)
    s, t = (torch.empty(m, case.vocab, dtype=hs.dtype, device=hs.device) for _ in range(2))
    dh, dw = torch.empty_like(hs), torch.empty_like(ws)

    def multiply() -> None:
        torch.mm(hs, ws.T, out=s)
        torch.mm(ht, wt.T, out=t)
        if case.mode == "train":
            torch.mm(s, ws, out=dh)
            if not case.frozen:
                torch.mm(s.T, hs, out=dw)

    return multiply
