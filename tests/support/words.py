"""Tiny random models of the real library whose vocabulary is sixty words, and their tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
V = len(SPECIAL) + len(WORDS)
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
NAMES = {0: "no", 1: "yes"}


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", unk_token="[UNK]", eos_token="[SEP]",
    )  # fmt: skip


def bert() -> Any:
    return tf.BertForMaskedLM(tf.BertConfig(**SIZES))


def albert() -> Any:
    return tf.AlbertForMaskedLM(tf.AlbertConfig(**SIZES, embedding_size=8))


def classifier() -> Any:
    return tf.BertForSequenceClassification(
        tf.BertConfig(**SIZES, id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    )


def llama() -> Any:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    )


def gpt2() -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=V, n_embd=24, n_layer=4, n_head=2, n_positions=64, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def rows(n: int, length: int = 20) -> list[dict[str, list[int]]]:
    generator = np.random.default_rng(1)
    ids = generator.zipf(1.3, size=(n, length)).clip(max=len(WORDS)) + len(SPECIAL) - 1
    return [{"input_ids": row.tolist()} for row in ids]
