"""Losses on drawn tokens are their formulas, and their gradients' means are the divergences'."""

from __future__ import annotations

import itertools
import math
import os
import random
from typing import Any

import pytest
import torch
from budget import check_within
from token_truth import DTYPES
from torch import Tensor

from fusedkd import LMHead, kd_loss, sampled_kd_loss, sampled_kd_loss_and_metrics, token_log_probs
from fusedkd.kernels import cpu, reference

NAN, INF = math.nan, math.inf
FEW = os.environ.get("FUSEDKD_TEST_BACKEND") == "triton"  # which is interpreted
SEEDS = int(os.environ.get("FUSEDKD_TEST_SEEDS", "20" if FEW else "200"))
BATCH = 20
KINDS = ("k2", "k3", "policy", "old", "clip", "advantages")


def formula(kind: str, s: Tensor, t: Tensor, o: Tensor, a: Tensor) -> Tensor:
    if kind == "k2":
        return (s - t) ** 2 / 2
    if kind == "k3":
        return (t - s).exp() - 1 - (t - s)
    gain = a if kind == "advantages" else (t - s).detach()
    ratio = (s - (s.detach() if kind == "policy" else o)).exp()
    if kind in ("policy", "old"):
        return -ratio * gain
    return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.25) * gain)


def draw(seed: int) -> tuple[Any, list[Tensor], dict[str, Any], Any]:
    """Student, its leaves, keywords and the truth as a function of a dtype."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, kind = rng.choice(DTYPES), rng.choice(KINDS)
    leading = rng.choice([(4,), (2, 5)])
    v, h, heat = rng.choice([17, 257, 2100]), 16, rng.choice([1.0, 1.7])
    form = rng.choice(["dense", "frozen", "trained"])
    tokens = torch.randint(v, leading, generator=g)
    tokens.view(-1)[1] = -100
    weights = torch.rand(leading, generator=g)
    weights.view(-1)[2] = 0
    if rng.random() < 0.3:
        weights = torch.ones(leading)
    x = torch.randn(*leading, v if form == "dense" else h, generator=g).to(dtype)
    w = (torch.randn(v, h, generator=g) / 2).to(dtype).requires_grad_(form == "trained")
    leaves = [x.requires_grad_(), *([w] if form == "trained" else [])]
    drawn = [torch.randn(leading, generator=g) * 0.5 for _ in range(3)]

    def log_probs(at: torch.dtype, named: list[Tensor]) -> Tensor:
        raw = named[0] if form == "dense" else named[0] @ named[-1 if len(named) > 1 else 0].T
        return (raw / heat).log_softmax(-1)

    with torch.no_grad():
        raw = x.double() if form == "dense" else x.double() @ w.double().T
        s = (raw / heat).log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None])[..., 0].float()
    t, o, a = (s + drawn[0]).clamp(max=0), (s + drawn[1] / 2).clamp(max=0), drawn[2]
    reduction, norm = rng.choice([("mean", None), ("sum", None), ("none", None), ("mean", 7.5)])
    keywords: dict[str, Any] = {"loss_type": kind if kind in ("k2", "k3") else "policy"}
    keywords |= {"temperature": heat, "token_weights": weights, "reduction": reduction}
    keywords |= {"normalizer": norm, "chunk_bytes": rng.choice([None, 20 * v])}
    if kind in ("old", "clip", "advantages"):
        keywords["old_log_probs"] = o
    if kind in ("clip", "advantages"):
        keywords["clip"] = (0.8, 1.25)
    if kind == "advantages":
        keywords["advantages"] = a

    def truth(at: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The rows, the loss, and the leaves that it is a function of."""
        named = [y.detach().to(at).requires_grad_() for y in leaves]
        raw = named[0] if form == "dense" else named[0] @ ([*named, w.detach().to(at)])[1].T
        log_q = (raw / heat).log_softmax(-1)
        own = log_q.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
        rows = formula(kind, own, t.to(at), o.to(at), a.to(at))
        scale = weights.to(at) * (tokens >= 0)
        if reduction == "mean":
            scale = scale / (norm or scale.sum())
        rows = torch.where(scale > 0, rows * scale, 0.0)
        return rows, rows if reduction == "none" else rows.sum(), named

    side = x if form == "dense" else LMHead(x, w)
    return side, leaves, {"teacher_log_probs": t, "tokens": tokens, **keywords}, truth


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_random_calls(first: int, backend: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("leaves are made on the CPU; triton's share is interpreted")
    for seed in range(first, first + BATCH):
        student, leaves, keywords, truth = draw(seed)
        dtype = leaves[0].dtype
        loss, metrics = sampled_kd_loss_and_metrics(student, backend=backend, **keywords)
        assert torch.equal(loss, sampled_kd_loss(student, backend=backend, **keywords))
        rows, exact, exact_leaves = truth(torch.float64)
        eager_rows, eager, eager_leaves = truth(torch.float32)
        wide = dtype == torch.float64
        # t and o are fp32, so in fp32 s is rounded once more: s - t loses a unit of |s|
        unit = 2.0**-44 if wide else 2.0**-20
        lost = unit / 2.0**-20
        size = (rows.abs().amax() + lost * 3 * (eager_rows.double() - rows).abs().amax()).detach()
        worth = keywords["token_weights"].max() / (keywords["normalizer"] or 1)
        check_within("loss", loss, exact.detach(), unit * (rows.numel() * size + worth), keywords)
        up = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        if exact.dim():
            up.view(-1)[1] = NAN  # of a token that does not count
        got = torch.autograd.grad(loss, leaves, up.to(loss.dtype))
        clean = up.nan_to_num()
        want = torch.autograd.grad(exact, exact_leaves, clean.double())
        theirs = torch.autograd.grad(eager, eager_leaves, clean)
        for grad, x, y in zip(got, want, theirs, strict=True):
            eps = torch.finfo(dtype).eps
            head = isinstance(student, LMHead)
            budget = eps * x.abs() + (4 * head * eps + 8 * unit) * x.abs().amax()
            budget = budget + 3 * lost * (y.double() - x).abs().amax() + unit * worth
            check_within("gradient", grad, x, budget, keywords)
        assert (
            metrics.num_tokens
            == ((keywords["tokens"] >= 0) & (keywords["token_weights"] > 0)).sum()
        )


@pytest.mark.parametrize("kind", ["k2", "k3", "policy"])
@pytest.mark.parametrize("form", ["logits", "head"])
def test_the_gradient_has_the_mean_of_a_divergences(kind: str, form: str) -> None:
    """Over 200,000 draws, within 3 sigma in every coordinate: reverse KL's, of k3 forward KL's."""
    n, v = 200_000, 7
    g = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(v, generator=g, dtype=torch.float64) for _ in range(2))
    tokens = torch.multinomial(student.softmax(-1), n, replacement=True, generator=g)
    t = teacher.log_softmax(-1)[tokens]
    leaf = student.expand(n, v).clone().requires_grad_()
    side = leaf if form == "logits" else LMHead(leaf, torch.eye(v, dtype=torch.float64))
    loss = sampled_kd_loss(side, t, tokens, loss_type=kind, reduction="sum")
    (rows,) = torch.autograd.grad(loss, leaf)
    whole = student.clone().requires_grad_()
    divergence = "forward_kl" if kind == "k3" else "reverse_kl"
    (want,) = torch.autograd.grad(kd_loss(whole, teacher, divergence=divergence), whole)
    sigma = rows.std(0) / math.sqrt(n)
    assert ((rows.mean(0) - want).abs() <= 3 * sigma).all()
    assert want.abs().max() > 30 * sigma.max(), "a law that nothing could break"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["logits", "frozen", "trained"])
def test_the_ratio_is_exactly_1(
    dtype: torch.dtype, form: str, backend: str, device: torch.device
) -> None:
    """Where the same operation made the old log-probabilities."""
    n, v, h = 70, 900, 32
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, v if form == "logits" else h, generator=g).to(dtype).to(device)
    w = torch.randn(v, h, generator=g).to(dtype).to(device).requires_grad_(form == "trained")
    tokens = torch.randint(v, (n,), generator=g).to(device)
    tokens[::5] = -100
    side = x.requires_grad_() if form == "logits" else LMHead(x.requires_grad_(), w)
    with torch.no_grad():
        old = token_log_probs(side, tokens, backend=backend).log_probs
    for reduction in ("none", "sum"):
        loss, metrics = sampled_kd_loss_and_metrics(
            side,
            None,
            tokens,
            loss_type="policy",
            old_log_probs=old,
            advantages=torch.ones(n, device=device),
            clip=(1.0, 1.0),
            reduction=reduction,
            backend=backend,
        )
        count = (tokens >= 0).sum()
        assert loss.sum() == -count
        assert metrics.clip_fraction == 0 and metrics.num_tokens == count
        assert metrics.log_ratio.isnan() and metrics.k3.isnan()


@pytest.mark.parametrize("trained, metrics", list(itertools.product([False, True], repeat=2)))
def test_products(trained: bool, metrics: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in the forward: three with a trained head, two with a frozen one, none for rows that do
    not count."""
    n, v, h = 12, 70, 8
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=trained)
    tokens = torch.randint(v, (n,))
    tokens[::3] = -100
    weights = torch.ones(n)
    weights[1] = 0
    done = 0

    def multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        nonlocal done
        done += a.shape[0] * a.shape[1] * b.shape[1]
        reference.mm_(out, a, b, accumulate)

    monkeypatch.setattr(cpu, "mm_", multiply)
    function: Any = sampled_kd_loss_and_metrics if metrics else sampled_kd_loss
    out = function(LMHead(hidden, weight), torch.full((n,), -4.0), tokens, token_weights=weights)
    (out[0] if metrics else out).backward()
    assert done == (3 if trained else 2) * 7 * v * h


def test_metrics() -> None:
    x = torch.randn(5, 40, dtype=torch.float64)
    tokens = torch.tensor([3, 4, -100, 6, 7])
    t = torch.tensor([-1.0, -2.0, NAN, -3.0, -4.0], dtype=torch.float64)
    s = x.log_softmax(-1)
    own = s.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    old = own + torch.tensor([0.5, -0.5, 0.0, 0.0, 0.1], dtype=torch.float64)
    _, got = sampled_kd_loss_and_metrics(
        x, t, tokens, loss_type="policy", old_log_probs=old.clamp(max=0), clip=(0.8, 1.2)
    )
    keep = tokens >= 0
    r = (t - own)[keep]
    assert got.log_ratio.item() == pytest.approx(-r.mean().item())
    assert got.k3.item() == pytest.approx((r.exp() - 1 - r).mean().item())
    entropy = -(s.exp() * s).sum(-1)[keep].mean().item()
    assert got.student_entropy.item() == pytest.approx(entropy)
    ratio = (own - old.clamp(max=0))[keep].exp()
    gone = ((r > 0) & (ratio > 1.2)) | ((r < 0) & (ratio < 0.8))
    assert got.clip_fraction.item() == pytest.approx(gone.double().mean().item())
    assert 0 < got.clip_fraction < 1
    assert got.num_tokens == 4


@pytest.mark.parametrize("form", ["logits", "head"])
def test_nothing_counted(form: str, backend: str, device: torch.device) -> None:
    x = torch.full((3, 20), NAN, device=device, requires_grad=True)
    side = x if form == "logits" else LMHead(x, torch.randn(50, 20, device=device))
    tokens, t = torch.full((3,), -100, device=device), torch.full((3,), NAN, device=device)
    loss, metrics = sampled_kd_loss_and_metrics(side, t, tokens, backend=backend)
    assert loss == 0 and metrics.num_tokens == 0 and metrics.k3 == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_a_token_that_the_student_has_masked() -> None:
    """Cannot have been drawn: the loss is infinite, the gradient 0."""
    x = torch.randn(2, 30)
    x[0, 3] = -INF
    x.requires_grad_()
    loss = sampled_kd_loss(x, torch.tensor([-1.0, -1.0]), torch.tensor([3, 4]))
    assert loss == INF
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.isfinite().all() and (grad[0] == 0).all() and grad[1].any()


@pytest.mark.parametrize("form", ["logits", "frozen", "trained"])
@pytest.mark.parametrize("kind, reduction", [("k2", "mean"), ("policy", "sum"), ("k3", "none")])
def test_compiled(form: str, kind: str, reduction: str) -> None:
    torch._dynamo.reset()
    v, h = 90, 8
    tokens = torch.randint(v, (2, 3))
    tokens[0, 1] = -100
    t, old = torch.full((2, 3), -3.0), torch.full((2, 3), -4.5)
    policy = {"old_log_probs": old, "clip": (0.9, 1.1)} if kind == "policy" else {}

    def run(x: Tensor, w: Tensor, temperature: float) -> Tensor:
        side = x if form == "logits" else LMHead(x, w)
        return sampled_kd_loss(
            side, t, tokens, loss_type=kind, reduction=reduction, temperature=temperature, **policy
        )

    x = torch.randn(2, 3, v if form == "logits" else h, requires_grad=True)
    w = torch.randn(v, h, requires_grad=form == "trained")
    leaves = [y for y in (x, w) if y.requires_grad]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 1.5):
        got, want = compiled(x, w, temperature), run(x, w, temperature)
        grads = [torch.autograd.grad(y.sum(), leaves) for y in (got, want)]
        for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused() -> None:
    for side in (torch.randn(3, 50), LMHead(torch.randn(3, 8), torch.randn(50, 8))):
        leaf = side if isinstance(side, Tensor) else side.hidden
        leaf.requires_grad_()
        for reduction in ("mean", "none"):
            loss = sampled_kd_loss(
                side, torch.full((3,), -2.0), torch.tensor([1, 2, 3]), reduction=reduction
            )
            (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()


T, Y = torch.tensor([-1.0, -2.0]), torch.tensor([1, 2])
POLICY = {"loss_type": "policy"}
MISTAKES: dict[str, tuple[Any, ...]] = {
    "k1": (ValueError, "k1.*mean over y.*2506.09477.*'k2'", {"loss_type": "k1"}),
    "kind": (ValueError, "loss_type='k4': expected one of 'k2', 'k3'", {"loss_type": "k4"}),
    "no teacher": (ValueError, "teacher_log_probs is None with loss_type='k2'", {"t": None}),
    "no use": (ValueError, "advantages was given with loss_type='k2'", {"advantages": T}),
    "clip": (ValueError, r"clip=0.2: expected the smallest", {**POLICY, "clip": 0.2}),
    "clip order": (ValueError, r"clip=\(1.2, 0.8\)", {**POLICY, "clip": (1.2, 0.8)}),
    "shape": (ValueError, r"teacher_log_probs has shape \(2, 1\): expected \(2,\)",
              {"t": T[:, None]}),
    "columns": (ValueError, r"tokens has shape \(2, 1\): expected \(2,\), the",
                {"tokens": Y[:, None]}),
    "graph": (ValueError, "old_log_probs requires grad",
              {**POLICY, "old_log_probs": T.clone().requires_grad_()}),
    "impossible": (ValueError, r"teacher_log_probs is -inf at token 1 \(id 2\)",
                   {"t": torch.tensor([-1.0, -INF])}),
    "logits": (ValueError, "teacher_log_probs holds 3: expected natural logarithms",
               {"t": torch.tensor([-1.0, 3.0])}),
    "weights": (ValueError, "token_weights holds numbers from -2", {"token_weights": T}),
    "normalizer": (ValueError, "normalizer was given with reduction='none'",
                   {"reduction": "none", "normalizer": 2.0}),
    "reduction": (ValueError, "reduction='avg'", {"reduction": "avg"}),
    "student": (TypeError, "student is a dict", {"student": {}}),
    "unknown": (TypeError, "unexpected keyword argument labels", {"labels": Y}),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    error, message, changed = MISTAKES[case]
    arguments: dict[str, Any] = {"student": torch.randn(2, 9), "t": T, "tokens": Y} | changed
    student, t, tokens = (arguments.pop(name) for name in ("student", "t", "tokens"))
    with pytest.raises(error, match=message):
        sampled_kd_loss_and_metrics(student, t, tokens, **arguments)
