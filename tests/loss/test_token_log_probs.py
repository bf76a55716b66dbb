"""Log-probabilities of tokens and entropies are those of fp64, and so are their gradients."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from budget import check_within
from token_truth import DTYPES, TokenCase, log_probs, random_case
from torch import Tensor

from fusedkd import LMHead, backends, token_log_probs
from fusedkd.kernels import Part, cpu, reference
from fusedkd.kernels.tokens import Factors, TokenCall, merged
from fusedkd.spec import IDENTITY, Transform

INF, NAN = math.inf, math.nan
FEW = os.environ.get("FUSEDKD_TEST_BACKEND") == "triton"  # which is interpreted
SEEDS = int(os.environ.get("FUSEDKD_TEST_SEEDS", "20" if FEW else "300"))
BATCH = 20


def on(case: TokenCase, device: torch.device) -> TokenCase:
    leaves = {
        n: x.detach().to(device).requires_grad_(x.requires_grad) for n, x in case.leaves.items()
    }
    return TokenCase(leaves, case.tokens.to(device), case.scale, case.softcap, case.keywords)


def check(case: TokenCase, backend: str) -> None:
    """Beside eager torch at fp32, three times whose error is allowed, and a few roundings."""
    wide = case.dtype == torch.float64
    got = token_log_probs(case.side(), case.tokens, entropy=True, backend=backend, **case.keywords)
    assert got.entropy is not None
    assert got.log_probs.dtype == (torch.float64 if wide else torch.float32)
    assert got.log_probs.shape == case.tokens.shape
    g = torch.Generator().manual_seed(1)
    ups = [torch.randn(x.shape, generator=g).to(x) for x in got]

    def answer(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        lp, h, named = log_probs(case, dtype)
        total = (lp * ups[0].to(dtype)).sum() + (h * ups[1].to(dtype)).sum()
        names = [*case.wanted, *named.keys() & {"raw"}]
        grads = torch.autograd.grad(total, [named[n] for n in names])
        return [lp.detach(), h.detach()], dict(zip(names, grads, strict=True))

    truth, exact = answer(torch.float64)
    eager, theirs = answer(torch.float32)
    # fp64 is judged by its own rounding, the others by what eager fp32 loses
    unit = 2.0**-44 if wide else 2.0**-22
    lost = unit / 2.0**-22
    for name, x, t, e in zip(("log_probs", "entropy"), got, truth, eager, strict=True):
        size = t.abs().amax() if t.numel() else 0.0
        budget = 3 * lost * (e.double() - t).abs().amax() + unit * (1 + size) if t.numel() else 0.0
        check_within(name, x, t, torch.as_tensor(budget), case)
    heat = case.keywords["temperature"]
    ups_size = max((x.abs().amax().item() for x in ups if x.numel()), default=0.0) / heat
    grads = torch.autograd.grad(got, [case.leaves[n] for n in case.wanted], ups)
    for name, grad in zip(case.wanted, grads, strict=True):
        assert grad.dtype == case.dtype and grad.shape == exact[name].shape
        if not grad.numel():
            continue
        error = (theirs[name].double() - exact[name]).abs().amax()
        size = exact[name].abs()
        rounding = torch.finfo(case.dtype).eps * size
        if name != "logits":  # a head's chunk of the gradient is rounded before it is multiplied
            rounding = rounding + torch.finfo(case.dtype).eps * _spread(case, name, exact["raw"])
        tiny = torch.finfo(case.dtype).tiny * torch.finfo(case.dtype).eps
        budget = 3 * lost * error + rounding + unit * (size.amax() + ups_size) + tiny
        check_within(f"gradient of {name}", grad, exact[name], budget, case)


def _spread(case: TokenCase, name: str, raw: Tensor) -> Tensor:
    """How much the gradient called ``name`` changes with relative changes of the logits'."""
    raw = raw.abs()
    if name == "hidden":
        return raw @ case.leaves["weight"].detach().double().abs()
    rows = raw.reshape(-1, raw.shape[-1])
    if name == "bias":
        return rows.sum(0)
    hidden = case.leaves["hidden"].detach().double().abs()
    return rows.T @ hidden.reshape(len(rows), -1)


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_random_calls(first: int, backend: str, device: torch.device) -> None:
    for seed in range(first, first + BATCH):
        check(on(random_case(seed), device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "head"])
def test_what_does_not_count_is_not_read(
    dtype: torch.dtype, form: str, backend: str, device: torch.device
) -> None:
    n, v, h = 6, 130, 8
    tokens = torch.randint(v, (n,), device=device)
    tokens[[1, 4]] = -100

    def call(bad: float) -> list[Tensor]:
        torch.manual_seed(3)
        x = torch.randn(n, v if form == "dense" else h).to(dtype)
        x[[1, 4]] = bad
        x = x.to(device).requires_grad_()
        w = torch.randn(v, h).to(dtype).to(device).requires_grad_()
        side = x if form == "dense" else LMHead(x, w)
        out = token_log_probs(side, tokens, entropy=True, backend=backend)
        up = torch.ones(n, device=device).masked_fill(tokens < 0, bad).to(out.log_probs.dtype)
        leaves = [x] if form == "dense" else [x, w]
        grads = torch.autograd.grad(out, leaves, [up, up])
        assert (grads[0][[1, 4]] == 0).all()
        return [*out, *grads]

    for clean, dirty in zip(call(0.5), call(NAN), strict=True):
        assert torch.equal(clean, dirty)


def test_a_nan_is_never_hidden(backend: str, device: torch.device) -> None:
    x = torch.randn(3, 200, device=device)
    x[1, 77] = NAN
    x.requires_grad_()
    out = token_log_probs(x, torch.tensor([3, 4, 5], device=device), entropy=True, backend=backend)
    (grad,) = torch.autograd.grad(out.log_probs.sum(), x)
    for y in (*out, grad[:, 5]):
        assert y.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_logits(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """-inf has no probability and no gradient; the others' are finite."""
    x = torch.randn(3, 3000).to(dtype).to(device)
    x[0, 10:900] = x[1, 7] = -INF
    x[2, 1:] = -INF
    x.requires_grad_()
    out = token_log_probs(x, torch.tensor([5, 7, 0], device=device), entropy=True, backend=backend)
    want = x.detach().double().log_softmax(-1)
    assert out.log_probs[0].item() == pytest.approx(want[0, 5].item(), abs=1e-5)
    assert out.log_probs[1] == -INF and -1e-7 <= out.log_probs[2] <= 0
    assert out.entropy is not None and 0 <= out.entropy[2] < 1e-7
    (grad,) = torch.autograd.grad(out.log_probs[[0, 2]].sum() + out.entropy.sum(), x)
    assert grad.isfinite().all()
    assert (grad[x == -INF] == 0).all()
    assert (grad[2].abs() < 1e-7).all()


@pytest.mark.parametrize("size", [150.0, 1e4, 1e30])
def test_wide_gaps(size: float, backend: str, device: torch.device) -> None:
    x = torch.zeros(2, 500, device=device)
    x[0, 3], x[1] = size, -size
    x.requires_grad_()
    tokens = torch.tensor([3, 3], device=device)
    for temperature in (0.01, 1.0, 1000.0):
        out = token_log_probs(x, tokens, temperature=temperature, entropy=True, backend=backend)
        assert out.entropy is not None
        want = (x.detach().double() / temperature).log_softmax(-1)[:, 3]
        torch.testing.assert_close(out.log_probs.double(), want, rtol=1e-6, atol=1e-5)
        assert out.entropy[1].item() == pytest.approx(math.log(500), rel=1e-6)
        (grad,) = torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), x)
        assert grad.isfinite().all()


PRODUCTS = {  # forward and backward together
    "nothing": ({}, {"entropy": True}, 1),
    "frozen": ({"hidden"}, {}, 2),
    "frozen, entropy": ({"hidden"}, {"entropy": True}, 3),
    "trained": ({"hidden", "weight"}, {"entropy": True}, 4),
}


@pytest.mark.parametrize("case", [*PRODUCTS, "several"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many there are, and that rows that do not count are in none."""
    several = case == "several"
    wanted, keywords, expected = ({"hidden"}, {}, 3) if several else PRODUCTS[case]
    n, v, h = 12, 70, 8
    hidden = torch.randn(n, h).to(dtype).requires_grad_("hidden" in wanted)
    weight = torch.randn(v, h).to(dtype).requires_grad_("weight" in wanted)
    tokens = torch.randint(v, (n, 4) if several else (n,))
    tokens[::3] = -100
    done = 0

    def multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        nonlocal done
        done += a.shape[0] * a.shape[1] * b.shape[1]
        reference.mm_(out, a, b, accumulate)

    monkeypatch.setattr(cpu, "mm_", multiply)
    out = token_log_probs(
        LMHead(hidden, weight), tokens, backend="cpu", chunk_bytes=2000, **keywords
    )
    if wanted:
        sum(x.sum() for x in out if x is not None).backward()  # type: ignore[union-attr]
    assert done == expected * 8 * v * h


def test_two_calls_are_the_same_bits(backend: str, device: torch.device) -> None:
    """With gradients or without: what one made is what another's ratio is taken of."""
    hidden, weight = torch.randn(40, 32, device=device), torch.randn(500, 32, device=device)
    tokens = torch.randint(500, (40,), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        for head in (LMHead(h, w), LMHead(h, w.detach()), LMHead(h.detach(), w.detach())):
            with torch.no_grad():
                old = token_log_probs(head, tokens, backend=backend).log_probs
            for entropy in (False, True):
                new = token_log_probs(head, tokens, entropy=entropy, backend=backend)
                assert torch.equal(old, new.log_probs)


@pytest.mark.parametrize("form", ["logits", "frozen", "trained"])
@pytest.mark.parametrize("several", [False, True])
def test_compiled(form: str, several: bool) -> None:
    torch._dynamo.reset()
    v, h = 90, 8
    tokens = torch.randint(v, (2, 3, 4) if several else (2, 3))
    tokens[0, 1] = -100

    def run(x: Tensor, w: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        side = x if form == "logits" else LMHead(x, w, softcap=4.0)
        out = token_log_probs(side, tokens, temperature=temperature, entropy=True)
        assert out.entropy is not None
        return out.log_probs, out.entropy

    x = torch.randn(2, 3, v if form == "logits" else h, requires_grad=True)
    w = torch.randn(v, h, requires_grad=form == "trained")
    leaves = [y for y in (x, w) if y.requires_grad]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 1.5):
        got, want = compiled(x, w, temperature), run(x, w, temperature)
        ups = [torch.randn_like(y) for y in want]
        grads = [torch.autograd.grad(y, leaves, ups) for y in (got, want)]
        for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, 50, requires_grad=True)
    lp = token_log_probs(x, torch.tensor([1, 2, 3])).log_probs
    (grad,) = torch.autograd.grad(lp.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [IDENTITY, Transform(0.5, 4.0)])
def test_rows_in_pieces(
    dtype: torch.dtype, how: Transform, backend: str, device: torch.device
) -> None:
    """Merged, they are the whole rows'; each piece's gradient is that of its columns."""
    module: Any = backends.load(backend)
    n, v = 5, 4219
    logits = (3 * torch.randn(1, n, v)).to(dtype).to(device)
    logits[0, 1, 100:300] = -INF
    tokens = torch.randint(v, (n, 3), device=device)
    tokens[2, 1], tokens[3, 0] = -1, tokens[3, 1]
    counts = torch.ones(n, dtype=torch.bool, device=device)
    counts[4] = False
    call = TokenCall(logits, tokens, counts, 1.5, how, Part(0, v), True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    of_tokens = torch.randn(n, 3, dtype=torch.float64, device=device).masked_fill(tokens < 0, 0.0)
    factors = Factors(of_tokens, torch.randn(n, dtype=torch.float64, device=device))
    want = torch.empty_like(logits, dtype=wide)
    whole = module.token_statistics(call)
    module.token_gradient(call, whole, factors, want)
    for sizes in ((2048, v - 2048), (0, 1, v - 1), (700, 0, 1500, 17, 1983, 19)):
        calls, start = [], 0
        for size in sizes:
            columns = torch.cat([logits[..., start : start + size], logits[..., :1] * NAN], -1)
            calls.append(call._replace(logits=columns, part=Part(start, size)))
            start += size
        known = merged([module.token_statistics(c) for c in calls])
        torch.testing.assert_close(known, whole, rtol=1e-6, atol=1e-6, equal_nan=True)
        grads = [torch.full_like(c.logits, NAN, dtype=wide) for c in calls]
        for c, grad in zip(calls, grads, strict=True):
            module.token_gradient(c, known, factors, grad)
            assert (grad[..., c.part.columns :] == 0).all()
        got = torch.cat([g[..., :size] for g, size in zip(grads, sizes, strict=True)], -1)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


V = 9
MISTAKES: dict[str, tuple[Any, ...]] = {
    "side": (ValueError, r"logits.*shape \(\)", {"logits": torch.tensor(1.0)}),
    "type": (TypeError, "logits is a list: expected logits", {"logits": [1]}),
    "tokens": (TypeError, "tokens is torch.float32.*tokens.long", {"tokens": torch.ones(2)}),
    "shape": (ValueError, r"tokens has shape \(3,\): expected \(2,\) or \(2, K\)",
              {"tokens": torch.ones(3, dtype=torch.int64)}),
    "range": (ValueError, "tokens holds 9: expected 0 to 8.*ignore_index=-100",
              {"tokens": torch.tensor([1, 9])}),
    "negative": (ValueError, "tokens holds -1: expected 0 to 8",
                 {"tokens": torch.tensor([1, -1])}),
    "temperature": (ValueError, "temperature=0", {"temperature": 0}),
    "heat": (ValueError, "temperature=5000", {"temperature": 5000.0}),
    "entropy": (TypeError, "entropy=1", {"entropy": 1}),
    "vocabulary": (ValueError, "vocab_size=12: expected 1 to 9", {"vocab_size": 12}),
    "chunk": (ValueError, "chunk_bytes=0", {"chunk_bytes": 0}),
    "backend": (ValueError, "backend='gpu'", {"backend": "gpu"}),
    "group": (TypeError, "group is a int", {"group": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    error, message, changed = MISTAKES[case]
    arguments = {"logits": torch.randn(2, V), "tokens": torch.tensor([1, 2]), **changed}
    with pytest.raises(error, match=message):
        token_log_probs(**arguments)


def test_padding_among_several() -> None:
    x = torch.randn(2, V)
    out = token_log_probs(x, torch.tensor([[1, -1, -100], [8, 8, 2]], dtype=torch.int32))
    want = x.log_softmax(-1)
    assert out.entropy is None
    assert out.log_probs[0, 1:].tolist() == [0, 0]
    torch.testing.assert_close(out.log_probs[1], want[1, [8, 8, 2]])
    assert token_log_probs(x, torch.empty(2, 0, dtype=torch.int64)).log_probs.shape == (2, 0)
    empty = token_log_probs(torch.randn(0, V), torch.empty(0, dtype=torch.int64), entropy=True)
    assert empty.log_probs.shape == (0,)
