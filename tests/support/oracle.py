"""The loss once more, written from the formulas alone: eager torch at any precision.

Nothing of fusedkd's mathematics is used. ``answer(..., dtype=torch.float64)`` is the truth, the
same call at float32 is "the same formula in eager PyTorch at fp32", whose error is the budget.
``table`` gives value and gradient of each divergence elementwise, with the conventions for p = 0
and q = 0; it judges the rows that hold -inf, where autograd through the plain formulas yields NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from own_rules import RULES
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, divergences
from fusedkd.row_rules import RowRule

INF = math.inf
ABSENT = -1e4  # a log-probability whose exponential is 0, but which is no infinity

# ----------------------------------------------------------------------------------------------
# the divergences


def _mixture(lp: Tensor, lq: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q)"""
    return torch.logaddexp(lp + math.log(weight), lq + math.log1p(-weight))


def _jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    lm = _mixture(lp, lq, beta)
    return beta * lp.exp() * (lp - lm) + (1 - beta) * lq.exp() * (lq - lm)


def _alpha(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    cross = (a * lp + (1 - a) * lq).exp()
    return (cross - a * lp.exp() - (1 - a) * lq.exp()) / (a * (a - 1))


def _alpha_beta(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    cross, c = (a * lp + b * lq).exp(), a + b
    return -(cross - a / c * (c * lp).exp() - b / c * (c * lq).exp()) / (a * b)


def _mixed(lp: Tensor, lq: Tensor, weight: float) -> Tensor:
    return weight * lp.exp() * (lp - lq) + (1 - weight) * lq.exp() * (lq - lp)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda lp, lq: lp.exp() * (lp - lq),
    "reverse_kl": lambda lp, lq: lq.exp() * (lq - lp),
    "mixed_kl": _mixed,
    "jsd": _jsd,
    "skew_forward_kl": lambda lp, lq, lam: lp.exp() * (lp - _mixture(lp, lq, lam)),
    "skew_reverse_kl": lambda lp, lq, lam: lq.exp() * (lq - _mixture(lq, lp, lam)),
    "total_variation": lambda lp, lq: (lp.exp() - lq.exp()).abs() / 2,
    "alpha": _alpha,
    "alpha_beta": _alpha_beta,
}


def formula(divergence: divergences.Divergence) -> Callable[[Tensor, Tensor], Tensor]:
    """Our own formula; for a divergence newer than this file, the one it carries."""
    if divergence.name not in FORMULAS:
        return divergence.value
    return lambda lp, lq: FORMULAS[divergence.name](lp, lq, *divergence.params)


# c of f + c (q - p) between measures, where it is not 0
EXCESS: dict[str, Callable[..., float]] = {
    "forward_kl": lambda: 1.0,
    "reverse_kl": lambda: -1.0,
    "mixed_kl": lambda w: 2 * w - 1,
    "skew_forward_kl": lambda lam: 1 - lam,
    "skew_reverse_kl": lambda lam: lam - 1,
}


def measures(divergence: divergences.Divergence) -> divergences.Divergence:
    """As one between measures that sum to anything."""
    own = formula(divergence)
    c = EXCESS.get(divergence.name, lambda *_: 0.0)(*divergence.params)
    return divergences.Divergence(
        "measures", value=lambda lp, lq: own(lp, lq) + c * (lq.exp() - lp.exp())
    )


def table(name: str, params: tuple[float, ...], lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """(value, d value / d lq), elementwise, total: -inf log-probabilities are fine. Where the
    value is infinite, the infinite term counts as 0 in the gradient."""
    p, q = lp.exp(), lq.exp()
    log_ratio = torch.where(lp == lq, 0.0, lp - lq)  # 0 rather than NaN for -inf - -inf

    def times(weight: Tensor, factor: Tensor) -> Tensor:
        return torch.where(weight == 0, 0.0, weight * factor)

    def finite(x: Tensor) -> Tensor:
        return torch.where(x.isinf(), 0.0, x)

    if name == "forward_kl":
        return times(p, log_ratio), -p
    if name == "reverse_kl":
        return times(q, -log_ratio), times(q, 1 - finite(log_ratio))
    if name == "mixed_kl":
        f, r = table("forward_kl", (), lp, lq), table("reverse_kl", (), lp, lq)
        (w,) = params
        return w * f[0] + (1 - w) * r[0], w * f[1] + (1 - w) * r[1]
    if name in ("jsd", "skew_forward_kl"):
        (b,) = params
        m = b * p + (1 - b) * q
        to_p, to_q = times(p, lp - m.log()), times(q, lq - m.log())
        if name == "jsd":
            return b * to_p + (1 - b) * to_q, (1 - b) * to_q
        return to_p, -times(p * q, (1 - b) / m)
    if name == "skew_reverse_kl":
        (lam,) = params
        m = lam * q + (1 - lam) * p
        value = times(q, lq - m.log())
        return value, value + times(q, 1 - lam * q / m)
    if name == "total_variation":
        return (p - q).abs() / 2, -q * torch.sign(p - q) / 2
    a, b = params if name == "alpha_beta" else (params[0], 1 - params[0])
    nowhere = (lp == -INF) & (lq == -INF)

    def power(exponent: Tensor) -> Tensor:
        return torch.where(nowhere, 0.0, exponent.exp())

    cross, big_q = power(a * lp + b * lq), power((a + b) * lq)
    value = -(cross - a / (a + b) * power((a + b) * lp) - b / (a + b) * big_q) / (a * b)
    return value, -(finite(cross) - finite(big_q)) / a


# ----------------------------------------------------------------------------------------------
# the whole loss


@dataclass
class Answer:
    """What a correct ``kd_loss`` returns, and how hard it is to compute."""

    loss: Tensor
    grads: dict[str, Tensor]  # "logits", or "hidden", "weight" and perhaps "bias"
    metrics: dict[str, float]
    weighted_rows: Tensor  # (N,) what each token adds to the sum
    row_scale: Tensor  # (N,) size of the token's weight over the normaliser, times its upstream
    d_raw: Tensor  # (N, C) gradient of the raw logits
    # First-order effect of perturbing every log-probability by one relative unit: what no
    # arithmetic of that precision can avoid. (N,) each, weighted like the rows.
    loss_condition: Tensor
    grad_condition: Tensor


def tensors(side: Tensor | LMHead | SparseTeacher) -> dict[str, Tensor]:
    """The tensors of one side, by the names used in ``Answer.grads``."""
    if isinstance(side, Tensor):
        return {"logits": side}
    if isinstance(side, SparseTeacher):
        return {"log_probs": side.log_probs}
    named = {"hidden": side.hidden, "weight": side.weight, "bias": side.bias}
    return {name: x for name, x in named.items() if x is not None}


def _raw(side: Tensor | LMHead, parts: dict[str, Tensor]) -> Tensor:
    if isinstance(side, Tensor):
        return parts["logits"].reshape(-1, side.shape[-1])
    hidden = parts["hidden"].reshape(-1, side.hidden.shape[-1])
    rows = slice(None) if side.ids is None else side.ids
    logits = hidden @ parts["weight"][rows].T
    return logits + parts["bias"][rows] if "bias" in parts else logits


def _transformed(side: Tensor | LMHead, raw: Tensor, vocab_size: int | None) -> Tensor:
    if isinstance(side, LMHead):
        raw = raw * side.logit_scale
        if side.softcap is not None:
            raw = side.softcap * torch.tanh(raw / side.softcap)
    return raw[:, :vocab_size]


def _spread(teacher: SparseTeacher, columns: int, dtype: torch.dtype) -> Tensor:
    """Its log-probabilities at their ids, (N, columns), and the tail's behind them; ABSENT
    elsewhere."""
    shape = (teacher.indices.shape[:-1].numel(), teacher.indices.shape[-1])
    ids, lp = teacher.indices.reshape(shape).long(), teacher.log_probs.reshape(shape)
    full = torch.full((len(ids), columns + 2), ABSENT, dtype=torch.float64, device=ids.device)
    full.scatter_(1, torch.where(ids == -1, columns + 1, ids), lp.double())
    full = full[:, :-1].nan_to_num(neginf=ABSENT)
    p = full.exp()
    total = p.sum(-1)
    if teacher.tail in ("renormalize", "conditional"):
        full[:, :-1] -= torch.where(full[:, :-1] > ABSENT / 2, total.log()[:, None], 0.0)
    elif teacher.tail == "bucket":
        lost = (p * full).sum(-1).abs() * (2**-53 if dtype == torch.float64 else 2**-24)
        full[:, -1] = torch.where(total < 1, 1 - total, lost).log().clamp(min=ABSENT)
    return full


def _compared(
    teacher: Tensor | LMHead | SparseTeacher, t: Tensor, z: Tensor, temperature: float, cool: float
) -> tuple[Tensor, Tensor]:
    """The log-probabilities that a divergence compares, of the teacher and of the student."""
    lq = torch.log_softmax(z / temperature, -1)
    if not isinstance(teacher, SparseTeacher):
        return torch.log_softmax(t / cool, -1), lq
    listed = t[:, :-1] > ABSENT / 2
    if teacher.tail == "generalized":
        return t[:, :-1], torch.where(listed, lq, ABSENT)
    if teacher.tail == "conditional":
        return t[:, :-1], torch.where(listed, z / temperature, ABSENT).log_softmax(-1)
    if teacher.tail != "bucket":
        return t[:, :-1], lq
    others = torch.where(listed, ABSENT, lq).logsumexp(-1, keepdim=True)
    return t, torch.cat([torch.where(listed, lq, ABSENT), others], -1)


def answer(
    student: Tensor | LMHead,
    teacher: Tensor | LMHead | SparseTeacher,
    labels: Tensor | None = None,
    *,
    divergence: str | divergences.Divergence = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    row_rule: RowRule | None = None,
    upstream: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **_ignored: Any,  # inplace, chunk_bytes, backend: how, not what
) -> Answer:
    """What kd_loss promises, on the inputs as they are (quantised), computed at ``dtype``."""
    if isinstance(divergence, str):
        divergence = divergences.make(divergence)
    leaves = {k: x.detach().to(dtype).requires_grad_() for k, x in tensors(student).items()}
    raw = _raw(student, leaves)
    z = _transformed(student, raw, vocab_size)
    constants = {k: x.detach().to(dtype) for k, x in tensors(teacher).items()}
    if isinstance(teacher, SparseTeacher):
        wide = torch.promote_types(
            teacher.log_probs.dtype, next(iter(tensors(student).values())).dtype
        )
        t = _spread(teacher, z.shape[1], wide).to(dtype)
    else:
        t = _transformed(teacher, _raw(teacher, constants), vocab_size)
    leading = next(iter(tensors(student).values())).shape[:-1]
    n = leading.numel()

    weight = torch.ones(n, dtype=dtype, device=z.device)
    if token_weights is not None:
        weight = token_weights.detach().reshape(-1).to(dtype)
    if labels is not None:
        weight = weight * (labels.reshape(-1) != ignore_index)
    counted = weight != 0
    row_scale = weight[counted]
    if reduction == "mean" or normalizer is not None:
        row_scale = row_scale / (weight.sum() if normalizer is None else float(normalizer))

    cool = temperature if teacher_temperature is None else teacher_temperature
    lp, lq = _compared(teacher, t[counted], z[counted], temperature, cool)
    if isinstance(teacher, SparseTeacher) and teacher.tail == "generalized":
        divergence = measures(divergence)
    kd = formula(divergence)(lp, lq).sum(-1)
    kd_scale = kd_weight * (temperature**2 if scale_by_t2 else 1.0)
    y = None if labels is None else labels.reshape(-1)[counted]
    ce = _cross_entropy(z[counted], y, label_smoothing) if y is not None else None

    factor = torch.ones_like(kd)
    if row_rule is not None:
        factor = _factor(
            row_rule, teacher, kd, lp, torch.log_softmax(z[counted] / temperature, -1), y
        )
    per_row = torch.zeros_like(kd)
    if kd_scale:
        per_row = per_row + kd_scale * torch.where(factor == 0, 0.0, factor * kd)
    if ce_weight and ce is not None:
        per_row = per_row + ce_weight * ce
    if z_loss_weight:
        per_row = per_row + z_loss_weight * z[counted].logsumexp(-1) ** 2
    rows = torch.zeros(n, dtype=dtype, device=z.device).index_put((counted,), per_row * row_scale)
    loss = rows.reshape(leading) if reduction == "none" else rows.sum()
    scaled = (loss if upstream is None else loss * upstream.to(dtype)).sum()
    *grads, d_raw = (
        torch.autograd.grad(scaled, [*leaves.values(), raw], allow_unused=True)
        if scaled.requires_grad
        else [None] * (len(leaves) + 1)
    )
    zeros = [*leaves.values(), raw]
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values())]  # noqa: B905
    d_raw = torch.zeros_like(zeros[-1]) if d_raw is None else d_raw

    by_loss, by_grad = (factor * x for x in _conditions(divergence, lp, lq))
    size = z[counted].detach().abs().amax(-1) if z.shape[1] else kd
    loss_condition = torch.zeros_like(rows)
    by_z = 2 * z_loss_weight * (1 + size)  # the logsumexp moves by a unit of the logits
    hard = ce_weight * (1 + size) + by_z * (1 + size)
    loss_condition[counted] = row_scale * (kd_scale * by_loss + hard)
    grad_condition = torch.zeros_like(rows)
    grad_condition[counted] = row_scale * (kd_scale / temperature * by_grad + ce_weight + by_z)
    if isinstance(student, LMHead):
        grad_condition *= abs(student.logit_scale)
    up = rows.new_ones(n) if upstream is None else upstream.detach().reshape(-1).expand(n)
    scale = torch.zeros_like(rows)
    scale[counted] = row_scale
    return Answer(
        loss.detach(),
        dict(zip(leaves, grads, strict=True)),
        _metrics(
            kd,
            ce,
            lp,
            torch.log_softmax(z[counted] / temperature, -1),
            z[counted],
            t[counted][:, : z.shape[1]],
            y,
            _masses(teacher, z[counted] / temperature, counted),
        ),
        rows.detach(),
        (scale * up).abs().to(rows.dtype),
        d_raw,
        loss_condition.abs(),
        (grad_condition * up.to(grad_condition)).abs(),
    )


def _factor(
    rule: RowRule,
    teacher: Tensor | LMHead | SparseTeacher,
    kd: Tensor,
    lp: Tensor,
    lq: Tensor,
    y: Tensor | None,
) -> Tensor:
    """By the Python function that the rule was made of; a constant."""
    tail = isinstance(teacher, SparseTeacher) and teacher.tail == "bucket"
    listed = lp[:, :-1] if tail else lp
    known = {
        "divergence": kd.clamp(min=0),  # the tail "drop" may have less
        "teacher_entropy": -(lp.exp() * lp).sum(-1),
        "student_entropy": -(lq.exp() * lq).sum(-1),
        "label_log_prob": kd if y is None else lq.gather(-1, y[:, None])[:, 0],
        "teacher_top1": listed.amax(-1).exp(),
        "student_top1": lq.amax(-1).exp(),
    }
    made = RULES[rule.name]
    parameters = dict(zip(made.defaults, rule.params, strict=True))
    return made.formula(*(known[x].detach() for x in made.inputs), **parameters).to(kd.dtype)


def _cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    log_q = torch.log_softmax(z, -1)
    right = log_q.gather(-1, labels[:, None])[:, 0]
    if not smoothing:
        return -right
    return -(1 - smoothing) * right - smoothing * log_q.mean(-1)


def _conditions(
    divergence: divergences.Divergence, lp: Tensor, lq: Tensor
) -> tuple[Tensor, Tensor]:
    a, b = lp.detach().clone().requires_grad_(), lq.detach().clone().requires_grad_()
    value = formula(divergence)(a, b)
    by_p, by_q = torch.autograd.grad(value.sum(), (a, b), create_graph=True)
    curved_p, curved_q = (
        torch.autograd.grad(by_q.sum(), (a, b), allow_unused=True, materialize_grads=True)
        if by_q.requires_grad
        else (torch.zeros_like(a), torch.zeros_like(b))
    )
    # 1/4: p and q themselves are rounded, even where log p = log q = 0
    loss = (value.abs() + (by_p * a).abs() + (by_q * b).abs()).detach().sum(-1) + 0.25
    by_q = by_q.detach().abs()
    # How the elementwise gradient itself moves: it can be a small difference of large terms.
    moved = (curved_p * a).abs() + (curved_q * b).abs()
    by_q = by_q + moved.detach().nan_to_num(posinf=0.0) / 4
    grad = by_q + b.detach().exp() * by_q.sum(-1, keepdim=True)
    return loss, grad.amax(-1) + 1e-6  # a vocabulary of one: 0 up to the square of a rounding


def _masses(
    teacher: Tensor | LMHead | SparseTeacher, z: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Of a sparse teacher's ids: the student's and its own."""
    if not isinstance(teacher, SparseTeacher):
        return None
    shape = (len(counted), teacher.indices.shape[-1])
    ids, lp = (x.reshape(shape)[counted] for x in (teacher.indices.long(), teacher.log_probs))
    listed = ids != -1
    q = z.softmax(-1).gather(-1, ids.clamp(min=0))
    return (q * listed).sum(-1), torch.where(listed, lp.double().exp(), 0.0).sum(-1)


def _metrics(
    kd: Tensor,
    ce: Tensor | None,
    lp: Tensor,
    lq: Tensor,
    z: Tensor,
    t: Tensor,
    y: Tensor | None,
    mass: tuple[Tensor, Tensor] | None,
) -> dict[str, float]:
    def mean(x: Tensor) -> float:
        return x.double().mean().item() if x.numel() else 0.0

    def entropy(log: Tensor) -> Tensor:
        return -torch.where(log == -INF, 0.0, log.exp() * log).sum(-1)

    def first_max(x: Tensor) -> Tensor:
        return (x == x.amax(-1, keepdim=True)).to(torch.int8).cpu().argmax(-1).to(x.device)

    top_t = torch.where((t > ABSENT).any(-1), first_max(t), -1)  # a row may be all padding
    nothing = math.nan if len(kd) else 0.0
    masses = {"student_mass": mean(mass[0]), "teacher_mass": mean(mass[1])} if mass else {}
    return masses | {
        "kd": mean(kd),
        "ce": nothing if ce is None else mean(ce),
        "teacher_entropy": mean(entropy(lp)),
        "student_entropy": mean(entropy(lq)),
        "top1_agreement": mean(first_max(z) == top_t),
        "student_accuracy": nothing if y is None else mean(first_max(z) == y),
        "teacher_accuracy": nothing if y is None else mean(top_t == y),
        "num_tokens": len(kd),
    }


@dataclass
class Case:
    """One random call of kd_loss: its arguments, and what is multiplied to its gradient."""

    student: Tensor | LMHead
    teacher: Tensor | LMHead | SparseTeacher
    labels: Tensor | None
    keywords: dict[str, Any]
    upstream: Tensor | None
    wanted: list[str]
    layout: str = ""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def side(x: Tensor | LMHead | SparseTeacher) -> str:
            if isinstance(x, Tensor):
                return f"{x.dtype} {tuple(x.shape)} strides {x.stride()}"
            if isinstance(x, SparseTeacher):
                return f"{x.tail} {x.log_probs.dtype} {x.indices.tolist()} {x.log_probs.tolist()}"
            extras = f"scale={x.logit_scale} cap={x.softcap} bias={x.bias is not None}"
            return (
                f"LMHead({x.hidden.dtype} {tuple(x.hidden.shape)} {tuple(x.weight.shape)} {extras})"
            )

        return (
            f"student {side(self.student)}\nteacher {side(self.teacher)}\n"
            f"labels {None if self.labels is None else self.labels.tolist()}\n"
            f"keywords {self.keywords}\nupstream {self.upstream} wanted {self.wanted}"
        )


def table_value(divergence: divergences.Divergence) -> float:
    """What an entry costs that the teacher lacks and the student has."""
    lp, lq = torch.tensor([-INF], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)
    if divergence.name not in FORMULAS:
        return divergence.value(lp, lq).item()
    return table(divergence.name, divergence.params, lp, lq)[0].item()
