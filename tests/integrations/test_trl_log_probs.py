"""The stand-in for TRL's log-probabilities, beside TRL's own. No network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl.trainer.utils as seam
from byte_llama import V, batch, build
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction as Theirs
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

from fusedkd.integrations.trl import ChunkedLogProbFunction
from fusedkd.integrations.trl import log_probs as ours

N, H, SIZE = 13, 16, 301


def test_the_outputs_are_trls() -> None:
    assert ours.OPTIONAL_OUTPUTS == OPTIONAL_OUTPUTS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (4.0, 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_all_five_outputs(
    bias: bool, softcap: float | None, scale: float, temperature: float
) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = [(N, H), (SIZE, H), (SIZE,)][: 2 + bias]
    leaves = [torch.randn(s, generator=g) for s in shapes]
    targets = torch.randint(SIZE, (N,), generator=g)
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias else 0)
    targets[::2] = logits.argmax(-1)[::2]  # some are the favourite
    found = []
    for function in (ChunkedLogProbFunction, Theirs):
        own = [x.clone().requires_grad_() for x in leaves]
        three = [*own, None][:3]
        out = function.apply(*three, targets, temperature, 64, softcap, scale, OPTIONAL_OUTPUTS)
        up = torch.linspace(0, 1, N)
        total = (out[0] * up).sum() + (out[1] * up.flip(0)).sum()
        found.append(([x.detach() for x in out], torch.autograd.grad(total, own)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5)
    assert found[0][0][4].any() and not found[0][0][4].all()
    assert not any(x.requires_grad for x in out[2:])


def test_what_is_not_asked_for() -> None:
    out = ChunkedLogProbFunction.apply(
        torch.randn(N, H), torch.randn(SIZE, H), None, torch.arange(N), 1.0, 64, None, 1.0, ()
    )
    assert out[0] is not None and out[1:] == (None,) * 4


def test_in_the_models_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where GRPOTrainer and the others take it from."""
    results: list[Any] = []
    for function in (Theirs, ChunkedLogProbFunction):
        monkeypatch.setattr(seam, "_ChunkedLogProbFunction", function)
        model = build(1)
        seam.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
        inputs: dict[str, Tensor] = {k: x for k, x in batch().items() if k != "labels"}
        ids = inputs["input_ids"]
        assert int(ids.max()) < V
        labels = ids.clone()
        labels[:, :2] = -100
        out = model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            labels=labels,
            fused_lm_head=True,
        )
        (out.loss + 0.1 * out.entropy.sum()).backward()
        grads = [x.grad for x in model.parameters() if x.grad is not None]
        results.append(([out.loss.detach(), out.log_probs.detach()], grads))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
