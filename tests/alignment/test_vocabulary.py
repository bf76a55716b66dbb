"""Tokens that two tokenizers share."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tokenizer_kinds import KINDS, byte_level, kind
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedkd.alignment import shared_vocabulary


def pairs(student: Any, teacher: Any) -> set[tuple[str, str]]:
    ours, theirs = shared_vocabulary(student, teacher)
    assert ours.dtype == theirs.dtype == torch.int64 and ours.shape == theirs.shape
    assert len(set(ours.tolist())) == len(ours) == len(set(theirs.tolist()))
    assert ours.tolist() == sorted(ours.tolist())
    names = (
        x.convert_ids_to_tokens(ids.tolist()) for x, ids in ((student, ours), (teacher, theirs))
    )
    return set(zip(*names, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_with_itself_it_is_the_vocabulary(name: str) -> None:
    ours, theirs = shared_vocabulary(kind(name), kind(name))
    assert ours.tolist() == theirs.tolist() == list(range(len(kind(name))))


def bpe(tokens: list[str], fallback: bool = False, **special: str) -> Any:
    """A tokenizer with these tokens in this order."""
    model = models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=fallback)
    inner = Tokenizer(model)
    sentencepiece = fallback or any("▁" in token for token in tokens)
    inner.pre_tokenizer = (
        pre_tokenizers.Metaspace()
        if sentencepiece
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def test_a_permuted_vocabulary() -> None:
    tokens = ["a", "b", "Ġa", "ab", "Ċ", "Ã", "</s>"]
    moved = random.Random(0).sample(tokens, len(tokens))
    student, teacher = (bpe(x, eos_token="</s>") for x in (tokens, moved))
    ours, theirs = shared_vocabulary(student, teacher)
    assert ours.tolist() == list(range(7))
    assert theirs.tolist() == [moved.index(token) for token in tokens]


def test_the_same_bytes_are_spelled_in_several_ways() -> None:
    student = bpe(["Ġthe", "the", "Ã", "©", "Ċ", "é", "x"])
    teacher = bpe(["▁the", "the", "<0xC3>", "<0xA9>", "<0x0A>", "<0x78>", "x", "é"], fallback=True)
    assert pairs(student, teacher) == {
        ("Ġthe", "▁the"),
        ("the", "the"),
        ("Ã", "<0xC3>"),
        ("©", "<0xA9>"),
        ("Ċ", "<0x0A>"),
        ("x", "x"),  # and not <0x78>
        # "é" is the byte E9 of the student's, and two bytes of the teacher's
    }


def test_special_tokens_go_by_role() -> None:
    student = bpe(["a", "<|endoftext|>", "<|im|>", "<pad>", "Ġ"],
                  eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<pad>",
                  additional_special_tokens=["<|im|>"])  # fmt: skip
    teacher = bpe(["a", "<s>", "</s>", "<|endoftext|>", "<|im|>", "[PAD]"],
                  bos_token="<s>", eos_token="</s>", pad_token="[PAD]",
                  additional_special_tokens=["<|im|>"])  # fmt: skip
    assert pairs(student, teacher) == {
        ("a", "a"),
        ("<|endoftext|>", "</s>"),  # EOS with EOS, and not with its name, an ordinary token there
        ("<pad>", "[PAD]"),
        ("<|im|>", "<|im|>"),
    }


def test_words_do_not_say_which_spaces_they_cover() -> None:
    found = pairs(kind("wordpiece"), byte_level(600))
    assert found and all(ours.startswith("##") for ours, _ in found if not ours.startswith("["))
    assert ("##er", "er") in found


def test_real_tokenizers_share_most_of_the_smaller() -> None:
    found = pairs(byte_level(600), byte_level(400))
    assert len(found) == 400 and all(a == b for a, b in found)
    assert len(pairs(kind("byte_level"), kind("sentencepiece"))) > 350


def test_another_kind_is_an_error() -> None:
    with pytest.raises(TypeError, match="expected a fast tokenizer"):
        shared_vocabulary(kind("byte_level"), object())
