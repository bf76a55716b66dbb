"""The Liger drop-ins: against Liger itself where it runs without a GPU, else against its formulas
in fp64."""

from __future__ import annotations

import inspect
import math
from typing import Any

import children
import pytest
import torch
from liger_kernel import chunked_loss as theirs
from torch import Tensor
from torch.nn import functional as F

from fusedkd.integrations import liger as ours

CHUNKED = ("LigerFusedLinearJSDLoss", "LigerFusedLinearCosineSimilarityLoss")
TOLERANCE = {
    torch.float32: {"rtol": 2e-4, "atol": 2e-6},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-3},
}
Numbers = tuple[float, float, float, float]  # temperature, weights of hard and soft loss, beta


def linear(n: int, h: int, v: int, dtype: torch.dtype, bias: bool, seed: int = 0) -> list[Any]:
    """Inputs in Liger's order: student's hidden and weight, the teacher's, labels, biases."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=make).to(dtype)

    tensors: list[Any] = [random(n, h // 2), random(v, h // 2), random(n, h), random(v, h)]
    tensors.append(torch.randint(0, v, (n,), generator=make))
    return tensors + ([random(v), random(v)] if bias else [None, None])


def graded(inputs: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """The inputs with gradients on the student's side, and those that have them."""
    copy = [None if x is None else x.clone() for x in inputs]
    student = [copy[i].requires_grad_() for i in (0, 1, 5) if copy[i] is not None]
    return copy, student


def compare(got: Any, want: Any, inputs: list[Any], **tolerance: float) -> None:
    results = []
    for loss in (got, want):
        copy, student = graded(inputs)
        value = loss(copy)
        total = value[0] if isinstance(value, tuple) else value
        results.append((value, torch.autograd.grad(1.7 * total, student)))
    torch.testing.assert_close(*results, check_dtype=False, **tolerance)


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("shape", [(141, 31, 123), (64, 128, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("numbers", [(1.0, 0.5, 0.5, 0.5), (2.0, 0.0, 1.0, 0.8), (0.5, 1, 0, 0.2)])
def test_chunked_losses_are_ligers(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, numbers: Numbers
) -> None:
    temperature, hard, soft, beta = numbers
    options = {"weight_hard_loss": hard, "weight_soft_loss": soft, "beta": beta}
    options |= {"temperature": temperature, "compiled": False, "chunk_size": 64}
    calls = [lambda x, m=m: getattr(m, name)(**options)(*x) for m in (ours, theirs)]
    compare(*calls, linear(*shape, dtype, bias), **TOLERANCE[dtype])


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_parts_and_ignored_labels(name: str, beta: float, ignore_index: int) -> None:
    inputs = linear(40, 16, 41, torch.float32, True)
    inputs[4][::3] = ignore_index
    options = {"beta": beta, "ignore_index": ignore_index, "return_soft_hard_loss": True}
    calls = [lambda x, m=m: getattr(m, name)(compiled=False, **options)(*x) for m in (ours, theirs)]
    compare(*calls, inputs, **TOLERANCE[torch.float32])
    loss, soft, hard = getattr(ours, name)(**options)(*graded(inputs)[0])
    assert loss.requires_grad and not soft.requires_grad and not hard.requires_grad


@pytest.mark.parametrize("name", ["liger_fused_linear_jsd", "liger_fused_linear_cosine"])
def test_chunked_functions(name: str) -> None:
    from liger_kernel.chunked_loss import functional

    inputs, options = linear(30, 16, 23, torch.float32, True), (0.1, 0.9, 0.4, 7, 2.0, False, 8)
    calls = [lambda x, m=m: getattr(m, name)(*x, *options) for m in (ours, functional)]
    compare(*calls, inputs, **TOLERANCE[torch.float32])
    function = getattr(ours, name.title().replace("_", "").replace("Jsd", "JSD") + "Function", None)
    function = function or ours.LigerFusedLinearCosineSimilarityFunction
    assert torch.equal(function.apply(*inputs, *options), calls[0](inputs))


def of_logits(base: Any) -> Any:
    """A subclass with a divergence of its own, as ms-swift has one of Liger's function."""

    class Mine(base):
        @staticmethod
        def distillation_loss_fn(
            student_logits: Tensor,
            teacher_logits: Tensor,
            beta: float = 0.5,
            target: Tensor | None = None,
            ignore_index: int = -100,
        ) -> Tensor:
            p, q = (x.softmax(-1) for x in (teacher_logits, student_logits))
            rows = beta * (p - q).abs().sum(-1)
            return rows.masked_fill(target == ignore_index, 0.0).sum()

    return Mine


@pytest.mark.parametrize("derive", [lambda base: base, lambda base: type("Mine", (base,), {}),
                                    of_logits])  # fmt: skip
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("name", ["JSD", "CosineSimilarity"])
def test_functions_can_be_derived_from(name: str, hard: float, parts: bool, derive: Any) -> None:
    inputs = linear(30, 16, 23, torch.float32, True)
    inputs[4][::3] = -100
    options = (hard, 0.9, 0.4, -100, 2.0, False, 8, parts)
    modules = (ours, theirs.jsd_loss if name == "JSD" else theirs.cosine_similarity_loss)
    made = [derive(getattr(m, f"LigerFusedLinear{name}Function")) for m in modules]
    assert all(issubclass(function, torch.autograd.Function) for function in made)
    calls = [lambda x, f=f: f.apply(*x, *options) for f in made]
    compare(*calls, inputs, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["JSD", "CosineSimilarity"])
def test_a_functions_own_divergence(name: str) -> None:
    """For subclasses that call it and change its result."""
    s, _, t, _, labels, _, _ = linear(12, 8, 11, torch.float32, False)
    student, modules = s @ torch.ones(4, 8), (ours, theirs.jsd_loss, theirs.cosine_similarity_loss)
    functions = [getattr(m, f"LigerFusedLinear{name}Function", None) for m in modules]
    mine, other = (f.distillation_loss_fn for f in functions if f is not None)
    for options in ({}, {"beta": 0.3}, {"target": labels, "ignore_index": int(labels[0])}):
        torch.testing.assert_close(mine(student, t, **options), other(student, t, **options))


class Doubled(ours.LigerJSDFunction):
    """A subclass with its own ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        return 2 * ours.LigerJSDFunction.forward(ctx, x, *args)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return ours.LigerJSDFunction.backward(ctx, 2 * upstream)


def test_functions_have_forward_and_backward() -> None:
    s, t, labels = probabilities(torch.float32)
    x = s.clone().requires_grad_()
    value, double = ours.LigerJSD(0.3)(x, t, labels), Doubled.apply(x, t, labels, 0.3)
    torch.testing.assert_close(double, 2 * value)
    want = torch.autograd.grad(value, x)[0]
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(double, x, retain_graph=True)[0], 2 * want)
    entries = ours.LigerTVDLossFunction.apply(x, t, None, "none")
    upstream = torch.randn_like(entries)
    got = torch.autograd.grad(entries, x, upstream)[0]
    torch.testing.assert_close(got, upstream * (x - t).sign() / 2)
    assert ours.LigerKLDivLossFunction.apply(x, t).equal(
        ours.liger_kl_div(x, t, reduction="batchmean")
    )


def jsd_entries(lq: Tensor, lp: Tensor, beta: float) -> Tensor:
    """Eq. 1 of GKD with Liger's ends, entry by entry."""
    if beta == 0:
        return lp.exp() * (lp - lq)
    if beta == 1:
        return lq.exp() * (lq - lp)
    lm = torch.logsumexp(torch.stack([lp + math.log(beta), lq + math.log1p(-beta)]), 0)
    return beta * lp.exp() * (lp - lm) + (1 - beta) * lq.exp() * (lq - lm)


def by_rows(entries: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    keep = torch.ones(len(entries), dtype=torch.bool) if labels is None else labels != ignore_index
    return entries[keep].sum() / max(1, int(keep.sum()))


@pytest.mark.parametrize("shape", [(16, 32, 512), (63, 41, 41)])
@pytest.mark.parametrize("numbers", [(1.0, 0.5), (2.0, 0.1), (1.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("ignore_index", [None, -100, 2])
@pytest.mark.parametrize("form", ["module", "function"])
def test_fused_linear_jsd(
    shape: tuple[int, int, int], numbers: tuple[float, float], ignore_index: int | None, form: str
) -> None:
    temperature, beta = numbers
    inputs = linear(*shape, torch.float32, False)[:5]
    labels = inputs[4] if ignore_index is not None else None
    if labels is not None:
        labels[::4] = ignore_index
    options = (beta, -100 if ignore_index is None else ignore_index, temperature)

    def want(x: list[Any]) -> Tensor:
        s, w, t, u = (y.double() for y in x[:4])
        lq, lp = ((a @ b.T / temperature).log_softmax(-1) for a, b in ((s, w), (t, u)))
        return by_rows(jsd_entries(lq, lp, beta), labels, options[1])

    def got(x: list[Any]) -> Tensor:
        if form == "module":
            return ours.LigerFusedLinearJSD(*options)(*x[:4], labels)
        names = ("jsd_beta", "ignore_index", "temperature")
        return ours.liger_fused_linear_jsd(
            *x[:4], shift_labels=labels, **dict(zip(names, options, strict=True))
        )

    compare(got, want, [*inputs[:4], None, None], rtol=1e-4, atol=1e-6)


def probabilities(dtype: torch.dtype, n: int = 41, v: int = 271) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    s, t = torch.randn(2, n, v, generator=make).log_softmax(-1).to(dtype)
    return s, t, torch.randint(3, v, (n,), generator=make)


DTYPES = {torch.bfloat16: (5e-2, 1e-8), torch.float16: (1e-3, 1e-3), torch.float32: (1e-5, 1e-8)}


def check(got: Any, want: Any, x: Tensor, dtype: torch.dtype, upstream: float = 2.0) -> None:
    """Value and gradient against the formula in fp64, with the tolerances of Liger's tests."""
    rtol, atol = DTYPES[dtype]
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    value, truth = got(mine), want(exact)
    torch.testing.assert_close(value.double(), truth, rtol=rtol, atol=atol)
    for output in (value, truth):
        output.backward(torch.full_like(output, upstream))
    assert mine.grad is not None and mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ignore_index", [None, 2])
def test_jsd_of_log_probabilities(
    dtype: torch.dtype, beta: float, ignore_index: int | None
) -> None:
    s, t, labels = probabilities(dtype)
    labels[::5] = 2
    given = (labels, beta, ignore_index) if ignore_index is not None else (None, beta, -100)
    check(
        lambda x: ours.liger_jsd(x, t, *given),
        lambda x: by_rows(jsd_entries(x, t.double(), beta), given[0], given[2]),
        *(s, dtype),
    )
    loss = ours.LigerJSD(beta)(s, t.clone().requires_grad_())
    assert loss.dtype == dtype and not loss.requires_grad  # the teacher is a constant


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("log_target", [True, False])
def test_kl_div(dtype: torch.dtype, reduction: str, log_target: bool) -> None:
    s, t, _ = probabilities(dtype)
    t = t if log_target else t.exp()
    options = {"reduction": reduction, "log_target": log_target}
    check(
        lambda x: ours.LigerKLDIVLoss(**options)(x, t),
        lambda x: torch.nn.KLDivLoss(**options)(x, t.double()),
        *(s, dtype),
    )
    assert ours.LigerKLDIVLoss()(s, t).equal(ours.liger_kl_div(s, t))
    small = torch.tensor([[1e-20, 0.0, 1.0]])
    value = ours.LigerKLDIVLoss(1e-10, reduction="sum")(small.new_zeros(1, 3), small)
    torch.testing.assert_close(value, torch.tensor(1e-20 * math.log(1e-10)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("ignore_index", [None, -100, 0])
def test_tvd(dtype: torch.dtype, reduction: str, ignore_index: int | None) -> None:
    s, t, labels = probabilities(dtype)
    p, q = torch.randn_like(s), t.exp()
    counts = torch.ones_like(labels, dtype=torch.bool)
    given: tuple[Any, ...] = ()
    if ignore_index is not None:
        labels[::5] = ignore_index
        given, counts = (labels,), labels != ignore_index

    def want(x: Tensor) -> Tensor:
        entries = torch.where(counts[:, None], (x - q.double()).abs() / 2, 0.0)
        divisors = {"sum": 1, "mean": int(counts.sum()) * x.shape[1], "batchmean": counts.sum()}
        return entries if reduction == "none" else entries.sum() / divisors[reduction]

    loss = ours.LigerTVDLoss(reduction, -100 if ignore_index is None else ignore_index)
    check(lambda x: loss(x, q, *given), want, p, dtype)
    assert ours.liger_tvd(p, q, reduction=reduction).equal(ours.LigerTVDLoss(reduction)(p, q))


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("parts", [False, True])
def test_hard_loss_alone_needs_no_teacher(name: str, parts: bool) -> None:
    """Liger's, which runs one for nothing; here it may be None, or broken."""
    inputs = linear(30, 16, 23, torch.float32, True)
    inputs[4][::3] = -100
    options = {"weight_hard_loss": 0.7, "weight_soft_loss": 0.0, "return_soft_hard_loss": parts}

    def first(found: Any) -> Any:
        return found[0] if parts else found

    def alone(x: list[Any]) -> Any:
        found = getattr(ours, name)(**options)(x[0], x[1], None, None, x[4], x[5], None)
        if parts:
            assert found[1].isnan()
            torch.testing.assert_close(0.7 * found[2], found[0].detach())
        return first(found)

    def other(x: list[Any]) -> Any:
        return first(getattr(theirs, name)(compiled=False, **options)(*x))

    compare(alone, other, inputs, **TOLERANCE[torch.float32])
    mine = lambda x: first(getattr(ours, name)(**options)(*x))  # noqa: E731
    compare(mine, other, inputs, **TOLERANCE[torch.float32])
    if not parts:
        broken = [*inputs[:3], torch.full_like(inputs[3], math.nan), *inputs[4:]]
        assert torch.equal(getattr(ours, name)(**options)(*broken), alone(inputs))
    with pytest.raises(ValueError, match=r"teacher_weight is None with weight_soft_loss=0\.5"):
        getattr(ours, name)()(*inputs[:3], None, inputs[4])


# ---- what was wrong there ------------------------------------------------------------------------


def test_nothing_counts() -> None:
    inputs, student = graded(linear(6, 8, 11, torch.float32, True))
    inputs[4][:] = -100
    for loss in (ours.LigerFusedLinearJSDLoss(), ours.LigerFusedLinearCosineSimilarityLoss()):
        value = loss(*inputs)
        assert value == 0
        assert all((grad == 0).all() for grad in torch.autograd.grad(value, student))
    s = torch.randn(6, 11).log_softmax(-1).requires_grad_()
    for loss in (ours.LigerJSD(), ours.LigerTVDLoss()):
        for rows in (slice(None), slice(0)):
            value = loss(s[rows], s.detach()[rows], inputs[4][rows])
            assert value == 0 and (torch.autograd.grad(value, s)[0] == 0).all()


def test_a_row_that_does_not_count_hides_nothing_else() -> None:
    inputs, student = graded(linear(6, 8, 11, torch.float32, False))
    clean = [x if x is None or len(x) != 6 else x[1:] for x in inputs]
    for loss in (ours.LigerFusedLinearJSDLoss(), ours.LigerFusedLinearCosineSimilarityLoss()):
        want = loss(*clean)
        inputs[2][0], inputs[4][0] = math.nan, -100
        value = loss(*inputs)
        torch.testing.assert_close(value, want)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, student))


def test_masked_vocabulary_is_finite() -> None:
    s, t, _ = probabilities(torch.float32)
    s[:, 5:9] = t[:, 5:9] = -math.inf
    for loss in (*map(ours.LigerJSD, (0.0, 0.5, 1.0)), ours.LigerKLDIVLoss(log_target=True)):
        x = s.clone().requires_grad_()
        value = loss(x, t)
        assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("loss", [ours.LigerFusedLinearJSDLoss, ours.LigerFusedLinearJSD])
def test_a_wider_teacher_is_no_wrong_number(loss: Any) -> None:
    s, w, t, u, labels = linear(6, 8, 11, torch.float32, False)[:5]
    wide = torch.cat([u, torch.full((3, 8), 9.0)])
    with pytest.raises(ValueError, match="vocab_size"):
        loss()(s, w, t, wide, labels)
    value = loss(vocab_size=11)(s, w, t, wide, labels)
    torch.testing.assert_close(value, loss()(s, w, t, u, labels))


def test_second_backward_and_more_dimensions() -> None:
    inputs, student = graded(linear(12, 8, 11, torch.float32, True))
    cube = [x.reshape(3, 4, -1) if i in (0, 2) else x for i, x in enumerate(inputs)]
    cube[4] = cube[4].view(3, 4)
    for loss in (ours.LigerFusedLinearJSDLoss(), ours.LigerFusedLinearCosineSimilarityLoss()):
        value = loss(*cube)
        torch.testing.assert_close(value, loss(*inputs))
        first = torch.autograd.grad(2 * value, student, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(2 * value, student), first)
    s, t, labels = probabilities(torch.float32, n=12)
    cube = [x.view(3, 4, *x.shape[1:]) for x in (s, t, labels)]
    torch.testing.assert_close(ours.LigerJSD()(*cube), ours.LigerJSD()(s, t, labels))
    assert ours.LigerTVDLoss("none")(*cube).shape == s.view(3, 4, -1).shape


def test_autocast() -> None:
    inputs, student = graded(linear(12, 8, 11, torch.float32, False))
    want = ours.LigerFusedLinearJSD(0.5)(*inputs[:5])
    half = [inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16(), inputs[3], inputs[4]]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours.LigerFusedLinearJSD(0.5)(*half)
    torch.testing.assert_close(loss, want, rtol=5e-2, atol=5e-3)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, student))


def test_cosine_makes_its_gradient_in_chunks() -> None:
    inputs = linear(300, 8, 5000, torch.float32, False)  # several pieces
    loss = ours.LigerFusedLinearCosineSimilarityLoss()

    def want(x: list[Any]) -> Tensor:
        s, w, t, u, y = (v.double() if v.is_floating_point() else v for v in x[:5])
        cosine = F.cosine_similarity(s @ w.T, t @ u.T, dim=-1)
        return 0.25 * (1 - cosine).mean() + 0.5 * F.cross_entropy(s @ w.T, y)

    compare(lambda x: loss(*x), want, inputs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weight, parts, made", [(0.0, False, 0), (0.0, True, 1), (0.5, False, 1)])
def test_cosine_makes_the_hard_loss_only_for_use(
    weight: float, parts: bool, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = linear(16, 8, 40, torch.float32, False)
    want = F.cross_entropy(inputs[0] @ inputs[1].T, inputs[4])
    calls, real = [], F.nll_loss
    spy = lambda *x, **named: (calls.append(1), real(*x, **named))[1]  # noqa: E731
    monkeypatch.setattr(F, "nll_loss", spy)
    loss = ours.LigerFusedLinearCosineSimilarityLoss(weight, return_soft_hard_loss=parts)
    found = loss(*inputs)
    assert len(calls) == made
    if parts:
        torch.testing.assert_close(found[2], want, rtol=1e-5, atol=1e-5)


def test_errors() -> None:
    for loss in (ours.LigerFusedLinearJSDLoss, ours.LigerFusedLinearJSD):
        with pytest.raises(AssertionError, match="emperature cannot be 0"):
            loss(temperature=0)
    s, t, labels = probabilities(torch.float32)
    with pytest.raises(ValueError, match=r"labels has shape \(40,\).*\(41,\)"):
        ours.LigerJSD()(s, t, labels[1:])
    with pytest.raises(ValueError, match=r"student has shape .*41, 271.*target \(41, 270\)"):
        ours.LigerTVDLoss()(s, t[:, 1:])
    with pytest.raises(ValueError, match="reduction='avg'"):
        ours.LigerTVDLoss("avg")(s, t)


@pytest.mark.parametrize("name", CHUNKED)
def test_signatures(name: str) -> None:
    mine, other = getattr(ours, name), getattr(theirs, name)
    for method in ("__init__", "forward"):
        want = inspect.signature(getattr(other, method)).parameters
        got = inspect.signature(getattr(mine, method)).parameters
        same = [(p.name, p.default, p.kind) for p in want.values()]
        assert [(p.name, p.default, p.kind) for p in got.values()][: len(same)] == same


def test_needs_no_liger() -> None:
    code = (
        "import sys; sys.modules['liger_kernel'] = None\n"
        "import fusedkd.integrations.liger\n"
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules"
    )
    children.python(code)
