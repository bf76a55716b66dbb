"""Trainers with the mixin before them, and what their losses should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families as tiny
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd.integrations.transformers import DistillationMixin
from fusedkd.train import DistillationArguments, DistillationTrainer

V = tiny.V


KINDS = ["mixin", "trainer"]


class Mine(DistillationMixin, tf.Trainer):
    pass


class Seq2Seq(DistillationMixin, tf.Seq2SeqTrainer):
    pass


def trainer(
    kind: str,
    student: Any,
    teacher: nn.Module,
    out: Path,
    host: Any = Mine,
    loss: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """One step on four rows; ``loss`` are keywords of ``kd_loss``, the rest the Trainer's or its
    arguments'."""
    names = ("compute_loss_func", "compute_metrics", "model_init", "data_collator")
    keywords = {name: options.pop(name) for name in names if name in options}
    data = options.pop("data", tiny.rows())
    common = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1}
    options = {**common, **options}
    sets = {"train_dataset": data, "eval_dataset": data, **keywords}
    if kind == "trainer":
        args = DistillationArguments(str(out), **options, **(loss or {}))
        return DistillationTrainer(student, teacher, args, **sets)
    config = tf.Seq2SeqTrainingArguments if host is Seq2Seq else tf.TrainingArguments
    made = host(student, config(str(out), **options), **sets)
    made.distil_from(teacher, **(loss or {}))
    return made


def losses(trained: Any) -> list[float]:
    trained.train()
    return [log["loss"] for log in trained.state.log_history if "loss" in log]


def kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that have a label, aligned already."""
    lq, lp = (x.detach().double().log_softmax(-1)[labels != -100] for x in (student, teacher))
    return (lp.exp() * (lp - lq)).sum(-1).mean()


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    got, want = (torch.as_tensor(x).item() for x in (got, want))
    assert got == pytest.approx(want, rel=tolerance)
