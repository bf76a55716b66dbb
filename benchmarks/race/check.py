"""Every provider's answer against fp64 truth, before it is timed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import DTYPES, LOSS_SCALE, Case, Problem
from .formulas import mean_of_counted, plain_loss
from .provider import OURS, Forward, Provider

CHECK_ROWS = 16
BLOCK = 8192  # vocabulary entries at a time: the truth needs no fp64 copy of a weight


class Wrong(Exception):
    """fusedkd itself failed: nothing is timed."""


@dataclass(frozen=True)
class Verdict:
    """Relative errors: of the loss, and of all gradients together (Euclidean norm)."""

    loss_error: float
    grad_error: float | None  # None in evaluation
    word: str  # "ok", "imprecise" or "WRONG"


def gradients(forward: Forward, problem: Problem, case: Case) -> tuple[Tensor, list[Tensor]]:
    """One training step: the loss, and the gradients times LOSS_SCALE."""
    loss = forward()
    assert loss is not None
    scale = torch.full_like(loss, LOSS_SCALE[case.dtype])
    return loss, list(torch.autograd.grad(loss, problem.leaves, scale))


def checked_case(case: Case) -> Case:
    """The same problem with few rows, and two chunks where fusedkd makes chunks."""
    n = min(case.n, CHECK_ROWS)
    # logits take at most 8 bytes an entry, so this budget holds half the rows
    chunk = max(1, n // 2) * case.vocab * 8 if case.form == "head" else None
    return case.but(n=n, chunk_bytes=chunk, threads=None)


class Truth:
    """The answer at fp64 on the first rows of a problem, made once for all providers."""

    def __init__(self, case: Case, problem: Problem) -> None:
        self.case = checked_case(case)
        self.problem = p = problem.with_case(self.case)
        t = _logits(p.teacher, p.teacher_weight)
        s = _logits(p.student, p.student_weight).requires_grad_()
        loss = plain_loss(s, t, p.labels, self.case, torch.float64)
        self.loss = loss.item()
        self.entropy = _entropy(self.case, t, p.labels)
        if self.case.mode == "train":
            self.d_logits = torch.autograd.grad(loss, s)[0] * LOSS_SCALE[case.dtype]
            self.d_rows = _d_rows(self.d_logits, p.student_weight)

    def check(self, provider: Provider) -> Verdict:
        """Run the provider on the same rows and compare."""
        case, problem = self.case, self.problem.with_case(self.case)
        expected = self.loss + (self.entropy if provider.omits_entropy else 0.0)
        forward = provider.prepare(case, problem)
        if case.mode == "eval":
            with torch.no_grad():
                return _verdict(case, _relative(_value(forward()), expected), None)
        loss, grads = gradients(forward, problem, case)
        return _verdict(case, _relative(_value(loss), expected), self._gradient_error(grads))

    def _gradient_error(self, grads: list[Tensor]) -> float:
        """|| got - truth || / || truth ||, the worst of the leaves. For logits also without the
        labels' columns, where cross-entropy's large entries would hide the rest."""
        error = _ratio([(grads[0].double(), self.d_rows)])
        p = self.problem
        if p.student_weight is None:
            columns = p.labels.clamp(min=0)[:, None]  # an uncounted row's gradient is 0 anyway
            soft = torch.ones_like(self.d_rows).scatter_(1, columns, 0.0)
            return max(error, _ratio([(grads[0] * soft, self.d_rows * soft)]))
        if len(grads) > 1:
            rows, d = p.student.detach().double(), self.d_logits
            pairs = ((grads[1][b].double(), d[:, b].T @ rows) for b in _blocks(len(grads[1])))
            error = max(error, _ratio(pairs))
        return error


def _value(loss: Tensor | None) -> float:
    assert loss is not None
    return loss.item()


def _relative(value: float, truth: float) -> float:
    return abs(value - truth) / max(abs(truth), 1e-12)


def _verdict(case: Case, loss: float, grad: float | None) -> Verdict:
    """Imprecise is more than one unit in the last place of the dtype (what storing the gradient
    costs; but never less than a few hundred fp32 roundings), wrong is more than a tenth."""
    worst = max(loss, grad or 0.0)
    allowed = max(torch.finfo(DTYPES[case.dtype]).eps, 3e-5)
    if not math.isfinite(worst) or not math.isfinite(loss) or worst > 0.1:
        return Verdict(loss, grad, "WRONG")
    return Verdict(loss, grad, "imprecise" if worst > allowed else "ok")


# ----------------------------------------------------------------------------------------------


def _blocks(vocab: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, vocab, BLOCK)]


def _logits(rows: Tensor, weight: Tensor | None) -> Tensor:
    rows = rows.detach().double()
    if weight is None:
        return rows
    w = weight.detach()
    return torch.cat([rows @ w[block].double().T for block in _blocks(len(w))], dim=-1)


def _entropy(case: Case, t: Tensor, labels: Tensor) -> float:
    """What a "forward KL" that is the teacher's cross-entropy reports too much."""
    divergence = case.divergence_object
    name, params = divergence.name, divergence.params
    share = {"forward_kl": 1.0, "mixed_kl": params[0] if params else 0.0}.get(name, 0.0)
    lp = torch.log_softmax(t / case.temperature, -1)
    return -share * case.kd_scale * mean_of_counted((lp.exp() * lp).sum(-1), labels).item()


def _d_rows(d_logits: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of the hidden states; without a head, of the logits themselves."""
    if weight is None:
        return d_logits
    w = weight.detach()
    products = (d_logits[:, block] @ w[block].double() for block in _blocks(len(w)))
    return torch.stack(list(products)).sum(0)


def _ratio(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    difference = size = 0.0
    for got, expected in pairs:
        difference += (got - expected).square().sum().item()
        size += expected.square().sum().item()
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def refuse_if_wrong(provider: Provider, case: Case, verdict: Verdict) -> None:
    """fusedkd must be right before any of its times mean something."""
    if provider.name == OURS and verdict.word != "ok":
        grad = "" if verdict.grad_error is None else f", gradient {verdict.grad_error:.1e}"
        raise Wrong(
            f"fusedkd is {verdict.word} on {case.label}: relative error of the loss "
            f"{verdict.loss_error:.1e}{grad}. Nothing was timed. `fusedkd doctor` shows what "
            "works here; please report it."
        )
