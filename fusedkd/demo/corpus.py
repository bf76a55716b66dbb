"""The demo's text: the Python standard library's sources, and a tokenizer trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusedkd.data.stdlib import stdlib_texts
from fusedkd.data.text import pack

END = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Three sets of blocks without a file in common, and the tokenizer, which never saw the last.

    ``bytes_per_token`` is that of the held-out files: it turns nats per token into bits per byte.
    """

    teacher: Dataset
    transfer: Dataset
    held_out: Dataset
    tokenizer: PreTrainedTokenizerFast
    bytes_per_token: float


@dataclass(frozen=True)
class Sizes:
    """Of a corpus: in bytes, tokens, and blocks of ``block`` tokens."""

    teacher_bytes: int = 6_000_000
    transfer_tokens: int = 150_000
    held_out_blocks: int = 192
    vocabulary: int = 2048
    block: int = 128


def corpus(size: Sizes) -> Corpus:
    """Split the standard library by file, in an order that only the files' names decide."""
    block, held_out_blocks = size.block, size.held_out_blocks
    texts = stdlib_texts()
    # 8 bytes per token are more than any tokenizer reaches here, so every set fills its blocks
    held_out = _take(texts, 8 * held_out_blocks * block)
    transfer = _take(texts, 8 * size.transfer_tokens)
    teacher = _take(texts, size.teacher_bytes)
    if not teacher:
        raise ValueError("the standard library of this Python has too few sources for the demo.")
    tokenizer = _tokenizer(teacher[: max(1, len(teacher) // 2)] + transfer, size.vocabulary)
    test = _packed(held_out, tokenizer, block)
    tokens = sum(len(ids) for ids in tokenizer(held_out)["input_ids"]) + len(held_out)
    every = max(1, len(test) // held_out_blocks)  # from all held-out files, not the first few
    return Corpus(
        teacher=_packed(teacher, tokenizer, block),
        transfer=_packed(transfer, tokenizer, block).select(range(size.transfer_tokens // block)),
        held_out=test.select(range(0, every * held_out_blocks, every)),
        tokenizer=tokenizer,
        bytes_per_token=sum(len(text.encode()) for text in held_out) / tokens,
    )


def _take(texts: list[str], size: int) -> list[str]:
    """Remove documents from the front until they are ``size`` characters, and return them."""
    taken, length = [], 0
    while texts and length < size:
        taken.append(texts.pop(0))
        length += len(taken[-1])
    return taken


def _tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END)


def _packed(texts: list[str], tokenizer: Any, block: int) -> Dataset:
    return pack(Dataset.from_dict({"text": texts}), tokenizer, block)
