"""Two small random models and random text, so that the examples run anywhere in seconds. Put your
own here: ``AutoModelForCausalLM.from_pretrained(...)`` and a tokenized data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 512, 32


def model(hidden_size: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def models() -> tuple[Any, Any]:
    """A student, and a teacher that is larger and frozen."""
    return model(32, seed=1), model(64, seed=2).eval().requires_grad_(False)


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def batches(size: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    data = rows()
    for start in range(0, len(data), size):
        part = data[start : start + size]
        yield {name: torch.stack([row[name] for row in part]) for name in part[0]}
