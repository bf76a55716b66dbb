"""The nine divergences as a user would write them for ``@divergences.custom``, and random ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from fusedkd import divergences

Formula = Callable[..., Tensor]


def _guarded(weight: Tensor, factor: Tensor) -> Tensor:
    return torch.where(weight > 0, weight * factor, 0.0)


def _log(x: Tensor) -> Tensor:
    return torch.log(torch.where(x > 0, x, 1.0))


@divergences.custom
def own_forward_kl(lp: Tensor, lq: Tensor) -> Tensor:
    return _guarded(lp.exp(), lp - lq)


@divergences.custom
def own_reverse_kl(lp: Tensor, lq: Tensor) -> Tensor:
    return _guarded(lq.exp(), lq - lp)


@divergences.custom
def own_mixed_kl(lp: Tensor, lq: Tensor, *, weight: float = 0.5) -> Tensor:
    p, q = lp.exp(), lq.exp()
    return weight * _guarded(p, lp - lq) + (1 - weight) * _guarded(q, lq - lp)


@divergences.custom
def own_jsd(lp: Tensor, lq: Tensor, *, beta: float = 0.5) -> Tensor:
    p, q = lp.exp(), lq.exp()
    lm = _log(beta * p + (1 - beta) * q)
    return beta * _guarded(p, lp - lm) + (1 - beta) * _guarded(q, lq - lm)


@divergences.custom
def own_skew_forward_kl(lp: Tensor, lq: Tensor, *, lam: float = 0.1) -> Tensor:
    p, q = lp.exp(), lq.exp()
    return _guarded(p, lp - _log(lam * p + (1 - lam) * q))


@divergences.custom
def own_skew_reverse_kl(lp: Tensor, lq: Tensor, *, lam: float = 0.1) -> Tensor:
    p, q = lp.exp(), lq.exp()
    return _guarded(q, lq - _log(lam * q + (1 - lam) * p))


@divergences.custom
def own_total_variation(lp: Tensor, lq: Tensor) -> Tensor:
    return (lp.exp() - lq.exp()).abs() / 2


@divergences.custom
def own_alpha(lp: Tensor, lq: Tensor, *, alpha: float = 0.5) -> Tensor:
    p, q = lp.exp(), lq.exp()
    return (p**alpha * q ** (1 - alpha) - alpha * p - (1 - alpha) * q) / (alpha * (alpha - 1))


@divergences.custom
def own_alpha_beta(lp: Tensor, lq: Tensor, *, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    p, q, both = lp.exp(), lq.exp(), alpha + beta
    powers = alpha / both * p**both + beta / both * q**both
    return (powers - p**alpha * q**beta) / (alpha * beta)


OWN = {name: globals()[f"own_{name}"] for name in divergences.names() if f"own_{name}" in globals()}


def random_formula(seed: int) -> Formula:
    """An expression that is smooth, total and finite, and depends on both sides."""
    rng = random.Random(seed)
    inner = [_expression(rng, 3) for _ in range(2)]

    def formula(lp: Tensor, lq: Tensor, *, a: float = 0.7) -> Tensor:
        leaves = {"p": lp.exp(), "q": lq.exp(), "lp": lp.clamp(min=-30), "lq": lq.clamp(min=-30)}
        first, second = (make(leaves, a) for make in inner)
        return leaves["q"] * first + leaves["p"] * second

    formula.__name__ = f"random_{seed}"
    return formula


Made = Callable[[dict[str, Tensor], "float | Tensor"], Tensor]


def _expression(rng: random.Random, depth: int) -> Made:
    if depth == 0:
        leaf = rng.choice(("p", "q", "lp", "lq"))
        return lambda leaves, a: leaves[leaf]
    x, y = _expression(rng, depth - 1), _expression(rng, rng.randrange(depth))
    number = rng.uniform(0.3, 2.0)
    unary: list[Callable[[Tensor], Tensor]] = [
        lambda v: torch.exp(-v.abs()),
        lambda v: torch.log1p(v * v),
        lambda v: torch.log(v * v + number),
        lambda v: torch.expm1(-v.abs()),
        lambda v: torch.sqrt(v * v + number),
        lambda v: torch.rsqrt(v * v + number),
        lambda v: (v * v + number).reciprocal(),
        lambda v: torch.tanh(v),
        lambda v: torch.sigmoid(v),
        lambda v: v.clamp(min=-number, max=number),
        lambda v: v * number,
        lambda v: -v,
        lambda v: number - v,
        lambda v: torch.square(v) * 0.1,
        lambda v: (v.abs() + number) ** 0.3,
    ]
    binary: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda v, w: v + w,
        lambda v, w: v - w,
        lambda v, w: 0.1 * v * w,
        lambda v, w: v / (w.abs() + number),
        lambda v, w: torch.minimum(v, w),
        lambda v, w: torch.maximum(v, w),
        lambda v, w: torch.where(v > w, v, 0.5 * w),
        lambda v, w: torch.where((v <= number) & ~(w == 0), v, w),
        lambda v, w: torch.logaddexp(v, w),
    ]
    if rng.random() < 0.5:
        one = rng.choice(unary)
        return lambda leaves, a: one(x(leaves, a))
    if rng.random() < 0.2:
        return lambda leaves, a: a * x(leaves, a)
    two = rng.choice(binary)
    return lambda leaves, a: two(x(leaves, a), y(leaves, a))
