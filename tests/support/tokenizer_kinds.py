"""Small real tokenizers of every kind, trained on the standard library's sources."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from fusedkd.data.stdlib import stdlib_texts

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = pre_tokenizers.ByteLevel.alphabet()


@cache
def texts() -> list[str]:
    return [text[:8000] for text in stdlib_texts()[:30]]


def byte_level(
    size: int = 600, prefix: bool = False, digits: bool = False, nfc: bool = False, **special: str
) -> Any:
    """As GPT-2's; with ``digits`` each of them alone, as Llama's; with ``nfc`` as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    apart = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, split]) if digits else split
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _trained(
        tokenizer, trainers.BpeTrainer, size, special or {"eos_token": "<|endoftext|>"},
        initial_alphabet=LETTERS,
    )  # fmt: skip


def sentencepiece(size: int = 600, unigram: bool = False, legacy: bool = False) -> Any:
    """With bytes for what the vocabulary lacks; ``legacy``: as Llama 2's, by normalizers."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if unigram:
        inner = Tokenizer(models.Unigram())
    else:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(steps)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    back = decoders.Replace("▁", " ") if legacy else decoders.Metaspace()
    inner.decoder = decoders.Sequence([back, decoders.ByteFallback(), decoders.Fuse()])
    if not unigram:
        made = _trained(inner, trainers.BpeTrainer, size, special, more=BYTES)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=size, unk_token="<unk>", show_progress=False,
            special_tokens=list(special.values()),
        )  # fmt: skip
        inner.train_from_iterator(texts()[:8], trainer)
        import json

        about = json.loads(inner.to_str())
        about["model"]["vocab"] += [[token, -20.0] for token in BYTES]
        about["model"]["byte_fallback"] = True
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(about)), **special
        )
    _begin_with(made, "<s>")
    return made


def wordpiece(size: int = 600) -> Any:
    """As BERT's, lower case, accents dropped."""
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    made = _trained(tokenizer, trainers.WordPieceTrainer, size, special)
    inner = made.backend_tokenizer
    ends = [(token, inner.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.BertProcessing(ends[1], ends[0])
    return made


def _trained(
    tokenizer: Any, trainer: Any, size: int, special: dict[str, str], more: Any = (), **kwargs: Any
) -> Any:
    names = [*special.values(), *more]
    about = trainer(vocab_size=size, special_tokens=names, show_progress=False, **kwargs)
    tokenizer.train_from_iterator(texts(), about)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _begin_with(tokenizer: Any, token: str) -> None:
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, inner.token_to_id(token))]
    )


KINDS = {
    "byte_level": byte_level,
    "byte_level_prefix": lambda: byte_level(prefix=True),
    "byte_level_digits": lambda: byte_level(400, digits=True, bos_token="<bos>", eos_token="<eos>"),
    "byte_level_nfc": lambda: byte_level(800, nfc=True),
    "sentencepiece": sentencepiece,
    "sentencepiece_legacy": lambda: sentencepiece(700, legacy=True),
    "unigram": lambda: sentencepiece(500, unigram=True),
    "wordpiece": wordpiece,
}


@cache
def kind(name: str) -> Any:
    return KINDS[name]()
