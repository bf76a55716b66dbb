"""Tapes as sums of products: what may go, what is homogeneous, what a built-in divergence is."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from own_divergences import OWN, Formula
from torch import Tensor

from fusedkd import divergences
from fusedkd.algebra import simplified
from fusedkd.algebra.guards import unguarded
from fusedkd.algebra.sums import Sums
from fusedkd.tape import Tape
from fusedkd.trace import trace

INF = float("inf")
LOGS = torch.tensor([-INF, -1e4, -400.0, -60.0, -9.0, -2.0, -0.7, -1e-3, 0.0], dtype=torch.float64)


def _points() -> tuple[Tensor, Tensor]:
    random = 4 * torch.randn(2, 400, dtype=torch.float64).abs().neg()
    lp, lq = (x.flatten() for x in torch.meshgrid(LOGS, LOGS, indexing="ij"))
    return torch.cat([lp, random[0]]), torch.cat([lq, random[1]])


def _same_or_not_finite(tape: Tape, other: Tape, parameters: tuple[float, ...]) -> None:
    """Value by value; of the derivative only where the value is finite."""
    lp, lq = _points()
    value, grad = tape(lp, lq, parameters)
    found, found_grad = other(lp, lq, parameters)
    for a, b in ((value, found), (grad, found_grad)):
        looked_at = found.isfinite() & b.isfinite()
        torch.testing.assert_close(b[looked_at], a[looked_at], rtol=1e-9, atol=1e-13)
    positive = (lp > -60) & (lq > -60)
    assert (found.isfinite() & found_grad.isfinite())[positive].all()


@pytest.mark.parametrize("name", OWN)
def test_ours_without_guards(name: str) -> None:
    own = OWN[name]
    simple = simplified(own.tape)
    assert simple.homogeneous == (name != "alpha_beta")
    assert not [n for n in simple.tape.nodes if n.op == "where"]
    for parameters in (tuple(own.defaults.values()), tuple(0.3 for _ in own.defaults)):
        _same_or_not_finite(own.tape, simple.tape, parameters)


def test_a_derivative_loses_what_cancels() -> None:
    """JSD's is (1 - b) q (log q - log m), a term of the value; nothing is divided."""
    tape = simplified(OWN["jsd"].tape).tape
    assert [n.op for n in tape.nodes].count("log") == 1
    assert "div" not in [n.op for n in tape.nodes]
    assert tape.grad < tape.value


def _p(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    return lp.exp(), lq.exp()


def guarded_not_zero(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = _p(lp, lq)
    return torch.where(p > 0, p * (lp - lq), q)


def guarded_not_a_factor(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = _p(lp, lq)
    return torch.where(p > 0, q * torch.exp(-(lp - lq).abs()), 0.0)


def looked_at_again(lp: Tensor, lq: Tensor) -> Tensor:
    """NaN, and a GPU's maximum would let it go."""
    p, q = _p(lp, lq)
    return torch.maximum(torch.where(p > 0, p * (lp - lq), 0.0), -q)


def logarithm_of_another(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = _p(lp, lq)
    return q * torch.log(torch.where(p > 0, q, 1.0) + q)


def below(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = _p(lp, lq)
    return q / (1 + torch.where(p > 0, p * (lp - lq).abs(), 0.0))


@pytest.mark.parametrize(
    "formula",
    [guarded_not_zero, guarded_not_a_factor, looked_at_again, logarithm_of_another, below],
)
def test_guards_that_matter_stay(formula: Formula) -> None:
    tape = trace(formula, {})
    bare = unguarded(tape)
    assert bare is not None and "where" in [n.op for n in bare.nodes]


def le_cam(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = _p(lp, lq)
    return torch.where(p + q > 0, (p - q) ** 2 / (p + q), 0.0)


def geometric(lp: Tensor, lq: Tensor, *, a: float = 0.3) -> Tensor:
    p, q = _p(lp, lq)
    return torch.sqrt(p * q) * torch.tanh(a * (lp - lq)) + torch.minimum(p, a * q)


def branching(lp: Tensor, lq: Tensor, *, a: float = 0.3) -> Tensor:
    return torch.where(lp > lq, lp.exp(), a * lq.exp()) * torch.sigmoid(lp - lq)


def logarithmic(lp: Tensor, lq: Tensor) -> Tensor:
    m = torch.logaddexp(lp, lq)
    return torch.exp(m) * (m - torch.maximum(lp, lq))


def absolute(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = _p(lp, lq)
    return torch.where(q < 0.1, p, q)


def entropy(lp: Tensor, lq: Tensor) -> Tensor:
    return lq.exp() * lq.clamp(min=-700)


def quadratic(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = _p(lp, lq)
    return (p - q) ** 2


def below_zero(lp: Tensor, lq: Tensor) -> Tensor:
    return torch.where(lp < 0, lp.exp(), 2 * lq.exp())


HOMOGENEOUS = (geometric, branching, logarithmic, le_cam)


@pytest.mark.parametrize("formula", [*HOMOGENEOUS, absolute, entropy, quadratic, below_zero])
def test_homogeneous(formula: Formula) -> None:
    tape = trace(formula, {"a": 0.3} if formula.__kwdefaults__ else {})
    assert simplified(tape).homogeneous == (formula in HOMOGENEOUS)
    if formula in HOMOGENEOUS:
        lp, lq = (x.clamp(min=-20) for x in _points())
        for a, b in zip(tape(lp, lq, (0.7,)), tape(lp - 1.5, lq - 1.5, (0.7,)), strict=True):
            torch.testing.assert_close(b, a * torch.exp(torch.tensor(-1.5, dtype=torch.float64)))


def jeffreys(lp: Tensor, lq: Tensor, *, a: float = 1.0) -> Tensor:
    p, q = _p(lp, lq)
    gap = torch.where((p > 0) & (q > 0), lp - lq, 0.0)
    return a * (p - q) * gap


def hellinger(lp: Tensor, lq: Tensor) -> Tensor:
    return (torch.exp(lp / 2) - torch.exp(lq / 2)) ** 2 / 2


def tsallis(lp: Tensor, lq: Tensor, *, order: float = 0.5) -> Tensor:
    p, q = _p(lp, lq)
    return (order * p + (1 - order) * q - p**order * q ** (1 - order)) / (order * (1 - order))


def heated(lp: Tensor, lq: Tensor, *, heat: float = 0.5) -> Tensor:
    p, q = _p(lp, lq)
    return torch.exp(heat) * ((p + q) / 2 - torch.exp((lp + lq) / 2))


def reversed_with_rest(lp: Tensor, lq: Tensor, *, a: float = 2.0) -> Tensor:
    p, q = _p(lp, lq)
    return a * torch.where(q > 0, q * (lq - lp), 0.0) + p - a**2 * q


@pytest.mark.parametrize(
    "formula, parameters, name, numbers",
    [
        (hellinger, {}, "alpha", (0.5, 0.5, 0.25, 0.0)),
        (tsallis, {"order": 0.7}, "alpha", (0.7, 0.3, 1.0, 0.0)),
        (heated, {"heat": 0.5}, "alpha", (0.5, 0.5, 0.25 * math.exp(0.5), 0.0)),
        (reversed_with_rest, {"a": 2.0}, "reverse_kl", (0.0, 0.0, 2.0, -3.0)),
        (jeffreys, {"a": 1.0}, None, ()),  # a guard that is no factor
    ],
)
def test_known(
    formula: Formula, parameters: dict[str, float], name: str | None, numbers: tuple[float, ...]
) -> None:
    known = simplified(trace(formula, parameters)).known
    assert (known and known.name) == name
    if known is not None:
        found = known.numbers(tuple(parameters.values()))
        assert found == pytest.approx(numbers, abs=1e-12)
        p, q = torch.rand(2, 9, dtype=torch.float64).softmax(-1).log()
        if name == "alpha":
            made = divergences.alpha(found[0])
            total = found[2] * made.value(p, q).sum() + found[3]
            numbers = {name: torch.tensor(x) for name, x in parameters.items()}
            expected = formula(p, q, **numbers).sum()
            torch.testing.assert_close(total, expected)


def test_long_formulas_take_no_time() -> None:
    def long(lp: Tensor, lq: Tensor) -> Tensor:
        x = lp.exp() + lq.exp()
        for k in range(12):
            x = x * (lp.exp() + k * lq.exp()) + torch.tanh(x)
        return x

    with warnings.catch_warnings(action="ignore"):
        tape = divergences.custom(long).tape
    assert not simplified(tape).homogeneous
    assert len(Sums(tape.nodes).of) == len(tape.nodes)
