"""Divergences of one's own: the nine of ours written as a user would, and random expressions,
against the oracle and fp64 autograd; what is refused, with its line; where they go."""

from __future__ import annotations

import copy
import math
import os
import pickle
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from budget import check, plain_case
from oracle import FORMULAS
from own_divergences import OWN, random_formula
from random_calls import DTYPES
from torch import Tensor

from fusedkd import KDLoss, LMHead, SparseTeacher, divergences, kd_loss
from fusedkd.divergences import Divergence
from fusedkd.trace import trace

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMULAS.update({f"own_{name}": FORMULAS[name] for name in OWN})


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operation by operation, in the vector functions that compiled formulas call too."""
    from fusedkd.kernels import cpu
    from fusedkd.kernels.cpu import emit

    cpu._own.cache_clear()
    monkeypatch.setattr(emit, "compiler", lambda: None)
    monkeypatch.setattr(warnings, "showwarning", lambda *_: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.filterwarnings("ignore:fusedkd. there is no C")
def test_ours_as_yours(
    backend: str, device: torch.device, name: str, dtype: torch.dtype, no_compiler: None
) -> None:
    """Within the budgets of those that are built in."""
    own = OWN[name]()
    check(plain_case(1, device, 5, 131, dtype, divergence=own), backend, metrics=True)
    check(plain_case(2, device, 4, 64, dtype, divergence=own, ce_weight=0.0), backend)
    width = 1031 if INTERPRETED else 4097
    check(plain_case(3, device, 3, width, dtype, divergence=own, temperature=1.3), backend)


@pytest.mark.parametrize("name", ["jsd", "alpha", "reverse_kl", "total_variation"])
@pytest.mark.filterwarnings("ignore:fusedkd. there is no C")
def test_masked_entries(backend: str, device: torch.device, name: str, no_compiler: None) -> None:
    """Rows that a lean form does not know: what the formula of ours says in fp64."""
    s, t = (4 * torch.randn(2, 6, 67, device=device)).unbind()
    s[0, 3:9] = t[0, 3:9] = -math.inf
    t[1, 5] = -math.inf
    s[2, 7] = -math.inf
    s[3, 3:9] = t[3, 3:9] = torch.finfo(s.dtype).min
    s[4], t[4] = 30 * s[4], 30 * t[4]
    s[5, 0] = t[5, 0] = 300.0

    def run(x: Tensor, t: Tensor, divergence: Divergence | str, backend: str) -> list[Tensor]:
        x = x.clone().requires_grad_()
        keywords = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
        loss = kd_loss(x, t, **keywords, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss[loss.isfinite()].sum(), x)]

    truth = run(s.double(), t.double(), name, "reference")
    for a, b in zip(run(s, t, OWN[name](), backend), truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("seed", range(8 if INTERPRETED else 200))
@pytest.mark.filterwarnings("ignore:random_", "ignore:fusedkd. there is no C")
def test_random_expressions(
    backend: str, device: torch.device, seed: int, no_compiler: None
) -> None:
    """In fp64, where a comparison does not hang on a rounding: against autograd."""
    formula = random_formula(seed)
    s, t = (2 * torch.randn(2, 3, 37, device=device, dtype=torch.float64)).unbind()
    truth = _with_gradient(lambda x: formula(*_logs(x, t), a=0.4).sum(), s)
    own = divergences.custom(formula)(a=0.4)
    ours = _with_gradient(
        lambda x: kd_loss(x, t, divergence=own, reduction="sum", backend=backend), s
    )
    for name, a, b in zip(("loss", "gradient"), ours, truth, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-11, msg=lambda said, n=name: f"{n}: {said}"
        )


def _logs(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return t.log_softmax(-1), s.log_softmax(-1)


def _with_gradient(loss, s: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    x = s.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def everything(lp: Tensor, lq: Tensor, *, a: float = 0.7, b: float = 2.0) -> Tensor:
    """Each operation that the renderers know, of vectors and of numbers."""
    p, q = lp.exp(), lq.exp()
    x, y = lp.clamp(-30, 0), lq.clamp(min=-30)
    one = lp.new_ones(())
    constants = torch.log1p(b * one) + torch.logaddexp(a * one, torch.sigmoid(b * one).sign())
    parts = [
        *(torch.sigmoid(y), torch.tanh(x * y), torch.expm1(y), torch.log1p(q), torch.sqrt(q + a)),
        *(torch.rsqrt(p + b), (x - y) ** 3, (x - y).sign() * q, torch.logaddexp(x, y), y**b),
        *(torch.minimum(x, y), torch.maximum(x, a * y), torch.where((p > q) ^ (q < 0.1), y, x)),
        *(torch.xlogy(q, q + a), torch.exp2(y), torch.log2(q + 1), torch.lerp(x, y, 0.3)),
        *((p == q) * y, (~(p >= q) | (q != p)) * x, y.masked_fill(p < 0.01, 0.5), (a - q).abs()),
        *(q.detach() * y, torch.full_like(q, 2.0) * q, 1 / (1 + q), torch.relu(y + 1)),
    ]
    total = sum(parts)
    return q * total * constants  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:everything")
def test_compiled(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> None:
    """What a C++ compiler makes of it, once, with dense, sparse and vocabulary-odd rows."""
    emit = pytest.importorskip("fusedkd.kernels.cpu.emit")
    if emit.compiler() is None:
        pytest.skip("no C++ compiler")
    s = (2 * torch.randn(4, 1001)).to(dtype)
    t = (2 * torch.randn(4, 1001)).to(dtype)
    truth = _with_gradient(
        lambda x: everything(*_logs(x, t.double()), a=0.4, b=3.0).sum(), s.double()
    )
    own = EVERYTHING(a=0.4, b=3.0)
    ours = _with_gradient(
        lambda x: kd_loss(x, t, divergence=own, reduction="sum", backend="cpu"), s
    )
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-3}[dtype]
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


with warnings.catch_warnings(action="ignore"):
    EVERYTHING = divergences.custom(everything)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.filterwarnings("ignore:fusedkd. there is no C")
def test_every_form(backend: str, device: torch.device, tail: str, no_compiler: None) -> None:
    """Heads, sparse teachers of every tail: as the built-in one of the same formula."""
    hidden = torch.randn(9, 8, device=device)
    weight = torch.randn(41, 8, device=device)
    teacher = (2 * torch.randn(9, 41, device=device)).log_softmax(-1)
    top = teacher.topk(7)
    labels = torch.randint(41, (9,), device=device)

    def run(divergence: Divergence) -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        sparse = SparseTeacher(top.indices, top.values, tail=tail)
        keywords = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.3}
        loss = kd_loss(LMHead(h, w), sparse, labels, **keywords, backend=backend)
        loss = loss + kd_loss(LMHead(h, w), teacher, labels, **keywords, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    for ours, theirs in zip(run(OWN["jsd"](0.3)), run(divergences.jsd(0.3)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------
# what is refused


def _line_of(formula: object, text: str) -> str:
    code = formula.__code__  # type: ignore[attr-defined]
    lines = Path(code.co_filename).read_text().splitlines()
    return str(
        next(n for n, line in enumerate(lines, 1) if n > code.co_firstlineno and text in line)
    )


def test_refused_operations_name_their_line() -> None:
    def reduced(lp: Tensor, lq: Tensor) -> Tensor:
        p = lp.exp()
        return (p * lq).sum(-1)

    def branching(lp: Tensor, lq: Tensor, *, order: float = 1.0) -> Tensor:
        if order == 1:
            return lp - lq
        return lq

    def on_entries(lp: Tensor, lq: Tensor) -> Tensor:
        return lq if (lp > lq) else lp

    def into_python(lp: Tensor, lq: Tensor, *, order: float = 1.0) -> Tensor:
        return lq * math.log(order)

    def in_place(lp: Tensor, lq: Tensor) -> Tensor:
        return lp.exp().mul_(lq)

    def captured(lp: Tensor, lq: Tensor) -> Tensor:
        return lq * torch.arange(3.0)

    cases = (
        (reduced, ".sum(-1)", "sum is not known, or not elementwise"),
        (branching, "order == 1", "torch.where"),
        (on_entries, "(lp > lq)", "torch.where"),
        (into_python, "math.log", "torch.log"),
        (in_place, "mul_", "in place"),
        (captured, "arange", "arange"),
    )
    for formula, text, said in cases:
        with pytest.raises(ValueError, match=said) as error:
            divergences.custom(formula)
        assert f"{formula.__name__} ({__file__}:{_line_of(formula, text)})" in str(error.value)


def test_formulas_that_are_not_total_name_the_point() -> None:
    def plain(lp: Tensor, lq: Tensor) -> Tensor:
        return lp.exp() * (lp - lq)

    def ratio(lp: Tensor, lq: Tensor) -> Tensor:
        return (lp.exp() / (lp.exp() - lq.exp())).abs()

    def only_there(lp: Tensor, lq: Tensor, *, order: float = 1.0) -> Tensor:
        return torch.where(lq > -1, (lq + order).sqrt(), 0.0)

    with pytest.raises(
        ValueError, match=r"plain: the value is nan at lp = -inf.*torch.where\(p > 0"
    ):
        divergences.custom(plain)
    with pytest.raises(ValueError, match=r"ratio: the value is (inf|nan) at lp = "):
        divergences.custom(ratio)
    with warnings.catch_warnings(action="ignore"):
        factory = divergences.custom(only_there)
    with pytest.raises(ValueError, match="only_there: the value is nan"):
        factory(order=0.5)  # with these parameters only


def test_what_is_no_divergence_warns() -> None:
    def gap(lp: Tensor, lq: Tensor) -> Tensor:
        return lp.exp() - 2 * lq.exp()

    with pytest.warns(UserWarning) as caught:
        divergences.custom(gap)
    said = [str(w.message) for w in caught]
    assert any("not 0 where p = q" in x for x in said) and any("less than 0" in x for x in said)


def test_signatures() -> None:
    def no_default(lp, lq, *, order):  # type: ignore[no-untyped-def]
        return lq

    def positional(lp, lq, order=1.0):  # type: ignore[no-untyped-def]
        return lq

    def jsd(lp, lq):  # type: ignore[no-untyped-def]
        return lq

    for formula, error in ((no_default, "default"), (positional, r"\*, parameter=default")):
        with pytest.raises(TypeError, match=error):
            divergences.custom(formula)
    with pytest.raises(ValueError, match="name of one of ours"):
        divergences.custom(jsd)
    with pytest.raises(TypeError, match="order"):
        OWN["jsd"](order=1)
    with pytest.raises(ValueError, match="finite number"):
        OWN["jsd"](beta=math.inf)


# ----------------------------------------------------------------------------------------------
# where they go


def test_pickled_compared_stored(backend: str, device: torch.device) -> None:
    own = OWN["alpha"](0.3)
    again = pickle.loads(pickle.dumps(own))
    assert again == own == copy.deepcopy(own) and hash(again) == hash(own)
    assert own != OWN["alpha"](0.4) and own != Divergence("own_alpha", (0.3,), value=own.value)
    s, t = torch.randn(2, 4, 9, device=device).unbind()
    stored = KDLoss(divergence=again, backend=backend)
    assert torch.equal(stored(s, t), kd_loss(s, t, divergence=own, backend=backend))


def test_compiled_graphs_take_other_parameters(no_compiler: None) -> None:
    s, t = torch.randn(2, 4, 9).unbind()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(s: Tensor, t: Tensor) -> Tensor:
        return kd_loss(s, t, divergence=OWN_03)

    s.requires_grad_()
    loss = step(s, t)
    expected = kd_loss(s, t, divergence=OWN_03)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(x, s)[0] for x in (loss, expected)))


OWN_03 = OWN["jsd"](0.3)


def test_from_a_module_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
        import torch
        from fusedkd import divergences

        @divergences.custom
        def hellinger(lp, lq, *, scale=1.0):
            return scale * (torch.exp(lp / 2) - torch.exp(lq / 2)) ** 2 / 2

        other = 3
    """
    (tmp_path / "losses_by_name.py").write_text(textwrap.dedent(body))
    monkeypatch.chdir(tmp_path)
    made = divergences.make("losses_by_name:hellinger(scale=2)")
    assert made.name == "hellinger" and made.params == (2.0,)
    assert divergences.make("losses_by_name:hellinger").params == (1.0,)
    s, t = torch.randn(2, 4, 9, dtype=torch.float64).unbind()
    expected = 2 * ((t.softmax(-1).sqrt() - s.softmax(-1).sqrt()) ** 2).sum(-1).mean() / 2
    torch.testing.assert_close(kd_loss(s, t, divergence=made, backend="reference"), expected)
    for name, said in (
        ("losses_by_name:other", "no other that"),
        ("losses_by_name:hellinger(size=2)", "parameters of hellinger are: scale"),
        ("no_such_module:f", "no_such_module"),
    ):
        with pytest.raises(ValueError, match=said):
            divergences.make(name)


def test_the_tape_is_short() -> None:
    """Equal operations are one; what neither needs is gone."""

    def twice(lp: Tensor, lq: Tensor) -> Tensor:
        _unused = torch.tanh(lp)
        return (lp.exp() - lq.exp()) * (lp.exp() - lq.exp())

    tape = trace(twice, {})
    ops = [node.op for node in tape.nodes]
    assert ops.count("exp") == 2 and ops.count("sub") == 1 and "tanh" not in ops


def test_seven_parameters(backend: str, device: torch.device, no_compiler: None) -> None:
    """Each of them arrives, dense and sparse."""

    def weighted(lp, lq, *, a=0.5, b=0.25, c=2.0, d=0.125, e=1.5, f=0.75, g=3.0):  # type: ignore[no-untyped-def]
        p, q = lp.exp(), lq.exp()
        numbers = a + 3 * b + 9 * c - 27 * d + 81 * e - 243 * f * g
        return numbers * (torch.exp(lp / 2) - torch.exp(lq / 2)) ** 2 + g * (p - q) ** 2

    with warnings.catch_warnings(action="ignore"):
        own = divergences.custom(weighted)(a=0.1, b=0.9, c=1.1, d=0.7, e=0.2, f=0.4, g=1.3)
    s, t = (2 * torch.randn(2, 3, 21, device=device, dtype=torch.float64)).unbind()
    truth = kd_loss(s, t, divergence=own, backend="reference")
    torch.testing.assert_close(kd_loss(s, t, divergence=own, backend=backend), truth)
    top = t.log_softmax(-1).topk(21)
    sparse = SparseTeacher(top.indices, top.values, tail="bucket")
    torch.testing.assert_close(kd_loss(s, sparse, divergence=own, backend=backend), truth)
