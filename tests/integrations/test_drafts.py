"""Draft models: acceptance and its losses against their formulas in fp64, speculators' loss map."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd import LMHead, drafts
from fusedkd.integrations import speculators

N, V, H, DRAFT = 7, 61, 16, 23


def make(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draft states and head, target states and head, ids; in fp32, so fp64 has the same numbers."""
    g = torch.Generator().manual_seed(seed)
    h, t = (torch.randn(2, N, H, generator=g) for _ in range(2))
    w, u = torch.randn(DRAFT, H, generator=g) / 3, torch.randn(V, H, generator=g) / 3
    ids = torch.randperm(V, generator=g)[:DRAFT]
    return h, w, t, u, ids


def alpha_of(q: Tensor, p: Tensor) -> Tensor:
    return 1 - (p - q).abs().sum(-1) / 2  # sum min(p, q), in the form whose error at fp32 is ours


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "negative_log_acceptance": lambda lq, lp: -alpha_of(lq.exp(), lp.exp()).log(),
    "lk_hybrid": lambda lq, lp: _hybrid(lq, lp),
}


def _hybrid(lq: Tensor, lp: Tensor, eta: float = 3.0) -> Tensor:
    alpha = alpha_of(lq.exp(), lp.exp())
    w = (-eta * alpha.detach()).exp()
    return w * (lp.exp() * (lp - lq)).sum(-1) + (1 - w) * (1 - alpha)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_losses_of_heads(name: str, weighted: bool, backend: str) -> None:
    """Values and gradients are at most eager fp32's error away from the fp64 truth."""
    h, w, t, u, ids = make()
    weights = torch.rand(2, N, generator=torch.Generator().manual_seed(3)) if weighted else None
    if weights is not None:
        weights[0, 2] = 0
        h[0, 2], t[0, 2] = float("nan"), float("nan")  # a token that does not count has no effect
    upstream = torch.randn(2, N, generator=torch.Generator().manual_seed(4))

    def eager(dtype: torch.dtype) -> list[Tensor]:
        counts = torch.ones(2, N, dtype=torch.bool) if weights is None else weights > 0
        x, y = (a.detach().to(dtype).clone().requires_grad_() for a in (h.nan_to_num(), w))
        lq = (x @ y.T).log_softmax(-1)
        lp = (t.nan_to_num().to(dtype) @ u.to(dtype)[ids].T).log_softmax(-1)
        loss = FORMULAS[name](lq, lp) * counts
        loss = loss if weights is None else loss * weights.to(dtype)
        (loss * upstream.to(dtype)).sum().backward()
        return [loss.detach(), x.grad, y.grad]  # type: ignore[list-item]

    x, y = (a.clone().requires_grad_() for a in (h, w))
    loss = getattr(drafts, name)(
        *(LMHead(x, y), LMHead(t, u, ids=ids)),
        token_weights=weights,
        reduction="none",
        backend=backend,
    )
    (loss * upstream).sum().backward()
    truth, budget = eager(torch.float64), eager(torch.float32)
    for ours, true, fp32 in zip([loss.detach(), x.grad, y.grad], truth, budget, strict=True):
        error, allowed = (ours - true).abs().max(), (fp32 - true).abs().max()
        assert error <= 3 * allowed + 2**-22 * true.abs().max()


def test_acceptance_is_what_speculative_sampling_accepts(backend: str) -> None:
    h, w, t, u, ids = make()
    h[0, 0] = t[0, 0] = float("nan")
    weights = torch.ones(2, N)
    weights[0, 0], weights[1, 1] = 0, 2.5
    sides = LMHead(h, w), LMHead(t, u, ids=ids)
    rate = drafts.acceptance_rate(*sides, token_weights=weights, backend=backend)
    q, p = ((a.double() @ b.double().T).softmax(-1) for a, b in ((h, w), (t, u[ids])))
    expected = alpha_of(q, p).nan_to_num()
    torch.testing.assert_close(
        rate.double(), (expected * weights).sum() / weights.sum(), atol=2e-7, rtol=0
    )
    each = drafts.acceptance_rate(*sides, token_weights=weights, reduction="none", backend=backend)
    torch.testing.assert_close(each.double(), expected * weights, atol=4e-7, rtol=0)
    half = drafts.acceptance_rate(
        *sides, token_weights=weights, normalizer=2 * weights.sum(), backend=backend
    )
    torch.testing.assert_close(half, rate / 2)
    # a draft's token is drawn from q and kept with probability min(1, p / q)
    drawn = torch.multinomial(q[1, 1], 40_000, True, generator=torch.Generator().manual_seed(0))
    kept = (p[1, 1] / q[1, 1]).clamp(max=1)[drawn].mean()
    assert abs(kept - expected[1, 1]) < 3 * 0.5 / 200


def test_nothing_accepted_still_has_a_gradient(backend: str) -> None:
    draft = torch.tensor([[0.0, 40.0]], requires_grad=True)
    target = torch.tensor([[40.0, 0.0]])
    loss = drafts.negative_log_acceptance(draft, target, backend=backend)
    loss.backward()
    assert torch.isfinite(loss) and loss > -torch.tensor(drafts.FLOOR).log()
    assert draft.grad is not None and torch.isfinite(draft.grad).all()


def test_nothing_counts() -> None:
    draft = torch.randn(3, 5, requires_grad=True)
    loss = drafts.lk_hybrid(draft, torch.randn(3, 5), token_weights=torch.zeros(3))
    loss.backward()
    assert loss == 0 and draft.grad is not None and not draft.grad.any()


def test_d2t_is_offsets() -> None:
    ids = torch.tensor([0, 3, 4, 60])
    assert drafts.target_ids(ids - torch.arange(4)).tolist() == ids.tolist()
    with pytest.raises(ValueError, match="two draft ids one target id"):
        drafts.target_ids(torch.tensor([1, 0]))
    with pytest.raises(TypeError, match="offsets"):
        drafts.target_ids(torch.ones(3))
    with pytest.raises(ValueError, match="an offset a draft id"):
        drafts.target_ids(torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"eta": -1.0}, ValueError, "eta=-1.0"),
        ({"temperature": 2.0}, TypeError, "'temperature' is no argument"),
        ({"reduction": "batchmean"}, ValueError, "reduction='batchmean'"),
        ({"token_weights": -torch.ones(3)}, ValueError, "token_weights"),
        ({"normalizer": -2.0}, ValueError, "normalizer=-2.0"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer"),
        ({"normalizer": 2.0, "reduction": "none"}, ValueError, "normalizer was given"),
    ],
)
def test_mistakes(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        drafts.lk_hybrid(torch.randn(3, 5), torch.randn(3, 5), **options)


# speculators 0.9.0, speculators/losses/eager.py, whose fused losses compute the same
THEIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_div": lambda lq, lp: (lp.exp() * (lp - lq)).sum(-1),
    "rkl": lambda lq, lp: (lq.exp() * (lq - lp)).sum(-1),
    "jsd": lambda lq, lp: (
        0.5 * (lp.exp() * (lp - _m(lq, lp)) + lq.exp() * (lq - _m(lq, lp))).sum(-1)
    ),
    "ce": lambda lq, lp: -lq.gather(-1, lp.argmax(-1, keepdim=True))[..., 0],
    "tv": lambda lq, lp: 1 - alpha_of(lq.exp(), lp.exp()),
    "nla": FORMULAS["negative_log_acceptance"],
    "lk_hybrid": _hybrid,
}


def _m(lq: Tensor, lp: Tensor) -> Tensor:
    return torch.logaddexp(lq, lp) - torch.tensor(2.0).log()


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    s, t = (2 * torch.randn(1, 9, 37, generator=g) for _ in range(2))
    upstream = torch.randn(1, 9, generator=g)
    x, y = s.clone().requires_grad_(), s.to(dtype, copy=True).requires_grad_()
    loss, expected = ours(x, t), theirs(y, t.to(dtype))
    assert loss.shape == (1, 9)
    grads = [(a * upstream).sum() for a in (loss, expected)]
    torch.testing.assert_close(loss, expected.float(), rtol=2e-6, atol=1e-6)
    ours_grad, their_grad = (
        torch.autograd.grad(a, b)[0].float() for a, b in zip(grads, (x, y), strict=True)
    )
    torch.testing.assert_close(ours_grad, their_grad, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", THEIRS)
def test_speculators_losses(name: str) -> None:
    def theirs(s: Tensor, t: Tensor) -> Tensor:
        return THEIRS[name](s.log_softmax(-1), t.log_softmax(-1))

    compare(speculators.LOSSES[name], theirs, torch.float64)


@pytest.mark.parametrize("name", THEIRS)
def test_inside_speculators(name: str) -> None:
    """Where speculators is installed: its own functions, its own look-up by name."""
    host = pytest.importorskip("speculators.losses.utils")
    eager = pytest.importorskip("speculators.losses.eager")
    compare(
        speculators.LOSSES[name], getattr(eager, speculators.LOSSES[name].__name__), torch.float32
    )
    speculators.register()
    for implementation in ("fused", "eager"):
        assert host.resolve_loss_config(name, implementation)[name][0] is speculators.LOSSES[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """speculators 0.9.0's map: its names and signatures, no code."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("speculators' own loss was called")

    def hybrid(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
        raise AssertionError("speculators' own loss was called")

    host: Any = ModuleType("speculators.losses.utils")
    names = ("kl_div", "rkl", "jsd", "ce", "tv", "nla")
    one = {**dict.fromkeys(names, loss), "lk_hybrid": hybrid}
    host._LOSS_FN_MAPS = {"fused": one, "eager": dict(one)}
    for name in ("speculators", "speculators.losses"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, host.__name__, host)
    return host


def test_registration(stand_in: Any) -> None:
    for _ in range(2):  # again has no effect
        speculators.register()
    assert stand_in._LOSS_FN_MAPS == {"fused": speculators.LOSSES, "eager": speculators.LOSSES}


@pytest.mark.parametrize("change", ["name", "signature", "map"])
def test_another_version_is_refused(stand_in: Any, change: str) -> None:
    maps = stand_in._LOSS_FN_MAPS
    if change == "name":
        maps["eager"]["alpha"] = maps["eager"].pop("nla")
    if change == "signature":
        maps["eager"]["tv"] = lambda logits, targets, temperature: logits
    if change == "map":
        del stand_in._LOSS_FN_MAPS
    before = {kind: dict(losses) for kind, losses in maps.items()}
    with pytest.raises(ImportError, match="expected"):
        speculators.register()
    assert maps == before
