"""What tests across two tokenizers share: tiny models of both, their data, a trainer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from tokenizer_kinds import byte_level, sentencepiece, texts
from torch import Tensor

from fusedkd.train import DistillationArguments, DistillationTrainer


@cache
def small() -> Any:
    return byte_level(300)


@cache
def other() -> Any:
    return sentencepiece(500)


def llama(vocabulary: int, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        initializer_range=0.3, **more,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def rows(tokenizer: Any, count: int = 4, characters: int = 60) -> Dataset:
    cut = [text[200 : 200 + characters + 7 * n] for n, text in enumerate(texts()[:count])]
    ids = [tokenizer(text)["input_ids"] for text in cut]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer(
    folder: Path, student: Any, teacher: Any, ours: Any, theirs: Any, data: Any, **args: Any
) -> DistillationTrainer:
    ours.pad_token = ours.pad_token or ours.eos_token
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01, "max_steps": 2,
        "save_strategy": "no",
    }  # fmt: skip
    return DistillationTrainer(
        student,
        teacher,
        DistillationArguments(**settings | args),
        train_dataset=data,
        eval_dataset=data,
        processing_class=ours,
        teacher_processing_class=theirs,
        data_collator=tf.DataCollatorForSeq2Seq(ours),
    )


def loss_and_gradients(made: DistillationTrainer) -> tuple[Tensor, list[Tensor]]:
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    loss = made.compute_loss(made.model, made._prepare_inputs(batch))
    parameters = list(made.model.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
    ]
