"""Distillation with models that DeepSpeed's ZeRO-3 has in parts. Run by test_zero.py."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import byte_llama as tiny
import processes
import pytest
import torch
import transformers as tf
import workers_trainers as trainers
from torch import nn

from fusedkd.models.heads import is_partitioned, plain_head
from fusedkd.train import DistillationArguments, DistillationTrainer

ZERO = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # all in parts
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def engine(model: nn.Module, **keywords: Any) -> Any:
    import deepspeed

    half = next(model.parameters()).dtype == torch.bfloat16
    config = {**ZERO, "bf16": {"enabled": half}}
    return deepspeed.initialize(model=model, config=config, **keywords)[0]


def gradients(rank: int, teacher_too: bool, dtype: torch.dtype) -> Any:
    """Loss and gradients of a step with each process's share of the rows, and of one device."""
    from deepspeed.utils import safe_get_full_grad

    student, teacher = tiny.build(1).to(dtype), tiny.build(2).to(dtype)
    head, teacher_head = plain_head(student), plain_head(teacher)
    want = trainers.distil(student, teacher, head, teacher_head, slice(None))
    student.zero_grad()
    wrapped = engine(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
    if teacher_too:
        engine(teacher.requires_grad_(False))
    share = trainers.ROWS // torch.distributed.get_world_size()
    rows = slice(rank * share, rank * share + share)
    loss, _ = trainers.distil(student, teacher, head, teacher_head, rows, wrapped)
    torch.distributed.all_reduce(loss)
    with pytest.raises(RuntimeError, match="in parts"):
        head.of(torch.zeros(1, 16))  # outside of the forward
    by_name = {name: safe_get_full_grad(x).to(dtype) for name, x in student.named_parameters()}
    return (loss / torch.distributed.get_world_size(), by_name), want


def losses(rank: int, folder: str, zero: bool) -> list[float]:
    """Of three steps of the trainer. With ZeRO-3 ``from_pretrained`` itself leaves each process its
    part of the weights. Under DeepSpeed accelerate does not divide the data among CPUs: every
    process sees the rows that one alone would see."""
    os.environ["ACCELERATE_USE_CPU"] = "false"
    options: dict[str, Any] = {"use_cpu": False, "deepspeed": ZERO if zero else None}
    options |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    options |= {"max_steps": 3, "max_grad_norm": 0.0, "remove_unused_columns": False}
    args = tiny.config(
        DistillationArguments, tempfile.mkdtemp(), divergence="jsd", ce_weight=0.3, **options
    )
    student, teacher = (
        tf.LlamaForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("student", "teacher")
    )
    assert is_partitioned(student.lm_head.weight) == zero == is_partitioned(teacher.lm_head.weight)
    rows = [{n: x.tolist() for n, x in row.items()} for row in trainers.data((9, 2, 5, 1))]
    trainer = DistillationTrainer(
        student, teacher, args, train_dataset=tiny.Dataset.from_list(rows),
        data_collator=trainers.collate,
    )  # fmt: skip
    trainer.train()
    assert trainer._student_head.found is not None and trainer._teacher_side.head is not None
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    processes.main({"gradients": gradients, "losses": losses})
