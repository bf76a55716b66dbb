"""Two tokenizers are one if the same text becomes the same ids."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fusedkd.errors import UserError
from fusedkd.models.tokenizers import check_same

NAMES = {"student": "./student", "teacher": "./teacher"}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS = [("t", "h"), ("th", "e"), ("h", "e"), ("1", "2")]


def bpe(merges: Any = PAIRS, more: tuple[str, ...] = (), swap: bool = False, **steps: Any) -> Any:
    tokens = ["<end>", *BYTES, "th", "the", "he", "12", *more]
    if swap:
        tokens[-1], tokens[-2] = tokens[-2], tokens[-1]
    inner = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    for name, step in steps.items():
        setattr(inner, name, step)
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def test_the_same_are_the_same() -> None:
    check_same(bpe(), bpe(), NAMES)
    check_same(bpe(), bpe(normalizer=normalizers.Sequence([])), NAMES)  # written otherwise


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True),
     pre_tokenizers.ByteLevel(add_prefix_space=False)]
)  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (bpe(swap=True), bpe(), "'12' is 259 for the student and 260 for the teacher"),
        (bpe(merges=PAIRS[:2] + PAIRS[:1:-1]), bpe(), "their merges are not"),
        (bpe(merges=PAIRS[:3]), bpe(), "their merges are not"),
        (bpe(normalizer=normalizers.Lowercase()), bpe(), "their normalizer not"),
        (bpe(pre_tokenizer=DIGITS), bpe(), "their pre_tokenizer not"),
        (bpe(more=("<pad>",)), bpe(), "--tokenizer ./teacher"),
        (bpe(), bpe(more=("<pad>",)), "--tokenizer ./student"),  # a prefix is not the same
        (bpe(more=("xx", "<pad>")), bpe(more=("yy",)), "the other way round"),
    ],
)
def test_what_differs_is_named_with_what_helps(student: Any, teacher: Any, said: str) -> None:
    with pytest.raises(UserError, match="the tokenizers differ") as caught:
        check_same(student, teacher, NAMES)
    assert said in str(caught.value), caught.value
