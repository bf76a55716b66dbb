"""The z-loss: z_loss_weight times the square of the logsumexp of the student's logits at T = 1."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from budget import check, plain_case
from own_rules import of_everything
from torch import Tensor

from fusedkd import (
    KDLoss,
    LMHead,
    Routed,
    SparseTeacher,
    divergences,
    kd_loss,
    kd_loss_and_metrics,
)
from fusedkd.divergences import Divergence
from fusedkd.kernels import cpu

N, V, H, IGNORED = 7, 61, 5, -100
WEIGHT = 0.3


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Logits of both, and labels of which some are ignored."""
    draw = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(N, V, generator=draw) for _ in range(2))
    labels = torch.randint(V, (N,), generator=draw)
    labels[[2, 5]] = IGNORED
    return s.to(dtype).to(device), t.to(dtype).to(device), labels.to(device)


def z_loss(logits: Tensor) -> Tensor:
    return WEIGHT * logits.double().logsumexp(-1) ** 2


def both(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("name", divergences.names())
def test_beside_each_divergence(backend: str, device: torch.device, name: str) -> None:
    """Within the budget of all losses; at temperatures with kernels of their own, and without."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    heats = itertools.cycle((2.0, 1.0, 1.3))
    for seed, dtype in enumerate(dtypes):
        keywords = {"divergence": name, "z_loss_weight": WEIGHT, "temperature": next(heats)}
        keywords |= {"ce_weight": 0.5 * (seed % 2), "label_smoothing": 0.1 * (seed % 2)}
        case = plain_case(seed, device, 4, 131, dtype, **keywords)
        if seed == 2:
            case.labels = None
        check(case, backend, metrics=seed > 1)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_alone(backend: str, device: torch.device, reduction: str, labelled: bool) -> None:
    """Of the tokens that count, on the cross-entropy's terms; no teacher, no labels are needed."""
    s, _, labels = inputs(device)
    leaf = s.requires_grad_()
    weights = torch.rand(N, device=device)
    weights[3] = 0
    given = labels if labelled else None
    keywords: dict[str, Any] = {"reduction": reduction, "token_weights": weights}
    counts = (labels != IGNORED) * weights if labelled else weights
    rows = z_loss(leaf) * counts
    want = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counts.sum()}[reduction]
    with torch.no_grad():
        leaf[3] = math.nan  # does not count
    for metrics in (False, True):
        loss = kd_loss_and_metrics if metrics else kd_loss
        got: Any = loss(
            leaf, None, given, kd_weight=0.0, z_loss_weight=WEIGHT, backend=backend, **keywords
        )
        got = both(got[0] if metrics else got, leaf)
        torch.testing.assert_close(got[0], want.detach().float())
        expected = torch.autograd.grad(want.sum(), leaf, retain_graph=True)[0]
        expected[3] = 0
        torch.testing.assert_close(got[1], expected)


@pytest.mark.parametrize(
    "tail, name, labelled, ce_weight",
    [
        ("bucket", "forward_kl", True, 0.4),
        ("drop", "total_variation", False, 0.0),
        ("renormalize", "jsd", True, 0.0),
        ("generalized", "reverse_kl", True, 0.4),
        ("conditional", "jsd", False, 0.0),
    ],
)
def test_beside_a_sparse_teacher(
    backend: str, device: torch.device, tail: str, name: str, labelled: bool, ce_weight: float
) -> None:
    """It adds to the loss and to the gradient what it is alone."""
    s, t, labels = inputs(device, torch.float64)
    leaf = s.requires_grad_()
    log_probs, ids = t.log_softmax(-1).topk(9)
    teacher = SparseTeacher(ids, log_probs, tail)
    given = labels if labelled else None
    for temperature in (1.0, 1.7):
        keywords: dict[str, Any] = {"divergence": name, "temperature": temperature}
        keywords |= {"ce_weight": ce_weight, "backend": backend, "reduction": "none"}
        without = both(kd_loss(leaf, teacher, given, **keywords), leaf)
        got = both(kd_loss(leaf, teacher, given, z_loss_weight=WEIGHT, **keywords), leaf)
        counts = torch.ones(N, device=device) if given is None else given != IGNORED
        alone = both(z_loss(leaf) * counts, leaf)
        for x, y, z in zip(got, without, alone, strict=True):
            torch.testing.assert_close(x, y + z, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_of_a_head(backend: str, device: torch.device, reduction: str, dtype: torch.dtype) -> None:
    """After scale and softcap, token by token in chunks; all its gradients."""
    draw = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw).to(dtype).to(device).requires_grad_()
        for shape in ((N, H), (V, H), (V,))
    )
    labels = inputs(device)[2]
    head = LMHead(hidden, weight, bias, logit_scale=1.5, softcap=4.0)
    loss = kd_loss(
        head, None, labels, kd_weight=0.0, z_loss_weight=WEIGHT, reduction=reduction,
        chunk_bytes=1, backend=backend,
    )  # fmt: skip
    raw = hidden.double() @ weight.double().T + bias.double()
    rows = z_loss(4 * torch.tanh(1.5 * raw / 4)) * (labels != IGNORED)
    want = rows if reduction == "none" else rows.sum() / 5
    upstream = torch.randn(loss.shape, generator=draw).to(device)
    leaves = (hidden, weight, bias)
    got = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    exact = torch.autograd.grad(want, leaves, upstream.double())
    rtol = 1e-7 if dtype == torch.float64 else 2**-7
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


def test_masked_entries(backend: str, device: torch.device) -> None:
    """-inf among the logits, the label's too, has no part in it and no gradient."""
    s, t, _ = inputs(device)
    s[:, 10:40] = t[:, 10:40] = -math.inf
    s[1, 2:] = -math.inf
    leaf = s.requires_grad_()
    masked = torch.full((N,), 20, device=device)
    for labels, weight in ((masked, 0.0), (None, 1.0)):
        loss = kd_loss(
            leaf, t, labels, kd_weight=weight, divergence="jsd", z_loss_weight=WEIGHT,
            reduction="none", backend=backend,
        )  # fmt: skip
        grad = torch.autograd.grad(loss.sum(), leaf)[0]
        assert loss.isfinite().all() and grad.isfinite().all()
        assert (grad[s == -math.inf] == 0).all()
    exact = [x.to(torch.float32) for x in both(z_loss(leaf), leaf)]
    torch.testing.assert_close(loss.detach() - kd_loss(leaf.detach(), t, divergence="jsd",
                               reduction="none", backend=backend), exact[0])  # fmt: skip


def test_nothing_counted_and_what_is_no_number(backend: str, device: torch.device) -> None:
    s, _, labels = inputs(device)
    leaf = s.requires_grad_()
    keywords: dict[str, Any] = {"kd_weight": 0.0, "z_loss_weight": WEIGHT, "backend": backend}
    loss, grad = both(kd_loss(leaf, None, torch.full_like(labels, IGNORED), **keywords), leaf)
    assert loss == 0 and not grad.any()
    with torch.no_grad():
        leaf[0, 0] = math.nan
    assert kd_loss(leaf, None, labels, **keywords).isnan()


def test_small_gradients_survive_fp16(backend: str, device: torch.device) -> None:
    """Dense fp16 logits, a large vocabulary, a loss scale."""
    s = (torch.randn(2, 5003, generator=torch.Generator().manual_seed(0))).half().to(device)
    leaf = s.requires_grad_()
    keywords: dict[str, Any] = {"kd_weight": 0.0, "backend": backend}
    loss = kd_loss(leaf, None, None, z_loss_weight=1e-4, **keywords)
    (got,) = torch.autograd.grad(loss * 65536, leaf)
    wide = s.detach().double().requires_grad_()
    (want,) = torch.autograd.grad((1e-4 * wide.logsumexp(-1) ** 2).mean() * 65536, wide)
    torch.testing.assert_close(got.double(), want, rtol=2**-9, atol=2**-24)


def test_a_row_rule_has_no_say_in_it(backend: str, device: torch.device) -> None:
    s, t, labels = inputs(device, torch.float64)
    keywords: dict[str, Any] = {"row_rule": of_everything(slope=0.3), "backend": backend}
    leaf = s.requires_grad_()
    loss = kd_loss(leaf, t, labels, z_loss_weight=WEIGHT, **keywords)
    base = kd_loss(leaf, t, labels, **keywords)
    want = z_loss(leaf)[labels != IGNORED].mean()
    for x, y, z in zip(both(loss, leaf), both(base, leaf), both(want, leaf), strict=True):
        torch.testing.assert_close(x, y + z, rtol=1e-7, atol=1e-9)


def test_a_divergence_by_hand_has_it_too() -> None:
    s, t, labels = inputs(torch.device("cpu"), torch.float64)
    own = Divergence("own", value=lambda lp, lq: lp.exp() * (lp - lq))
    options = [
        kd_loss(s, t, labels, divergence=d, z_loss_weight=WEIGHT, backend="reference")
        for d in (own, "forward_kl")
    ]
    torch.testing.assert_close(*options)


def test_several_teachers(backend: str, device: torch.device) -> None:
    """Each token's once, whoever its teacher is."""
    s, t, labels = inputs(device)
    names = ["one", "other"] * 3 + ["one"]
    rows = [torch.tensor([x == name for x in names], device=device) for name in ("one", "other")]
    several = Routed({"one": t[rows[0]], "other": t[rows[1]]}, names)
    keywords: dict[str, Any] = {"z_loss_weight": WEIGHT, "ce_weight": 0.2, "backend": backend}
    torch.testing.assert_close(
        kd_loss(s, several, labels, **keywords), kd_loss(s, t, labels, **keywords)
    )


@pytest.mark.parametrize("form", ["dense", "head"])
def test_traced(form: str) -> None:
    """The weight is a number at run time: one graph serves all."""
    s, t, labels = inputs(torch.device("cpu"))
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def loss(s: Tensor, weight: float) -> Tensor:
        side = s if form == "dense" else LMHead(s, torch.eye(V))
        return kd_loss(side, t, labels, z_loss_weight=weight)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=count, fullgraph=True)
    for weight in (0.1, 0.2, 0.3, 0.4):
        leaf = s.detach().requires_grad_()
        for x, y in zip(both(compiled(leaf, weight), leaf), both(loss(leaf, weight), leaf)):  # noqa: B905
            torch.testing.assert_close(x, y)
    assert len(graphs) <= 2  # dynamo's first sees a constant


def test_what_it_may_be() -> None:
    s, t, _ = inputs(torch.device("cpu"))
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^z_loss_weight="):
            kd_loss(s, t, z_loss_weight=wrong)
        with pytest.raises(ValueError, match=r"^z_loss_weight="):
            KDLoss(z_loss_weight=wrong)


def test_an_extension_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers would be read in another order."""
    monkeypatch.setattr(cpu, "PARAMETERS", cpu.PARAMETERS + 1)
    assert "another version" in (cpu.unavailable.__wrapped__() or "")
