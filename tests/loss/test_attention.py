"""Losses on attention scores, in chunks: plain torch in fp64 on all scores at once is the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd import attention, backends
from fusedkd.features import AttentionStates, attention_kl, attention_score_mse, relation_kl

B, H, L, D = 3, 4, 7, 6
LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": lambda *a, **k: attention_score_mse(*a, **k, center=False),
    "centered": attention_score_mse,
    "kl": attention_kl,
    "relation": lambda *a, **k: relation_kl(*a, **k, heads=3, relations="qkv"),
}
# Several sequences at a time; several heads; some of a head's rows; one row.
CHUNKS = [64 << 20, 3 * H * L * L * 16 // 2, 2 * L * L * 16, 3 * L * 16, 1]


@pytest.fixture
def chunk_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setitem(attention.CHUNK_BYTES, "cpu", size)


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test is parametrised by it: the losses go by the device and have no argument."""
    if "backend" in request.fixturenames:
        module = backends.load(request.getfixturevalue("backend"))
        monkeypatch.setattr(backends, "_for_device", lambda _: module)


def side(kind: str, student: bool, dtype: torch.dtype = torch.float64) -> AttentionStates:
    """Of a kind of mask; the student's may differ from the teacher's in all but B, H, L."""
    d, kv = (D, 2) if student and kind == "grouped" else (D + 3 * (not student), H)
    states = [torch.randn(B, heads, L, d, dtype=dtype) for heads in (H, kv, kv)]
    query, key, value = (x.requires_grad_(student) for x in states)
    more: dict[str, Any] = {"scaling": 0.3 if student else None}
    if kind == "causal":
        more["causal"] = True
    elif kind == "mixed":  # each hides what the other sees
        more |= {"causal": student, "mask": None if student else torch.rand(1, H, L, L) < 0.8}
    elif kind == "padding":  # as transformers makes it: wider than there are keys
        seen = torch.arange(L + 2) < torch.tensor([L, 3, 5])[:, None]
        more["mask"] = seen[:, None, None].expand(B, 1, L, L + 2)
    elif kind == "bias":  # learnt, of each head, the same for all sequences; some hidden
        bias = torch.randn(1, H, L, L, dtype=dtype)
        bias[..., 2, :3], bias[..., 4] = torch.finfo(dtype).min, -torch.inf
        more["mask"] = bias.requires_grad_(student)
    elif kind == "row":  # of each sequence, the same for all queries
        more["mask"] = torch.randn(B, 1, 1, L, dtype=dtype).requires_grad_(student)
    return AttentionStates(query, key, value, **more)


KINDS = ["none", "causal", "mixed", "padding", "bias", "row", "grouped"]


def truth(name: str, s: AttentionStates, t: AttentionStates, tokens: Tensor | None) -> Tensor:
    """All scores at once, differentiated by autograd."""
    real = torch.ones(B, L, dtype=torch.bool) if tokens is None else tokens
    seen = torch.ones(B, H, L, L, dtype=torch.bool)
    for states in (s, t):
        if states.mask is None:
            seen = seen & (seen.tril() if states.causal else True)
        elif states.mask.dtype == torch.bool:
            seen = seen & states.mask[..., :L]
        else:
            seen = seen & (states.mask > torch.finfo(states.mask.dtype).min / 2)
    if name == "relation":
        total: Any = 0
        for part in ("query", "key", "value"):
            split = [
                full(getattr(x, part)).transpose(1, 2).reshape(B, L, 3, -1).transpose(1, 2)
                for x in (s, t)
            ]
            scores = [x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5 for x in split]
            total = total + mean(kl(*scores, seen[:, :1]), real)
        return total
    scores = [all_scores(x).where(seen, 0.0) for x in (s, t)]
    if name == "kl":
        return mean(kl(*scores, seen), real)
    gap, count = scores[0] - scores[1], seen.sum(-1).clamp(min=1)
    if name == "centered":
        gap = (gap - (gap.sum(-1) / count)[..., None]).where(seen, 0.0)
    return mean(gap.square().sum(-1) / count, real)


def full(x: Tensor) -> Tensor:
    return x.double().repeat_interleave(H // x.shape[1], 1)


def all_scores(x: AttentionStates) -> Tensor:
    factor = x.query.shape[-1] ** -0.5 if x.scaling is None else x.scaling
    scores = full(x.query) @ full(x.key).transpose(-1, -2) * factor
    if x.mask is None or x.mask.dtype == torch.bool:
        return scores
    return scores + x.mask.double()


def kl(s: Tensor, t: Tensor, seen: Tensor) -> Tensor:
    lq, lp = (x.masked_fill(~seen, -1e30).log_softmax(-1) for x in (s, t.detach()))
    return (lp.exp() * (lp - lq)).where(seen, 0.0).sum(-1)


def mean(rows: Tensor, real: Tensor) -> Tensor:
    return rows.mean(1).where(real, 0.0).sum() / real.sum().clamp(min=1)


def inputs(states: AttentionStates) -> list[Tensor]:
    found = (states.query, states.key, states.value, states.mask)
    return [x for x in found if x is not None and x.requires_grad]


def compared(loss: Tensor, states: AttentionStates, upstream: float = 1.7) -> list[Tensor]:
    """The loss, and the gradients of whatever has one."""
    grads = torch.autograd.grad(upstream * loss, inputs(states), allow_unused=True)
    zeros = (
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs(states), strict=True)
    )
    return [loss.detach(), *zeros]


def some_tokens() -> Tensor:
    return torch.arange(L) < torch.tensor([L, 3, 5])[:, None]


# ---- the truth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_are_all_scores_at_once(
    name: str, kind: str, chunk: int, chunk_bytes: Callable[[int], None]
) -> None:
    chunk_bytes(chunk)
    s, t = side(kind, True), side(kind, False)
    tokens = some_tokens() if kind == "padding" else None
    found = compared(LOSSES[name](s, t, tokens), s)
    for ours, theirs in zip(found, compared(truth(name, s, t, tokens), s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["padding", "bias"])
@pytest.mark.parametrize("name", ["centered", "kl", "relation"])
def test_every_backend(
    name: str, kind: str, backend: str, chunk_bytes: Callable[[int], None]
) -> None:
    chunk_bytes(CHUNKS[2])
    s, t = side(kind, True), side(kind, False)
    found = compared(LOSSES[name](s, t, some_tokens()), s)
    for ours, theirs in zip(found, compared(truth(name, s, t, some_tokens()), s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_states_are_rounded_nowhere_on_the_way(name: str, dtype: torch.dtype, backend: str) -> None:
    """Gradients once, to their own dtype."""
    s, t = side("causal", True, dtype), side("causal", False, dtype)
    found = compared(LOSSES[name](s, t), s)
    exact = compared(truth(name, s, t, None), s)
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in inputs(s))]
    for ours, theirs in zip(found, exact, strict=True):
        error, most = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
        assert error <= most * max(torch.finfo(ours.dtype).eps, 2e-6)


def test_fp16_keeps_what_a_loss_scale_would() -> None:
    s, t = side("none", True, torch.float16), side("none", False, torch.float16)
    many = torch.tensor(1e6)  # tokens of all micro-batches
    (grad,) = torch.autograd.grad(attention_kl(s, t, normalizer=many) * 65536, s.query)
    exact = (truth("kl", s, t, None) * (B * L * 65536 / 1e6),)
    (theirs,) = torch.autograd.grad(exact[0], s.query)
    torch.testing.assert_close(grad, theirs, rtol=2e-3, atol=1e-6)


# ---- what has no say -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_padding_that_is_no_number_has_no_effect(
    name: str, backend: str, chunk_bytes: Callable[[int], None]
) -> None:
    chunk_bytes(CHUNKS[3])
    s, t, tokens = side("padding", True), side("padding", False), some_tokens()
    clean = compared(LOSSES[name](s, t, tokens), s)
    gone = ~tokens[:, None, :, None]
    sides = []
    for states in (s, t):
        parts = (
            x.detach().masked_fill(gone, torch.nan)
            for x in (states.query, states.key, states.value)
        )
        query, key, value = (x.requires_grad_(states is s) for x in parts)
        sides.append(replace(states, query=query, key=key, value=value))
    found = compared(LOSSES[name](*sides, tokens), sides[0])
    for ours, theirs in zip(found, clean, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_where_none_is_wanted(name: str) -> None:
    s, t = side("bias", True), side("bias", False)
    with torch.no_grad():
        assert not LOSSES[name](s, t).requires_grad
    teacher = side("bias", True)  # requires grad
    compared(LOSSES[name](s, teacher), s)
    LOSSES[name](s, teacher).backward()
    assert not any(x.grad is not None for x in inputs(teacher))
    frozen = replace(s, query=s.query.detach())
    (grad,) = torch.autograd.grad(LOSSES[name](frozen, t), s.key)
    torch.testing.assert_close(grad, torch.autograd.grad(truth(name, frozen, t, None), s.key)[0])


# ---- autograd ------------------------------------------------------------------------------------


def test_a_second_backward_gives_the_same_and_a_second_derivative_is_refused() -> None:
    for loss in LOSSES.values():
        s, t = side("causal", True), side("causal", False)
        value = loss(s, t)
        grads = [torch.autograd.grad(value, s.query, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads) and torch.equal(value, loss(s, t))
        (grad,) = torch.autograd.grad(value, s.query, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(grad.square().sum(), s.query)


def test_autocast_changes_nothing() -> None:
    for loss in LOSSES.values():
        s, t = side("none", True, torch.float32), side("none", False, torch.float32)
        plain = compared(loss(s, t), s)
        with torch.autocast("cpu", torch.bfloat16):
            found = compared(loss(s, t), s)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_graphs_and_transforms(name: str) -> None:
    s, t = side("bias", True), side("bias", False)

    def loss(query: Tensor) -> Tensor:
        return LOSSES[name](replace(s, query=query), t)

    (expected,) = torch.autograd.grad(loss(s.query), s.query)
    assert torch.equal(torch.func.grad(loss)(s.query.detach()), expected)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(s.query), s.query)
    assert torch.equal(grad, expected)
