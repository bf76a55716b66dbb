"""The most probable tokens, and the mass of all others, are those of a sort in fp64."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import pytest
import torch
from token_truth import DTYPES
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, TopK, backends, kd_loss, token_log_probs, top_k
from fusedkd.kernels import Part
from fusedkd.kernels.tokens import TokenCall, merged_top
from fusedkd.spec import IDENTITY

INF, NAN = math.inf, math.nan
FEW = os.environ.get("FUSEDKD_TEST_BACKEND") == "triton"  # which is interpreted
SEEDS = int(os.environ.get("FUSEDKD_TEST_SEEDS", "4" if FEW else "120"))
BATCH = 4 if FEW else 20
SIZES = (3, 17, 64, 1025) if FEW else (3, 17, 64, 1025, 5003, 9000)


def check(top: TopK, log_q: Tensor, k: int, also: Tensor | None, mask: Tensor | None) -> None:
    """Against log_q (N, V) in fp64."""
    v = log_q.shape[1]
    ids, lp = top.indices.view(len(log_q), -1), top.log_probs.view(len(log_q), -1).double()
    ordered = log_q.sort(dim=-1, descending=True, stable=True)
    want = ordered.indices[:, :k].masked_fill(ordered.values[:, :k] == -INF, -1)
    counts = torch.ones_like(ids[:, 0], dtype=torch.bool) if mask is None else mask.view(-1)
    assert torch.equal(ids[:, :k], want.masked_fill(~counts[:, None], -1))
    there = torch.zeros(len(ids), v + 1, dtype=torch.bool, device=ids.device)
    there.scatter_(1, torch.where(ids < 0, v, ids), True)
    assert (there[:, :v].sum(1) == (ids >= 0).sum(1)).all(), "an id twice"
    if also is not None:
        wanted = also.view(len(ids), -1).long()
        fine = there.gather(1, wanted.clamp(min=0)) | (wanted < 0) | ~counts[:, None]
        assert fine.all()
    exact = log_q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -INF)
    torch.testing.assert_close(lp, exact, rtol=2e-6, atol=2e-6)
    tail = log_q.masked_fill(there[:, :v], -INF).logsumexp(-1).masked_fill(~counts, 0.0)
    torch.testing.assert_close(top.tail_log_mass.view(-1).double(), tail, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_random_calls(first: int, backend: str, device: torch.device) -> None:
    for seed in range(first, first + BATCH):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        dtype, heat = rng.choice(DTYPES), rng.choice([1.0, 0.5, 3.0])
        leading, v = rng.choice([(6,), (2, 3)]), rng.choice(SIZES)
        k = rng.choice([1, 2, v, min(v, 7), min(v, 64)])
        size = v - (v > 3) * rng.choice([0, 0, 2])
        k = min(k, size)
        also = mask = None
        if rng.random() < 0.6:
            also = torch.randint(-1, size, (*leading, rng.choice([1, 4])), generator=g).to(device)
        if rng.random() < 0.3:
            mask = (torch.rand(leading, generator=g) < 0.7).to(device)
        if rng.random() < 0.5:
            logits = (rng.choice([0.3, 3.0]) * torch.randn(6, v, generator=g)).to(dtype)
            logits[1, : v // 2], logits[2] = -INF, logits[2].sort().values
            logits[3], logits[4] = 0, logits[4] + 300
            logits = logits.view(*leading, v).to(device)
            side: Tensor | LMHead = logits
            raw = logits.double()
        else:
            h = torch.randn(*leading, 16, generator=g).to(dtype).to(device)
            w = torch.randn(v, 16, generator=g).double().round(decimals=1).to(dtype).to(device)
            side, raw = LMHead(h, w, softcap=9.0), h.double() @ w.double().T
            raw = 9 * torch.tanh(raw / 9)
        top = top_k(
            side, k, temperature=heat, also=also, mask=mask, vocab_size=size,
            chunk_bytes=20 * v, backend=backend,
        )  # fmt: skip
        if isinstance(side, Tensor) or dtype == torch.float64:
            check(top, (raw.view(6, v)[:, :size] / heat).log_softmax(-1), k, also, mask)
        else:  # fp32 products put nearly equal logits in another order
            ids = top.indices.clamp(min=0)
            lp = token_log_probs(side, ids, temperature=heat, vocab_size=size, backend=backend)
            there = top.indices >= 0
            torch.testing.assert_close(top.log_probs[there], lp.log_probs[there])


def test_the_tail_is_no_difference(backend: str, device: torch.device) -> None:
    """A mass of 1e-12 is 1e-12, where 1 less the others' would be noise."""
    for tail in (1e-3, 1e-9, 1e-12):
        logits = torch.full((1, 4000), math.log(tail / 3998), dtype=torch.float64)
        logits[0, [7, 3000]] = math.log(0.5)
        top = top_k(logits.float().to(device), 2, backend=backend)
        assert top.indices.tolist() == [[7, 3000]]
        assert top.tail_log_mass.item() == pytest.approx(
            math.log(tail) - math.log1p(tail), rel=1e-5
        )


def test_a_nan_is_never_hidden(backend: str, device: torch.device) -> None:
    x = torch.randn(3, 60, device=device)
    x[1, 4], x[2] = NAN, NAN
    top = top_k(x, 5, backend=backend)
    assert not top.log_probs[0].isnan().any()
    assert top.log_probs[1:].isnan().all() and top.tail_log_mass[1:].isnan().all()
    assert (top.indices >= 0).all()
    loss = kd_loss(torch.randn(3, 60, device=device), SparseTeacher(top.indices, top.log_probs))
    assert loss.isnan()


def test_what_is_not_wanted_is_not_read(backend: str, device: torch.device) -> None:
    h, w = torch.randn(4, 8, device=device), torch.randn(50, 8, device=device)
    h[2] = NAN
    mask = torch.tensor([True, True, False, True], device=device)
    top = top_k(LMHead(h, w), 3, mask=mask, backend=backend)
    assert (top.indices[2] == -1).all() and top.tail_log_mass[2] == 0
    assert not top.log_probs.isnan().any() and not top.log_probs.requires_grad


def test_a_teacher_of_its_own(backend: str, device: torch.device) -> None:
    """All of the vocabulary is the dense teacher."""
    s, t = torch.randn(5, 30, device=device), torch.randn(5, 30, device=device)
    top = top_k(t, 30, backend=backend)
    got = kd_loss(s, SparseTeacher(top.indices, top.log_probs), backend=backend)
    torch.testing.assert_close(got, kd_loss(s, t, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES[::2] if FEW else DTYPES)
def test_rows_in_pieces(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    module: Any = backends.load(backend)
    n, v, k = 5, 1290 if FEW else 4219, 40  # more equal ones than a threshold has room for
    logits = (3 * torch.randn(1, n, v)).to(dtype).to(device)
    logits[0, 1, 100 : v - 19], logits[0, 2] = -INF, 1.0
    also = torch.randint(v, (n, 2), device=device)
    also[3, 0] = -1
    counts = torch.ones(n, dtype=torch.bool, device=device)
    call = TokenCall(logits, also, counts, 1.5, IDENTITY, Part(0, v), False)
    whole = module.top(call, k)
    cuts = ((v // 2, v - v // 2), (0, 1, v - 1), (700, 0, 500, 17, v - 1236, 19))
    for sizes in cuts[: 1 if FEW else 3]:
        pieces, start = [], 0
        for size in sizes:
            columns = torch.cat([logits[..., start : start + size], logits[..., :1] * NAN], -1)
            part = Part(start, size)
            pieces.append(module.top(call._replace(logits=columns, part=part), k))
            start += size
        got = merged_top(pieces, also)
        assert torch.equal(got.ids, whole.ids)
        torch.testing.assert_close(got.values, whole.values)
        torch.testing.assert_close(got.statistics, whole.statistics, rtol=1e-6, atol=1e-7)


MISTAKES: dict[str, tuple[Any, ...]] = {
    "k": (ValueError, "k=0", {"k": 0}),
    "large k": (ValueError, "k=10: expected 1 to 9", {"k": 10}),
    "kind of k": (TypeError, "k=1.0", {"k": 1.0}),
    "also": (ValueError, r"also has shape \(2,\): expected \(2, 'A'\)", {"also": torch.ones(2)}),
    "mask": (ValueError, "mask is torch.float32", {"mask": torch.ones(2)}),
    "side": (TypeError, "logits is a str", {"logits": "a"}),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    error, message, changed = MISTAKES[case]
    with pytest.raises(error, match=message):
        top_k(**{"logits": torch.randn(2, 9), "k": 3, **changed})
