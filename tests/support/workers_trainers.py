"""One optimizer step of each trainer, however it is cut up. Run by test_normalisation.py."""

from __future__ import annotations

import tempfile
from typing import Any

import byte_llama as tiny
import processes
import torch
import transformers as tf
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fusedkd import kd_loss
from fusedkd.integrations import trl as drop_in
from fusedkd.integrations.transformers import DistillationMixin
from fusedkd.models.heads import loss_in_forward, plain_head, tap
from fusedkd.train import DistillationArguments, DistillationTrainer
from fusedkd.train.on_policy import OnPolicy

ROWS, LENGTH = 4, 12
# of each row, how many tokens count: uneven, and so that some process has none
COUNTS = {"uneven": (9, 2, 5, 1), "one row": (0, 6, 0, 0), "none": (0, 0, 0, 0)}
CUTS = {1: ((4, 1), (2, 2)), 2: ((2, 1), (1, 2))}  # batch size, accumulation


def data(counts: tuple[int, ...]) -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(5)
    rows = []
    for count in counts:
        ids = torch.randint(3, tiny.V, (LENGTH,), generator=make)
        labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - count, -100)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def collate(rows: list[Any]) -> dict[str, Tensor]:
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    return batch


def with_prompts(rows: list[Any]) -> dict[str, Tensor]:
    """As TRL wants them."""
    batch = collate(rows)
    prompts = {"prompts": batch["input_ids"][:, :2]}
    return batch | prompts | {"prompt_attention_mask": batch["attention_mask"][:, :2]}


class Gradients(tf.TrainerCallback):
    """Keeps the first step's."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.by_name[name.removeprefix("module.")] = parameter.grad.clone()


class Mixed(DistillationMixin, tf.Trainer):
    pass


def one_step(kind: str, counts: tuple[int, ...], batch: int, accumulation: int) -> Any:
    """The logged loss and the gradient of one step over all rows."""
    gradients = Gradients()
    options: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "ddp_backend": "gloo",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    rows = tiny.Dataset.from_list(
        [{name: x.tolist() for name, x in row.items()} for row in data(counts)]
    )
    shared = {"train_dataset": rows, "data_collator": collate, "callbacks": [gradients]}
    out = tempfile.mkdtemp()
    student, teacher = tiny.build(1), tiny.build(2)
    if kind == "fusedkd":
        args = tiny.config(DistillationArguments, out, divergence="jsd", ce_weight=0.3, **options)
        trainer: Any = DistillationTrainer(student, teacher, args, **shared)
    elif kind == "sampled":
        OnPolicy.__call__ = lambda self, model, batch, seed: batch  # as if the student had written
        args = tiny.config(
            DistillationArguments, out, objective="sampled", on_policy_share=1.0, **options
        )
        trainer = DistillationTrainer(student, teacher, args, **shared)
    elif kind == "mixin":
        trainer = Mixed(student, tiny.config(tf.TrainingArguments, out, **options), **shared)
        trainer.distil_from(teacher, divergence="jsd", ce_weight=0.3)
    else:
        config = {"gkd": tiny.gkd.GKDConfig, "gold": tiny.gold.GOLDConfig}[kind]
        host = {"gkd": drop_in.GKDTrainer, "gold": drop_in.GOLDTrainer}[kind]
        options |= {"max_completion_length": 4} if kind == "gold" else {"max_new_tokens": 4}
        args = tiny.config(config, out, lmbda=0.0, max_length=LENGTH, **options)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        shared["data_collator"] = with_prompts
        trainer = host(student, teacher, args, processing_class=tiny.tokenizer(), **shared)
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.by_name


def steps(rank: int) -> Any:
    world = torch.distributed.get_world_size()
    return {
        (kind, name, cut): one_step(kind, counts, *cut)
        for kind in ("fusedkd", "sampled", "mixin", "gkd", "gold")
        for name, counts in COUNTS.items()
        for cut in CUTS[world]
    }


def distil(
    student: nn.Module,
    teacher: nn.Module,
    head: Any,
    teacher_head: Any,
    share: slice,
    engine: Any = None,
) -> Any:
    """Loss and gradients for a share of the rows, divided by what one process's share is.
    ``engine``: DeepSpeed's, around the student."""
    rows = collate(data(COUNTS["uneven"]))
    mine = {name: x[share] for name, x in rows.items()}
    labels = nn.functional.pad(mine.pop("labels"), (0, 1), value=-100)[..., 1:]
    hidden: list[Tensor] = []
    with torch.no_grad(), tap(teacher_head, hidden.append):
        teacher(**mine)
    answer = teacher_head.of(hidden[0])
    total = sum(COUNTS["uneven"]) * len(labels) / ROWS

    def compute(student_head: Any) -> Any:
        return kd_loss(student_head, answer, labels, divergence="jsd", normalizer=total), None

    loss = loss_in_forward(engine or student, student, head, mine, compute)[0]
    (engine.backward if engine else Tensor.backward)(loss)
    return loss.detach(), {name: x.grad for name, x in student.named_parameters()}


def sharded(rank: int, layers: bool) -> Any:
    """The same through FSDP2, of both models, and as it is on one device."""
    student, teacher = tiny.build(1), tiny.build(2)
    head, teacher_head = plain_head(student), plain_head(teacher)
    world = torch.distributed.get_world_size()
    want = distil(student, teacher, head, teacher_head, slice(None))
    student.zero_grad()
    if layers:
        for part in (*student.model.layers, student.lm_head):
            fully_shard(part)
    fully_shard(student)
    fully_shard(teacher)  # its weights are gathered for its forward, and its head once
    share = ROWS // world
    loss, gradients = distil(
        student, teacher, head, teacher_head, slice(rank * share, rank * share + share)
    )
    torch.distributed.all_reduce(loss)
    return (loss / world, {name: x.full_tensor() for name, x in gradients.items()}), want


def everything(rank: int) -> Any:
    return {"steps": steps(rank), "sharded": [sharded(rank, layers) for layers in (False, True)]}


if __name__ == "__main__":
    processes.main({"steps": steps, "everything": everything})
