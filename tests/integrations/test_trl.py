"""The TRL drop-ins against TRL itself, on tiny random models. No network."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from byte_llama import (
    TRAINERS,
    L,
    V,
    batch,
    build,
    config,
    gold_trainer,
    tokenizer,
)
from datasets import Dataset
from torch import Tensor
from trl.experimental import gkd, gold
from trl.trainer import distillation_trainer

from fusedkd.integrations import trl as ours
from fusedkd.kernels import cpu

BETAS = [0.0, 0.3, 1.0]


# ---- the functions -------------------------------------------------------------------------------


def logits(seed: int, count: int = 1) -> Any:
    made = torch.randn(count, 3, 5, V, generator=torch.Generator().manual_seed(seed)) * 2
    return made[0] if count == 1 else made


def compare(mine: Any, other: Any, inputs: list[Tensor]) -> None:
    results = []
    for function in (mine, other):
        copies = [x.clone().requires_grad_() for x in inputs]
        value = function(*copies)
        results.append((value, torch.autograd.grad((value * 1.7).sum(), copies)))
    torch.testing.assert_close(*results, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("trainer", [gkd.GKDTrainer, gold.GOLDTrainer])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
def test_generalized_jsd(
    trainer: Any, beta: float, temperature: float, reduction: str, labelled: bool, items: Any
) -> None:
    student, teacher = logits(0), logits(1)
    labels = torch.randint(0, V, (3, 5))
    labels[0, :3] = labels[2] = -100
    options: dict[str, Any] = {"labels": labels if labelled else None, "beta": beta}
    options |= {"temperature": temperature, "reduction": reduction, "num_items_in_batch": items}
    functions = (ours.generalized_jsd_loss, trainer.generalized_jsd_loss)
    compare(*(lambda s, f=f: f(s, teacher, **options) for f in functions), [student])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_generalized_jsd_of_probabilities(beta: float, reduction: str) -> None:
    student, teacher = logits(0).softmax(-1)[0], logits(1).softmax(-1)[0]
    options: dict[str, Any] = {"beta": beta, "reduction": reduction, "logits_are_probs": True}
    functions = (ours.generalized_jsd_loss, gold.GOLDTrainer.generalized_jsd_loss)
    compare(*(lambda s, f=f: f(s, teacher, **options) for f in functions), [student])


def test_generalized_jsd_where_trl_was_wrong() -> None:
    student, teacher = logits(0).bfloat16().requires_grad_(), logits(0).bfloat16()
    assert abs(ours.generalized_jsd_loss(student, teacher)) < 1e-6
    masked = logits(0).masked_fill(torch.arange(V) > 200, -math.inf).requires_grad_()
    loss = ours.generalized_jsd_loss(masked, masked.detach().roll(1, 0))
    assert loss.isfinite() and torch.autograd.grad(loss, masked)[0].isfinite().all()
    labels = torch.full((3, 5), -100)
    loss = ours.generalized_jsd_loss(masked, masked.detach(), labels)
    assert loss == 0 and (torch.autograd.grad(loss, masked)[0] == 0).all()
    with pytest.raises(ValueError, match="vocab_size"):
        ours.generalized_jsd_loss(masked, torch.cat([masked.detach()] * 2, -1))
    halves = (logits(2), logits(3))
    there, back = (ours.generalized_jsd_loss(*pair) for pair in (halves, halves[::-1]))
    assert there == back  # to the bit, which TRL's own tests want


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("items", [None, 11])
@pytest.mark.parametrize("extras", [False, True])
def test_chunked_divergence(
    beta: float, temperature: float, items: int | None, extras: bool
) -> None:
    make = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 8), (V, 8), (V,), (3, 5, 12), (V, 12), (V,)]
    s, w, b, t, u, c = (torch.randn(shape, generator=make) for shape in shapes)
    mask = (torch.rand(3, 5, generator=make) > 0.4).long()
    rest: dict[str, Any] = {"num_items_in_batch": items, "temperature": temperature}
    if extras:
        rest |= {"teacher_lm_head_bias": c, "student_logit_scale": 0.5, "teacher_logit_scale": 2.0}
        rest |= {"student_final_logit_softcapping": 5.0, "teacher_final_logit_softcapping": 3.0}
    found = []
    for function in (ours.chunked_divergence_loss, distillation_trainer._chunked_divergence_loss):
        student = [x.clone().requires_grad_() for x in ((s, w, b) if extras else (s, w))]
        named = rest | ({"student_lm_head_bias": student[2]} if extras else {})
        loss, entropy, count = function(student[0], t, student[1], u, mask, beta, **named)
        found.append((loss, entropy.detach(), count, torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_chunked_divergence_refuses_a_quantised_head() -> None:
    s, w, mask = torch.ones(1, 2, 8), torch.ones(V, 8), torch.ones(1, 2)
    with pytest.raises(TypeError, match="quantised"):
        ours.chunked_divergence_loss(s, s, w, w.to(torch.int8), mask, 0.5)


@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_divergence_keeps_a_bias_in_fp32(autocast: bool) -> None:
    make = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 64), (3, 5, 64), (V, 64), (V, 64), (V,), (V,)]
    s, t, w, u, b, c = (torch.randn(shape, generator=make) for shape in shapes)
    low = [x.to(torch.bfloat16) for x in (s, t, w / 8, u / 8)]
    mask = torch.ones(3, 5)
    found = []
    for tensors in (low, [x.float() for x in low]):
        half = autocast and tensors is low
        hidden = [x.float() for x in tensors] if half else tensors
        bias = b.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, entropy, _ = ours.chunked_divergence_loss(
                *(*hidden, mask, 0.5), student_lm_head_bias=bias, teacher_lm_head_bias=c
            )
        found.append((loss, entropy, torch.autograd.grad(loss, bias)[0]))
    (*values, got), (*expected, right) = found
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    # the gradient of the logits is rounded to bf16 where the processor multiplies bf16
    rounded = cpu.head_dtypes(torch.bfloat16)[1] == torch.bfloat16
    error = 2**-9 * right.abs().max().item() if rounded else 1e-6
    torch.testing.assert_close(got, right, rtol=1e-5, atol=error)


@pytest.mark.parametrize(
    "mine, other",
    [
        (ours.generalized_jsd_loss, gold.GOLDTrainer.generalized_jsd_loss),
        (ours.chunked_divergence_loss, distillation_trainer._chunked_divergence_loss),
    ],
)
def test_signatures(mine: Any, other: Any) -> None:
    parameters = [inspect.signature(f).parameters.values() for f in (mine, other)]
    names = [[(p.name, p.default, p.kind) for p in found] for found in parameters]
    assert names[0] == names[1]


# ---- the trainers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("items", [None, torch.tensor(17)])
def test_loss_is_trls(kind: str, beta: float, items: Any, tmp_path: Path) -> None:
    make, module = TRAINERS[kind]
    student, teacher = build(1), build(2)
    found = []
    for host in (ours, module):
        trainer = make(host, tmp_path, student, teacher, beta=beta)
        trainer.model.eval()
        loss = trainer.compute_loss(trainer.model, batch(), num_items_in_batch=items)
        found.append((loss, torch.autograd.grad(loss, list(trainer.model.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_logits(kind: str, tmp_path: Path) -> None:
    student, teacher = build(1), build(2)
    trainer = TRAINERS[kind][0](ours, tmp_path, student, teacher)
    rows = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda m, a, out: rows.append(out.numel()))
    trainer.compute_loss(trainer.model.eval(), batch())
    assert rows == [0, 0]
    rows.clear()
    _, outputs = trainer.compute_loss(trainer.model, batch(), return_outputs=True)
    assert outputs.logits.shape == (4, L, V)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_trains_and_evaluates(kind: str, lmbda: float, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = TRAINERS[kind][0](ours, tmp_path, build(1), build(2), lmbda=lmbda, **options)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    logs = trainer.state.log_history
    assert all(math.isfinite(log["loss"]) for log in logs if "loss" in log)
    assert any(math.isfinite(log.get("eval_loss", math.nan)) for log in logs)
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_gold_counts_a_steps_tokens_once(tmp_path: Path) -> None:
    """The Trainer counts every repetition of GOLD's generation batch."""
    losses = []
    for steps, size in ((1, 4), (2, 2)):
        options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": size}
        trainer = gold_trainer(
            *(ours, tmp_path, build(1), build(2)), lmbda=0.0, max_steps=1, seed=3, **options
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_distillation_trainer(beta: float, tmp_path: Path) -> None:
    prompts = Dataset.from_list([{"prompt": "prompts"[i % 4 :]} for i in range(8)])
    found = []
    for host in (ours, trl):
        args = config(
            *(trl.DistillationConfig, tmp_path), max_completion_length=5, beta=beta, max_steps=1
        )
        trainer = host.DistillationTrainer(
            build(1), build(2), args, train_dataset=prompts, processing_class=tokenizer()
        )
        trainer.train()
        log = trainer.state.log_history[0]
        found.append([log[name] for name in ("loss", "grad_norm", "entropy")])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
