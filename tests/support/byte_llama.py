"""A tiny random Llama that reads bytes, with what TRL's trainers need beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from trl.experimental import gkd, gold

V, L = 259, 14


def tokenizer() -> tf.PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=template,
    )


def build(seed: int, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = tf.LlamaConfig(vocab_size=V, **shape, **heads, **special, **changes)
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(rows: int = 4, seed: int = 3) -> dict[str, Tensor]:
    """Rows with different numbers of tokens that count."""
    ids = torch.randint(3, V, (rows, L), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 4 + 2 * row] = -100
    mask = torch.ones_like(ids)
    prompts = {"prompts": ids[:, :4], "prompt_attention_mask": mask[:, :4]}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **prompts}


def config(kind: Any, out: Path, **arguments: Any) -> Any:
    common = {
        "output_dir": str(out),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "gradient_checkpointing": False,
    }
    return kind(**{**common, **arguments})


def conversations(n: int = 8) -> Dataset:
    turns = [
        [
            {"role": "user", "content": "ask"[: 1 + i % 3]},
            {"role": "assistant", "content": "answers"[i % 5 :]},
        ]
        for i in range(n)
    ]
    return Dataset.from_list([{"messages": t} for t in turns])


def gkd_trainer(module: Any, out: Path, student: nn.Module, teacher: Any, **options: Any) -> Any:
    args = config(gkd.GKDConfig, out, max_new_tokens=4, max_length=32, **options)
    data = conversations()
    return module.GKDTrainer(
        student,
        teacher,
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )


def gold_trainer(module: Any, out: Path, student: nn.Module, teacher: Any, **options: Any) -> Any:
    args = config(gold.GOLDConfig, out, max_completion_length=4, max_length=32, **options)
    data = conversations()
    return module.GOLDTrainer(
        student,
        teacher,
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )


TRAINERS = {"gkd": (gkd_trainer, gkd), "gold": (gold_trainer, gold)}
