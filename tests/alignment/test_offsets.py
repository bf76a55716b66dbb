"""Bytes of tokens, of every kind of tokenizer, and which tokens of two cover the same."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizer_kinds import KINDS, byte_level, kind, texts
from tokenizers import Tokenizer, models, pre_tokenizers

from fusedkd.alignment import align, byte_offsets, pad_spans

SAMPLES = {
    "plain": "The quick brown fox 12345 isn't it? x=3.14",
    "spaces": "  two  spaces\tand\n\n    lines \n ",
    "emoji": "🙂👩‍👩‍👧 a🙂",
    "cjk": "你好，世界 こんにちは안녕 x",
    "marks": "e\u0301o\u0308\u0308 \u0301 naïve Å",
    "lower lines": "▁ a ▁▁b",
    "specials": "<s>hi</s> there<|endoftext|> x[CLS]<unk>",
    "code": texts()[3][:3000],
    "one": "a",
    "space": " ",
    "empty": "",
}
EXACT = [name for name in KINDS if name != "wordpiece"]


def ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return found


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_byte_has_its_token(name: str, sample: str, special: bool) -> None:
    tokenizer, text = kind(name), SAMPLES[sample]
    offsets = byte_offsets(tokenizer, text, ids(tokenizer, text, special))
    assert offsets.dtype == torch.int64 and offsets.shape[1:] == (2,)
    reached = 0
    for start, end in offsets.tolist():
        assert start <= end and start <= reached <= max(reached, end)
        reached = max(reached, end)
    dropped = len(text.encode()) - len(text.rstrip().encode()) if name == "wordpiece" else 0
    assert reached == len(text.encode()) - (dropped if reached else len(text.encode()))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sample", ["plain", "spaces", "emoji", "cjk", "code"])
def test_tokens_decode_to_their_bytes(name: str, sample: str) -> None:
    """Judged by the tokenizer's own decoder, of the first n tokens, where these are characters."""
    tokenizer, text = kind(name), SAMPLES[sample][:400]
    numbers = ids(tokenizer, text, special=False)
    offsets = byte_offsets(tokenizer, text, numbers).tolist()
    data = text.encode()
    for n in range(0, len(numbers), 3):
        decoded = tokenizer.backend_tokenizer.decode(numbers[:n], skip_special_tokens=False)
        if "�" in decoded:
            continue
        ours = data[: offsets[n - 1][1] if n else 0].decode()
        assert decoded.lstrip() == ours.lstrip()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("byte_level", "é🙂", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),
        ("sentencepiece", "🙂", [(0, 0), (0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]),
        ("unigram", "🙂", [(0, 0), (0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]),
        ("byte_level_prefix", "The x", [(0, 3), (3, 4), (4, 5)]),
        ("byte_level_digits", "12", [(0, 1), (1, 2)]),
        ("sentencepiece_legacy", " def", [(0, 0), (0, 1), (1, 4)]),  # <s>, the added space and ours
        # two bytes of one composed letter, and four of another, which nothing has composed
        ("byte_level_nfc", "e\u0301🙂", [(0, 3), (0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]),
        ("wordpiece", "The  é for", [(0, 0), (0, 3), (3, 7), (7, 11), (11, 11)]),
        ("sentencepiece", "<s>x", [(0, 0), (0, 3), (3, 3), (3, 4)]),  # BOS, and one that is written
        ("byte_level", "x<|endoftext|>", [(0, 1), (1, 14)]),
    ],
)
def test_by_hand(name: str, text: str, expected: list[tuple[int, int]]) -> None:
    tokenizer = kind(name)
    assert (
        list(map(tuple, byte_offsets(tokenizer, text, ids(tokenizer, text)).tolist())) == expected
    )


def test_special_tokens_that_the_text_spells_otherwise() -> None:
    """BOS is added to a text that begins with its letters as ordinary tokens."""
    tokenizer = kind("sentencepiece")
    bos, *letters = (tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "▁<", "s", ">", "x"))
    if letters[0] == tokenizer.unk_token_id:
        letters = [tokenizer.convert_tokens_to_ids(t) for t in ("▁", "<", "s", ">", "x")]
    found = byte_offsets(tokenizer, "<s>x", [bos, *letters]).tolist()
    assert found[0] == [0, 0] and found[-3:] == [[1, 2], [2, 3], [3, 4]]


def test_unknown_tokens_cover_what_they_stand_for() -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    encoded = tokenizer.encode("a ö🙂a")
    assert encoded.tokens == ["▁", "a", "▁", "<unk>", "<unk>", "a"]
    found = byte_offsets(tokenizer, "a ö🙂a", encoded.ids).tolist()
    assert found[2:] == [[1, 2], [2, 4], [4, 8], [8, 9]]
    assert align(torch.tensor(found), torch.tensor([[0, 1], [1, 9]]))[0].tolist() == [
        [0, 2],
        [2, 6],
    ]


def test_a_tokenizer_that_grows_is_read_anew() -> None:
    tokenizer = byte_level(300)
    byte_offsets(tokenizer, "ab", ids(tokenizer, "ab"))
    tokenizer.add_tokens(["<think>"])
    assert byte_offsets(tokenizer, "a<think>", ids(tokenizer, "a<think>")).tolist()[-1] == [1, 8]


@pytest.mark.parametrize("name", KINDS)
def test_other_ids_are_an_error_that_names_the_place(name: str) -> None:
    tokenizer = kind(name)
    text = "for x in range(10):"
    good = ids(tokenizer, text)
    wrong = [*good[:4], good[1], *good[5:]] if good[4] != good[1] else good[::-1]
    with pytest.raises(ValueError, match=r"ids\[\d+\] is '.*', and at byte \d+ of 19 the text has"):
        byte_offsets(tokenizer, text, wrong)
    with pytest.raises(ValueError, match=r"tokens that end at byte \d+ of 19.*cut the text"):
        byte_offsets(tokenizer, text, good[:3])
    with pytest.raises(
        ValueError, match=r"ids\[\d+\] is 987654, which the tokenizer does not have"
    ):
        byte_offsets(tokenizer, text, [*good, 987654])


def test_wrong_arguments() -> None:
    tokenizer = kind("byte_level")
    with pytest.raises(
        TypeError, match=r"is a str, of which nobody.*byte-level BPE, SentencePiece"
    ):
        byte_offsets("gpt2", "x", [1])
    with pytest.raises(TypeError, match="text is a bytes"):
        byte_offsets(tokenizer, b"x", [1])
    with pytest.raises(TypeError, match=r"ids has shape \(1, 1\)"):
        byte_offsets(tokenizer, "x", torch.tensor([[1]]))
    with pytest.raises(TypeError, match=r"ids has shape.*float"):
        byte_offsets(tokenizer, "x", [1.5])

    class Own:
        def pre_tokenize(self, pretok: Any) -> None: ...

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Own())
    with pytest.raises(TypeError, match="cannot be read"):
        byte_offsets(own, "x", [1])


# ---- alignment ----


def brute(student: list[list[int]], teacher: list[list[int]]) -> list[tuple[Any, ...]]:
    """The shortest pieces, by trying every pair of ranges: they tile the same bytes, and none has a
    shorter one in it that begins where it begins."""
    found, i, j = [], 0, 0
    while True:
        best = None
        for a in range(i, len(student)):
            for c in range(j, len(teacher)):
                if student[a][0] != teacher[c][0] or student[a][0] == student[a][1]:
                    continue
                if teacher[c][0] == teacher[c][1]:
                    continue
                ends = [
                    (b, d)
                    for b in range(a, len(student))
                    for d in range(c, len(teacher))
                    if student[b][1] == teacher[d][1] > student[a][0]
                    and student[b][0] < student[b][1]
                    and teacher[d][0] < teacher[d][1]
                ]
                if ends:
                    best = (a, ends[0][0] + 1, c, ends[0][1] + 1)
                    break
            if best:
                break
        if best is None:
            return found
        found.append(best)
        i, j = best[1], best[3]


def cut(rng: random.Random, length: int, empty: float) -> list[list[int]]:
    """A text of some bytes as tokens, some of them of no bytes."""
    cuts = sorted({0, length, *rng.sample(range(length + 1), rng.randint(0, length))})
    tokens: list[list[int]] = []
    for start, end in pairwise(cuts):
        while rng.random() < empty:
            tokens.append([start, start])
        tokens.append([start, end])
    while rng.random() < empty:
        tokens.append([length, length])
    return tokens


def test_random_cuts_against_every_pair_of_ranges() -> None:
    rng = random.Random(0)
    for trial in range(300):
        length = rng.randint(1, 14)
        student, teacher = (cut(rng, length, rng.choice([0, 0.2])) for _ in range(2))
        ours, theirs = align(torch.tensor(student), torch.tensor(teacher))
        found = [(*a, *b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        assert found == brute(student, teacher), (trial, student, teacher)


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", ["byte_level", "sentencepiece", "wordpiece"])
def test_spans_of_real_tokenizers(student: str, teacher: str) -> None:
    for text in SAMPLES.values():
        offsets = [byte_offsets(kind(x), text, ids(kind(x), text)) for x in (student, teacher)]
        spans = align(*offsets)
        tiled = [
            [(o[a:b, 0].min().item(), o[a:b, 1].max().item()) for a, b in s.tolist()]
            for o, s in zip(offsets, spans, strict=True)
        ]
        assert tiled[0] == tiled[1]
        assert all(a[1] == b[0] for a, b in pairwise(tiled[0]))  # and nothing between is left out
        if student == teacher:
            assert len(spans[0]) >= len({tuple(x) for x in offsets[0].tolist() if x[0] < x[1]})


def test_by_hand_what_has_no_bytes_is_at_no_edge() -> None:
    student = torch.tensor([[0, 0], [0, 3], [3, 3], [3, 5], [5, 5]])
    teacher = torch.tensor([[0, 1], [1, 3], [3, 4], [4, 5]])
    ours, theirs = align(student, teacher)
    assert ours.tolist() == [[1, 2], [3, 4]] and theirs.tolist() == [[0, 2], [2, 4]]
    ours, theirs = align(student, torch.tensor([[0, 5]]))
    assert ours.tolist() == [[1, 4]] and theirs.tolist() == [[0, 1]]


def test_templates_that_differ_are_in_no_range() -> None:
    """The text that both have is 0..4 and 4..8; around it each side has a template of its own."""
    student = torch.tensor([[-1, -1], [0, 2], [2, 4], [-1, -1], [-1, -1], [4, 8]])
    teacher = torch.tensor([[0, 4], [-1, -1], [4, 6], [6, 8], [-1, -1]])
    ours, theirs = align(student, teacher)
    assert ours.tolist() == [[1, 3], [5, 6]] and theirs.tolist() == [[0, 1], [2, 4]]
    swallowed = torch.tensor([[0, 8]])  # a token of one side goes over what the other has between
    assert [len(x) for x in align(student, swallowed)] == [0, 0]
    late = torch.tensor([[-1, -1], [2, 4], [4, 8]])  # its first piece of the text is not a token's
    assert align(student[:3], late)[0].tolist() == [[2, 3]]
    hole = torch.tensor([[0, 2], [-1, -1], [3, 5]])
    assert align(hole, torch.tensor([[0, 2], [2, 5]]))[0].tolist() == [[0, 1]]


def test_texts_that_begin_or_end_elsewhere() -> None:
    student = torch.tensor([[0, 2], [2, 4], [4, 6]])
    ours, theirs = align(student, torch.tensor([[2, 3], [3, 4]]))
    assert ours.tolist() == [[1, 2]] and theirs.tolist() == [[0, 2]]
    for none in (torch.zeros(0, 2, dtype=torch.int64), torch.tensor([[0, 0]]), student + 1):
        assert [x.shape for x in align(student, none)] == [(0, 2), (0, 2)]


def test_tokens_that_share_bytes_are_not_parted() -> None:
    ours, theirs = align(
        torch.tensor([[0, 3], [0, 3], [3, 4]]), torch.tensor([[0, 1], [1, 3], [3, 4]])
    )
    assert ours.tolist() == [[0, 2], [2, 3]] and theirs.tolist() == [[0, 2], [2, 3]]
    ours, _ = align(torch.tensor([[0, 3], [2, 5]]), torch.tensor([[0, 3], [3, 5]]))
    assert ours.tolist() == [[0, 2]]


def test_pads_spans() -> None:
    a, b = torch.tensor([[0, 1], [1, 3]]), torch.zeros(0, 2, dtype=torch.int64)
    assert pad_spans([a, b]).tolist() == [[[0, 1], [1, 3]], [[-1, -1], [-1, -1]]]
    assert pad_spans([b]).shape == (1, 0, 2) and pad_spans([]).shape == (0, 0, 2)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        (torch.tensor([[0.0, 1.0]]), "is float32: expected whole"),
        (torch.tensor([[0, 1, 2]]), r"shape \(1, 3\): expected \(L, 2\)"),
        (torch.tensor([[3, 4], [0, 1]]), "in the order of the text"),
        (torch.tensor([[3, 2]]), "in the order of the text"),
        (torch.tensor([[-1, 2]]), r"or \(-1, -1\)"),
    ],
)
def test_wrong_offsets(offsets: torch.Tensor, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"student_offsets.*{said}"):
        align(offsets, torch.tensor([[0, 1]]))
