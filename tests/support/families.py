"""Tiny random models of many families of the real library, and batches and a trainer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from fusedkd.train import DistillationArguments, DistillationTrainer

V = 67
DECODER = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2}


def build(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    D, E = {**DECODER, **changes}, {**ENCODER, **changes}
    gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    distil = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    makers = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**D)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=D["vocab_size"], **gpt2)),
        "gemma2": lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**D, head_dim=8, final_logit_softcapping=0.5)
        ),
        "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**D, logits_scaling=0.25)),
        "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**D, logit_scale=4.0)),
        "hyperclovax": lambda: tf.HyperCLOVAXForCausalLM(
            tf.HyperCLOVAXConfig(**D, logits_scaling=4.0)
        ),
        "falcon_h1": lambda: tf.FalconH1ForCausalLM(
            tf.FalconH1Config(
                **D, lm_head_multiplier=3.0, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8
            )
        ),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**E)),
        "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**E, embedding_size=8)),
        "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**E)),
        "modernbert": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**E, **SPECIAL)),
        "distilbert": lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(vocab_size=E["vocab_size"], **distil)
        ),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=D["vocab_size"], decoder_start_token_id=0, **t5)
        ),
    }
    model = makers[kind]()
    with torch.no_grad():  # away from the uniform distribution, where every loss looks alike
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


DECODERS = ["llama", "gpt2", "gemma2", "granite", "cohere", "hyperclovax", "falcon_h1"]
ENCODERS = ["bert", "albert", "roberta", "modernbert", "distilbert"]


def rows(n: int = 4, length: int = 12, seed: int = 3) -> list[dict[str, Tensor]]:
    """Blocks whose number of counted tokens differs from row to row."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for i in range(n):
        ids = torch.randint(3, V, (length,), generator=generator)
        labels = ids.clone()
        labels[: (5 * i) % (length - 2)] = -100
        blocks.append({"input_ids": ids, "labels": labels})
    return blocks


def batch(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def trainer(
    student: nn.Module, teacher: nn.Module, out: Path, data: Any = None, **arguments: Any
) -> DistillationTrainer:
    defaults = {
        "output_dir": str(out),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "backend": "reference",
        "temperature": 2.0,
        "kd_weight": 0.7,
        "ce_weight": 0.3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
    }
    keep = {k: arguments.pop(k) for k in ("processing_class", "callbacks") if k in arguments}
    data = rows() if data is None else data
    args = DistillationArguments(**{**defaults, **arguments})
    return DistillationTrainer(
        student, teacher, args, train_dataset=data, eval_dataset=data, **keep
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
