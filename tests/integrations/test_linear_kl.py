"""Liger's head against given probabilities: against its formula in fp64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from liger_kernel import transformers as theirs
from torch.nn import functional as F

from fusedkd.integrations import liger as ours

TOLERANCE = {
    torch.float32: {"rtol": 2e-4, "atol": 2e-6},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [None, -100, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_linear_kl_div(
    dtype: torch.dtype, reduction: str, ignore_index: int | None, temperature: float
) -> None:
    make = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=make).to(dtype).requires_grad_() for n in (41, 123))
    labels = torch.randint(0, 123, (41,), generator=make)
    target = torch.rand(41, 123, generator=make).softmax(-1)
    target[:, 3] = 0
    target /= target.sum(-1, keepdim=True)
    counts = torch.ones(41, dtype=torch.bool)
    if ignore_index is not None:
        labels[:7] = ignore_index
        counts = labels != ignore_index
    options: dict[str, Any] = {"reduction": reduction, "temperature": temperature}
    options |= {} if ignore_index is None else {"ignore_index": ignore_index}
    y = None if ignore_index is None else labels
    got = ours.liger_fused_linear_kl_div(x, w, target, shift_labels=y, **options)
    assert torch.equal(got, ours.LigerFusedLinearKLDivLoss(**options)(x, w, target, y))
    derived = type("Mine", (ours.LigerFusedLinearKLDivFunction,), {})
    applied = derived.apply(x, w, target, y, reduction, ignore_index or -100, temperature)
    assert torch.equal(got, applied)
    logits = x.double() @ w.double().T / temperature
    entries = F.kl_div(logits.log_softmax(-1), target.double(), reduction="none")[counts]
    want = entries.sum() / {"batchmean": len(entries), "mean": entries.numel(), "sum": 1}[reduction]
    results = [(v, torch.autograd.grad(1.7 * v, (x, w))) for v in (got, want, applied)]
    torch.testing.assert_close(*results[:2], check_dtype=False, **TOLERANCE[dtype])
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_nothing_counts() -> None:
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    target = torch.full((5, 7), 1 / 7)
    loss = ours.LigerFusedLinearKLDivLoss()(x, w, target, torch.full((5,), -100))
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()


def test_errors() -> None:
    tensors = [torch.ones(2, 2) for _ in range(3)]
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'none'"):
        ours.LigerFusedLinearKLDivLoss("none")(*tensors)
    with pytest.raises(AssertionError, match="temperature cannot be 0"):
        ours.liger_fused_linear_kl_div(*tensors, temperature=0.0)


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signature(method: str) -> None:
    found = []
    for module in (ours, theirs):
        signature = inspect.signature(getattr(module.LigerFusedLinearKLDivLoss, method))
        found.append([(p.name, p.default, p.kind) for p in signature.parameters.values()])
    assert found[0] == found[1]
