"""How far a loss, its gradients and its metrics may be from fp64: what eager torch itself loses."""

from __future__ import annotations

import math

import torch
from oracle import Answer, Case, answer, tensors
from torch import Tensor

from fusedkd import LMHead, kd_loss, kd_loss_and_metrics

FACTOR = 3  # on eager's own largest error, which is one draw of a random variable


def _precise(case: Case) -> bool:
    """Whether everything is computed in fp64: a head's logits are only if it is fp64 itself."""
    sides = (case.student, case.teacher)
    heads = [x.hidden.dtype for x in sides if isinstance(x, LMHead)]
    dtypes = [next(iter(tensors(x).values())).dtype for x in sides]
    return torch.float64 in dtypes and all(dtype == torch.float64 for dtype in heads)


def _unit(case: Case) -> float:
    """One unit of the arithmetic. In fp64 the "truth" itself is as inexact as what it judges, at
    T = 0.01 a hundred units and more; what computes in fp32 by mistake is off by 5e8."""
    return 256 * 2.0**-52 if _precise(case) else 2.0**-23


def _rounding(exact: Tensor, dtype: torch.dtype, times: int, scale: float) -> Tensor:
    """Half a unit in the last place, each time; ``scale``: the factor on what is rounded before
    it is multiplied, for numbers so small that the unit no longer shrinks with them."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    return times * (info.eps / 2 * exact.abs() + smallest / 2 * max(1.0, scale))


def _grad_budget(case: Case, truth: Answer, eager: Answer, name: str) -> Tensor:
    """How far the gradient called ``name`` may be from the truth, elementwise."""
    exact = truth.grads[name]
    dtype = tensors(case.student)[name].dtype
    up = 1.0 if case.upstream is None else float(case.upstream.abs().max())
    # Rounded when saved and, unless the factor is 1, again when the backward scales it. fp16
    # leaves the divisor to the backward too.
    once = case.upstream is None and dtype != torch.float16
    roundings = 1 if once else 2 if dtype == torch.float64 else 3  # the factor itself is rounded
    unit = _unit(case)
    eager_error = (eager.grads[name].double() - exact).abs() * unit / 2**-23
    budget = _rounding(exact, dtype, roundings, up)
    condition = truth.grad_condition * unit * 2
    if name == "logits":
        # Eager's largest error on a token of weight 1, times each token's weight.
        by_row = eager_error.reshape(len(condition), -1).amax(-1) / truth.row_scale
        by_row = by_row.nan_to_num(0.0, 0.0).max() * truth.row_scale
        return budget + (FACTOR * by_row + condition).view(*exact.shape[:-1], 1)
    # The gradient of the logits is rounded to the operands' dtype before the two products of a
    # head, as in any half-precision linear layer; products and sums are in fp32.
    head, size = case.student, truth.d_raw.abs()
    info = torch.finfo(dtype)
    size = size * max(info.eps / 2, 2 * unit)
    if dtype != torch.float64:
        size = size + (info.tiny * info.eps * max(1.0, up)) * (size > 0)
    size = size + condition[:, None]
    hidden = head.hidden.detach().double().reshape(len(size), -1).abs()
    rows = slice(None) if head.ids is None else head.ids
    if name == "hidden":
        spread = (size @ head.weight[rows].detach().double().abs()).view(exact.shape)
    else:
        spread = torch.zeros_like(exact)  # rows that are no part of the vocabulary have exactly 0
        spread[rows] = size.T @ hidden if name == "weight" else size.sum(0)
    return budget + FACTOR * eager_error.max() + spread


def _loss_budget(case: Case, truth: Answer, eager: Answer) -> Tensor:
    unit = _unit(case)
    error = (eager.weighted_rows.double() - truth.weighted_rows).abs() * unit / 2**-23
    by_row = FACTOR * error + 2 * unit * truth.loss_condition
    if case.keywords["reduction"] == "none":
        return by_row.view(truth.loss.shape) + unit * truth.loss.abs() + 1e-300
    return by_row.sum() + unit * truth.loss.abs() + 1e-300


def check_within(what: str, got: Tensor, exact: Tensor, budget: Tensor, case: object) -> float:
    """The largest error as a share of its budget."""
    error = (got.detach().double() - exact).abs()
    bad = ~(error <= budget)  # a NaN is bad
    if bad.any():
        worst = torch.where(bad, error / budget, 0.0).nan_to_num(nan=torch.inf).flatten().argmax()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} are outside the budget; the worst is "
            f"{got.detach().flatten()[worst].item():.9g}, the truth "
            f"{exact.flatten()[worst].item():.9g}, the budget "
            f"{budget.expand_as(exact).flatten()[worst].item():.3g}\n{case}"
        )
    return float((error / budget).nan_to_num(0.0).max()) if error.numel() else 0.0


def check(
    case: Case, backend: str | None, metrics: bool = False, seen: Case | None = None
) -> float:
    """The largest error as a share of its budget. Without pytest: ``make gpu`` may have none.

    Args:
        seen: what the oracle sees in the case's place.

    Raises:
        AssertionError: something is outside of its budget, or not of the promised shape or dtype.
    """
    arguments = (case.student, case.teacher, case.labels)
    keywords = {**case.keywords, "upstream": case.upstream}
    judged = arguments if seen is None else (seen.student, seen.teacher, seen.labels)
    truth = answer(*judged, **keywords)
    eager = answer(*judged, **keywords, dtype=torch.float32)
    if metrics:
        loss, metric_values = kd_loss_and_metrics(*arguments, **case.keywords, backend=backend)
        for name, expected in truth.metrics.items():
            got = getattr(metric_values, name)
            assert got.dim() == 0 and not got.requires_grad
            both_nan = math.isnan(got) and math.isnan(expected)
            assert both_nan or math.isclose(got, expected, rel_tol=2e-4, abs_tol=2e-5), name
    else:
        loss = kd_loss(*arguments, **case.keywords, backend=backend)
    sides = [next(iter(tensors(x).values())) for x in (case.student, case.teacher)]
    wide = torch.float64 in [x.dtype for x in sides]
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    none = case.keywords["reduction"] == "none"
    assert loss.shape == (sides[0].shape[:-1] if none else ())
    named = tensors(case.student)
    upstream = case.upstream
    if upstream is None and none:
        upstream = loss.new_ones(()).expand(loss.shape)  # as sum() sends it
    elif upstream is not None:
        upstream = upstream.to(loss.dtype)
        upstream = torch.stack([upstream, upstream * math.nan], -1)[..., 0]  # any strides
    grads = torch.autograd.grad(loss, [named[name] for name in case.wanted], upstream)
    scores = [check_within("loss", loss, truth.loss, _loss_budget(case, truth, eager), case)]
    for name, grad in zip(case.wanted, grads, strict=True):
        assert grad.dtype == named[name].dtype and grad.shape == named[name].shape
        budget = _grad_budget(case, truth, eager, name)
        scores.append(check_within(f"gradient of {name}", grad, truth.grads[name], budget, case))
        if name == "logits":
            columns = case.keywords.get("vocab_size") or grad.shape[-1]
            assert (grad[..., columns:] == 0).all(), "padding columns have a gradient"
    return max(scores)


def plain_case(
    seed: int, device: torch.device, n: int, v: int, dtype: torch.dtype, **keywords: object
) -> Case:
    g = torch.Generator().manual_seed(seed)
    s = (2 * torch.randn(n, v, generator=g)).to(dtype).to(device).requires_grad_()
    t = (2 * torch.randn(n, v, generator=g)).to(dtype).to(device)
    labels = torch.randint(v, (n,), generator=g).to(device)
    keywords = {"temperature": 2.0, "ce_weight": 0.5, "reduction": "mean", **keywords}
    return Case(s, t, labels, keywords, None, ["logits"])
