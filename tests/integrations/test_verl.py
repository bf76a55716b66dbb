"""Losses under verl's names, against its formulas. verl is not in the environment: a stand-in has
the registry, the logits processor and the signatures of verl 0.9.1, and none of its code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd.integrations import verl

B, L, V, K = 2, 6, 50, 7


def _module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = []
    vars(made).update(content)
    return made


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    registry: dict[str, Any] = {}
    settings: dict[str, Any] = {}

    class Settings(SimpleNamespace):
        names: list[str]

    def register(given: Settings) -> Any:
        def decorator(function: Any) -> Any:
            for name in given.names:
                assert name not in registry
                registry[name], settings[name] = function, given
            return function

        return decorator

    losses = _module(
        "losses",
        DISTILLATION_LOSS_REGISTRY=registry,
        DistillationLossSettings=Settings,
        register_distillation_loss=register,
    )
    fsdp = _module("fsdp.losses", compute_forward_kl_topk=lambda *given: "verl's own")
    metric = _module(
        "metric",
        Metric=lambda kind, value: (kind, value),
        AggregationType=SimpleNamespace(MIN="min", MAX="max", MEAN="mean"),
    )
    ulysses = _module("ulysses", get_ulysses_sequence_parallel_world_size=lambda: 1)
    padding = _module("padding", no_padding_2_padding=lambda x, data: x)
    tree = {
        "verl": _module("verl"),
        "verl.trainer": _module("trainer"),
        "verl.trainer.distillation": _module("distillation", losses=losses),
        "verl.trainer.distillation.losses": losses,
        "verl.trainer.distillation.fsdp": _module("fsdp", losses=fsdp),
        "verl.trainer.distillation.fsdp.losses": fsdp,
        "verl.utils": _module("utils", ulysses=ulysses),
        "verl.utils.ulysses": ulysses,
        "verl.utils.metric": metric,
        "verl.workers": _module("workers"),
        "verl.workers.utils": _module("utils"),
        "verl.workers.utils.padding": padding,
    }
    for name, module in tree.items():
        monkeypatch.setitem(sys.modules, name, module)
    verl.register()
    verl.register()
    yield SimpleNamespace(registry=registry, settings=settings, fsdp=fsdp)


def config(name: str) -> SimpleNamespace:
    return SimpleNamespace(distillation_loss=SimpleNamespace(loss_mode=name, topk=K))


@pytest.mark.parametrize("name", ["fusedkd_k2", "fusedkd_k3"])
def test_estimators(name: str, host: SimpleNamespace) -> None:
    s = (torch.randn(B, L) - 4).requires_grad_()
    t = torch.randn(B, L) - 4
    mask = torch.rand(B, L) < 0.7
    mask[0, 0] = True
    data = {"teacher_logprobs": t[..., None], "response_mask": mask}
    rows, metrics = host.registry[name](None, config(name), {"log_probs": s}, data)
    # verl's kl_penalty: k2 is half the square, k3 exp(t - s) - (t - s) - 1 within its cuts
    want = 0.5 * (s - t).square() if name.endswith("k2") else (t - s).exp() - (t - s) - 1
    torch.testing.assert_close(rows, want)
    grads = [torch.autograd.grad(x.sum(), s)[0] for x in (rows, want)]
    torch.testing.assert_close(*grads)
    assert metrics["distillation/abs_loss"][1] == pytest.approx(want[mask].mean().item(), rel=1e-5)
    assert host.settings[name].use_estimator


@pytest.mark.parametrize("name", ["fusedkd_forward_kl_topk", "fusedkd_forward_kl_bucket"])
def test_entries(name: str, host: SimpleNamespace) -> None:
    logits = torch.randn(1, B * L, V, requires_grad=True)
    teacher = torch.randn(B * L, V).log_softmax(-1)
    lp, ids = teacher.topk(K)
    nested = [torch.nested.nested_tensor(list(x.split(L)), layout=torch.jagged) for x in (lp, ids)]
    out = host.fsdp.compute_forward_kl_topk(logits, *nested, config(name), "thd")
    assert host.fsdp.compute_forward_kl_topk(logits, *nested, config("x"), "thd") == "verl's own"
    log_q = logits.log_softmax(-1)[0]
    own = log_q.gather(1, ids)
    # verl's sum over the ids, which it clamps at 0; ours is that of two measures, or has a bucket
    verls = (lp.exp() * (lp - own)).sum(-1)
    q, p = own.exp().sum(-1), lp.exp().sum(-1)
    if name.endswith("topk"):
        want = verls - p + q
        assert (want > 0).all()
    else:
        want = verls + (1 - p) * ((1 - p).log() - (1 - q).log())
    torch.testing.assert_close(out["distillation_losses"][0], want, rtol=1e-4, atol=1e-5)
    grads = [
        torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
        for x in (out["distillation_losses"], want)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["student_mass"][0], q.detach())
    torch.testing.assert_close(out["teacher_mass"][0], p)
    best = log_q.topk(K).indices
    shared = (ids[:, :, None] == best[:, None]).any(-1)
    assert out["overlap_count"][0].tolist() == shared.sum(-1).tolist()
    gain = -(lp.exp() * (lp - own) * shared).sum(-1) / shared.sum(-1).clamp(min=1)
    torch.testing.assert_close(out["overlap_token_advantage"][0], gain.detach())
    assert all(x.shape == (1, B * L) for x in out.values())

    def padded(x: Tensor) -> Tensor:
        return x[0].view(B, L)

    data = {"response_mask": torch.ones(B, L)}
    rows, metrics = host.registry[name](
        None, config(name), {n: padded(x) for n, x in out.items()}, data
    )
    torch.testing.assert_close(rows, padded(out["distillation_losses"]))
    assert metrics["distillation/teacher_mass"] == pytest.approx(p.mean().item())
    assert metrics["distillation/overlap_ratio"] == pytest.approx(shared.float().mean().item())
    assert host.settings[name].use_topk


def test_megatron_would_run_another_loss(host: SimpleNamespace) -> None:
    loss = host.registry["fusedkd_forward_kl_topk"]
    with pytest.raises(NotImplementedError, match=r"strategy='megatron': expected fsdp.*_k2"):
        loss(SimpleNamespace(strategy="megatron"), config("fusedkd_forward_kl_topk"), {}, {})
