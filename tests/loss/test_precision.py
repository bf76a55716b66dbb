"""Where digits are lost first: fp16, roundings that add up, students close to their teacher, and
temperatures that leave nothing of the difference. On every backend that runs here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, backends, divergences, kd_loss

NAMES = divergences.names()
SCALE = 65536.0  # what a GradScaler begins with
HALF = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double().cpu() - exact.cpu()).norm() / exact.cpu().norm())


def eager(s: Tensor, t: Tensor, name: str | divergences.Divergence, temperature: float) -> Tensor:
    """(N,) of the formula, times T^2."""
    divergence = divergences.make(name) if isinstance(name, str) else name
    lq, lp = ((x / temperature).log_softmax(-1) for x in (s, t))
    return divergence.value(lp, lq).sum(-1) * temperature**2


# ---- fp16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("form", ["head", "dense"])
def test_fp16_keeps_what_a_loss_scale_would(
    backend: str, device: torch.device, name: str, form: str
) -> None:
    """A vocabulary of 8,192 and a student close to its teacher: most of q - p is below fp16's
    smallest number, but not after a loss scale of 65,536 in fp32."""
    n, v, h = 16, 8192, 32
    hidden, weight = normal(n, h).half(), (normal(v, h, seed=1) * 0.3).half()
    other = (hidden.float() + 0.02 * normal(n, h, seed=2)).half()
    if form == "dense":
        hidden, other = (x.float() @ weight.float().T for x in (hidden, other))
        hidden, other, weight = hidden.half(), other.half(), None

    def gradients(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [x.to(device, dtype).clone() for x in (hidden, weight) if x is not None]
        leaves = [x.requires_grad_() for x in leaves]
        constants = [x.to(device, dtype).clone() for x in (other, weight) if x is not None]
        if ours:
            s, t = (x[0] if len(x) == 1 else LMHead(*x) for x in (leaves, constants))
            loss = kd_loss(s, t, divergence=name, temperature=2.0, backend=backend)
        else:
            wide = torch.promote_types(dtype, torch.float32)
            parts = ([x.to(wide) for x in side] for side in (leaves, constants))
            s, t = (x[0] if len(x) == 1 else x[0] @ x[1].T for x in parts)
            loss = eager(s, t, name, 2.0).mean()
        return list(torch.autograd.grad(loss * SCALE, leaves))

    exact = gradients(torch.float64, ours=False)
    plain = gradients(torch.float16, ours=False)
    for got, usual, want in zip(gradients(torch.float16, ours=True), plain, exact, strict=True):
        assert relative(got, want) < max(4e-4, relative(usual, want)) < 0.1


@pytest.mark.parametrize("form", ["head", "dense"])
@pytest.mark.parametrize("weights", [False, True])
def test_fp16_does_not_overflow(
    backend: str, device: torch.device, form: str, weights: bool
) -> None:
    """Negative powers of p make gradients of 1e5 for a token, of which the mean is in range."""
    n, v = 64, 50
    s, t = 3 * normal(n, v).half(), 3 * normal(n, v, seed=1).half()
    t[:, 7] = -18.0
    eye = torch.eye(v, device=device)
    w = torch.linspace(1e-3, 500, n) if weights else None
    found = []
    for dtype, ours in ((torch.float64, False), (torch.float16, True)):
        x = s.to(device, dtype).requires_grad_()
        y, power = t.to(device, dtype), divergences.alpha(-0.5)
        if ours:
            sides = (x, y) if form == "dense" else (LMHead(z, eye.half()) for z in (x, y))
            by = None if w is None else w.to(device)
            loss = kd_loss(*sides, divergence=power, token_weights=by, backend=backend)
        else:
            by = torch.ones(n, device=device) if w is None else w.to(device)
            loss = (eager(x, y, power, 1.0) * by.double()).sum() / by.double().sum()
        found.append(torch.autograd.grad(loss, x)[0])
    assert found[0].abs().max() * n > 1e5
    assert found[1].isfinite().all() and relative(found[1], found[0]) < 1e-3


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_rows_keep_powers_of_their_own(
    backend: str, device: torch.device, inplace: bool, reduction: str
) -> None:
    """Rows of weights from 1e-6 to 1, one of 0 and one of NaN that does not count; twice the
    backward."""
    s, t = normal(6, 40).half(), normal(6, 40, seed=1).half()
    w = torch.tensor([1.0, 1e-6, 0.0, 1e-3, 1.0, 0.0], device=device)
    s[5] = math.nan
    x = s.to(device).requires_grad_()
    loss = kd_loss(
        *(x * 1 if inplace else x, t.to(device)),
        token_weights=w,
        inplace=inplace,
        reduction=reduction,
        backend=backend,
    )
    up = torch.full_like(loss, SCALE)
    got, again = (torch.autograd.grad(loss, x, up, retain_graph=True)[0] for _ in range(2))
    exact = s[:5].double().requires_grad_()
    rows = eager(exact, t[:5].double(), "forward_kl", 1.0) * w[:5].double().cpu()
    want = torch.autograd.grad((rows.sum() / (w.sum().item() if reduction == "mean" else 1)), exact)
    assert torch.equal(got, again) and (got[5] == 0).all() and (got[2] == 0).all()
    for row in (0, 1, 3, 4):
        assert relative(got[row], SCALE * want[0][row]) < 2e-3


# ---- one rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_a_heads_gradients_are_rounded_once(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the forward keeps is in fp32, and the backward rounds the product with an upstream
    gradient that is no power of two."""
    module: Any = backends.load(backend)
    seen, scale_ = [], module.scale_

    def spy(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
        scale_(grad, factor, out)
        if out is not None:
            seen.append((grad.clone(), factor, out))

    parts = [normal(50, 8), normal(53, 8, seed=1), normal(53, seed=2)]
    head = LMHead(*(x.to(device, dtype).requires_grad_() for x in parts))
    teacher = LMHead(*(x.to(device, dtype).flip(0) for x in parts))
    loss = kd_loss(head, teacher, chunk_bytes=chunk_bytes, backend=backend)
    monkeypatch.setattr(module, "scale_", spy)
    leaves = (head.hidden, head.weight, head.bias)
    upstream = torch.tensor(0.3, device=device)
    grads = torch.autograd.grad(loss, leaves, upstream)
    assert len(seen) == 3
    for grad, (kept, factor, out) in zip(grads, seen, strict=True):
        assert kept.dtype == torch.float32 and grad.dtype == dtype
        assert torch.equal(out, (kept * factor).to(dtype)) and torch.equal(grad, out.view_as(grad))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    other = LMHead(*(x.double() for x in (teacher.hidden, teacher.weight, teacher.bias)))
    truth = kd_loss(LMHead(*exact), other, backend="reference")
    rounded = module.head_dtypes(dtype)[1] == dtype  # that of the logits
    for got, want in zip(grads, torch.autograd.grad(truth, exact, upstream), strict=True):
        half_a_unit = torch.finfo(dtype).eps / 2 * want.abs()
        slack = torch.finfo(dtype).eps * want.abs().max() if rounded else 1e-6 * want.abs().max()
        assert ((got - want).abs() <= half_a_unit + slack).all()


# ---- a student close to its teacher --------------------------------------------------------------


def close_to_the_bucket(noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, ids, the teacher's log-probabilities there in fp32."""
    t = 3 * normal(4, 2000)
    log_probs, ids = t.double().log_softmax(-1).topk(16)
    return t + noise * normal(4, 2000, seed=1), ids, log_probs.float()


def bucketed(s: Tensor, ids: Tensor, log_probs: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    lq, lp = s.to(dtype).log_softmax(-1), log_probs.to(dtype)
    last = torch.log1p(-log_probs.double().exp().sum(-1, True)).to(dtype)
    rest = lq.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    categories = torch.cat([lp, last], -1), torch.cat([lq.gather(-1, ids), rest], -1)
    return divergences.make(name).value(*categories).sum(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [1e-2, 1e-3])
def test_bucket_close_to_the_teacher(
    backend: str, device: torch.device, name: str, noise: float
) -> None:
    """Losses of 1e-5 and 1e-7: the tail's logarithm has to be that of a ratio."""
    s, ids, log_probs = close_to_the_bucket(noise)
    exact = bucketed(s, ids, log_probs, name, torch.float64)
    usual = bucketed(s, ids, log_probs, name, torch.float32)
    teacher = SparseTeacher(ids.to(device), log_probs.to(device))
    loss = kd_loss(s.to(device), teacher, divergence=name, reduction="none", backend=backend)
    error, budget = relative(loss, exact), relative(usual, exact)
    tame = ("mixed_kl", "total_variation")  # of which fp32 loses nothing here
    assert error < 1e-3 and (error < 0.1 * budget or name in tame)


# ---- large temperatures --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_large_temperatures_are_right_or_refused(
    backend: str, device: torch.device, name: str
) -> None:
    s, t = (3 * normal(4, 300)).to(device), (3 * normal(4, 300, seed=1)).to(device)
    for which in ("temperature", "teacher_temperature"):
        with pytest.raises(ValueError, match=rf"^{which}=10000: expected at most 1000 for float32"):
            kd_loss(s, t, divergence=name, **{which: 1e4}, backend=backend)  # type: ignore[arg-type]
    kd_loss(s, t, divergence=name, temperature=1000.0, backend=backend)
    exact = eager(s.double(), t.double(), name, 100.0).mean()  # far enough for its limit
    wide = kd_loss(s.double(), t.double(), divergence=name, temperature=1e4, backend=backend)
    scale = 100.0 if name == "total_variation" else 1.0  # which shrinks with 1 / T
    assert abs(wide - scale * exact) < 0.05 * wide
    with pytest.raises(ValueError, match="expected at least 1e-30"):
        kd_loss(s, t, divergence=name, temperature=1e-40, backend=backend)


@pytest.mark.parametrize("weight", [1e-30, 1e-40])  # the latter no normal number in fp32
def test_a_mean_does_not_depend_on_the_size_of_its_weights(
    backend: str, device: torch.device, weight: float
) -> None:
    student, teacher = (torch.randn(3, 20, device=device) for _ in range(2))
    weights = torch.full((3,), weight, device=device)
    mean = kd_loss(student, teacher, token_weights=weights, backend=backend)
    torch.testing.assert_close(mean, kd_loss(student, teacher, backend=backend), rtol=1e-3, atol=0)
