"""Conversations, chat templates, and a tokenizer of bytes and their special tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = [
    *(
        "<pad>",
        "<eos>",
        "<unk>",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
    ),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"),
]
TEMPLATES = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# A thought that is dropped, and a system's message that moves, as soon as another turn follows.
MOVING = (
    "{% for m in messages %}{% if m.role == 'user' %}Q{% if loop.revindex <= 2 %}!{% endif %}"
    "{{ m.content }}{% else %}A{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


def tokenizer(template: str | None, **more: Any) -> PreTrainedTokenizerFast:
    """One that reads bytes, and knows the special tokens of every template here."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        extra_special_tokens=SPECIAL[4:],
        **{**named, **more},
    )


def llama(seed: int) -> LlamaForCausalLM:
    """A tiny random one, for this tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer(None)), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ONE = [user("hi"), assistant("hello\nyou")]
TWO = [user("Größe?"), assistant(" ja 🙂 "), user("more"), assistant("no")]
SYSTEM = [{"role": "system", "content": "be brief"}, *ONE]
DANGLING = [*ONE, user("and?")]
