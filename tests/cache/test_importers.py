"""Answers that others have collected, in files that may hold anything: a cache, or an error that
names the row and the column, and nothing on the disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusedkd.cache import CacheError, TeacherCache, verify
from fusedkd.cache.importers import Record, import_records, read_columns, read_vllm

V = 50
FACTS = {"teacher": "t", "teacher_hash": None, "tokenizer_hash": "ab" * 32,
         "padded_vocab_size": V, "source": "x"}  # fmt: skip
GOOD = {
    "input_ids": [1, 2, 3],
    "top_k_ids": [[1], [2], [3]],
    "top_k_logprobs": [[-0.1], [-0.2], [-0.3]],
}


def make(folder: Path, read: Callable[[], Iterable[Record]], **more: Any) -> TeacherCache:
    import_records(folder, read, facts=dict(FACTS), **{"vocab_size": V, **more})
    assert not verify(folder)[1]
    return TeacherCache(folder)


def rows(*changed: dict[str, Any], **more: Any) -> Callable[[], Iterable[Record]]:
    return lambda: read_columns([{**GOOD, **change} for change in changed], None, False)


def lines(path: Path, *texts: str | bytes) -> Callable[[], Iterable[Record]]:
    path.write_bytes(b"\n".join(t if isinstance(t, bytes) else t.encode() for t in texts))
    return lambda: read_vllm(path)


def assert_refused(
    tmp_path: Path, read: Callable[[], Iterable[Record]], *words: str, **more: Any
) -> None:
    """Whether the folder, or the one around it, was there before or not."""
    (tmp_path / "there").mkdir(exist_ok=True)
    for folder in (tmp_path / "there", tmp_path / "new", tmp_path / "a" / "b" / "new"):
        with pytest.raises(CacheError) as refusal:
            make(folder, read, **more)
        for word in words:
            assert word in str(refusal.value), str(refusal.value)
        assert len(str(refusal.value)) < 1000
    assert not [*(tmp_path / "there").iterdir()]
    assert not (tmp_path / "new").exists() and not (tmp_path / "a").exists()


# ---- columns -----------------------------------------------------------------------------------

IDS, LOGS = "top_k_ids", "top_k_logprobs"
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a list of values less": ({LOGS: [[-0.1], [-0.2]]}, (IDS, LOGS, "3", "2")),
    "a list of ids less": ({IDS: [[1], [2]]}, (IDS, LOGS)),
    "lists less": ({IDS: [[1]], LOGS: [[-0.1]]}, ("3 tokens but 1", IDS)),
    "lists more": ({IDS: [[1]] * 4, LOGS: [[-0.1]] * 4}, ("3 tokens but 4", IDS)),
    "a value less": ({LOGS: [[-0.1], [], [-0.3]]}, ("token 1", LOGS, "1 ids but 0")),
    "an id less": ({IDS: [[1], [], [3]]}, ("token 1", LOGS, "0 ids but 1")),
    "no values": ({LOGS: None}, (LOGS, "NoneType")),
    "no ids": ({IDS: None}, (IDS, "NoneType")),
    "no tokens": ({"input_ids": None}, ("input_ids", "NoneType")),
    "tokens are a word": ({"input_ids": "abc"}, ("input_ids", "'abc'")),
    "tokens are a number": ({"input_ids": 7}, ("input_ids", "7")),
    "tokens outside": ({"input_ids": [1, 50, 3]}, ("input_ids", "50", "0 to 49")),
    "negative tokens": ({"input_ids": [1, -7, 3]}, ("input_ids", "-7")),
    "nested tokens": ({"input_ids": [[1], [2], [3]]}, ("input_ids", "[1]")),
    "fractional tokens": ({"input_ids": [1, 2.5, 3]}, ("input_ids", "2.5")),
    "tokens that are truths": ({"input_ids": [1, True, 3]}, ("input_ids", "True")),
    "all tokens truths": ({"input_ids": np.array([True] * 3)}, ("input_ids", "True")),
    "missing tokens": ({"input_ids": [1, None, 3]}, ("input_ids", "None")),
    "tokens that are words": ({"input_ids": ["1", "2", "3"]}, ("input_ids", "'1'")),
    "huge tokens": ({"input_ids": [1, 10**30, 3]}, ("input_ids", "outside")),
    "tokens without end": ({"input_ids": [1, math.inf, 3]}, ("input_ids", "inf")),
    "a matrix of tokens": ({"input_ids": np.ones((3, 1), int)}, ("input_ids",)),
    "a number as array": ({"input_ids": np.array(3)}, ("input_ids",)),
    "ids are words": ({IDS: [["a"], ["b"], ["c"]]}, ("token 0", IDS, "'a'")),
    "ids are numbers": ({IDS: [1, 2, 3]}, ("token 0", IDS, "1 is a int")),
    "ids are a word each": ({IDS: ["1", "2", "3"]}, ("token 0", IDS, "'1'")),
    "ids are a mapping": ({IDS: [{1: 2}] * 3}, ("token 0", IDS)),
    "ids outside": ({IDS: [[1], [2], [50]]}, ("token 2", IDS, "outside 0 to 49")),
    "negative ids": ({IDS: [[1], [-1], [3]]}, ("token 1", IDS, "-1")),
    "fractional ids": ({IDS: [[1], [2.0], [3]]}, ("token 1", IDS, "2.0")),
    "ids of fractions": ({IDS: [np.array([1.5])] * 3}, ("token 0", IDS, "1.5")),
    "truths": ({IDS: [[True], [2], [3]]}, ("token 0", IDS, "True")),
    "missing ids": ({IDS: [[1], [None], [3]]}, ("token 1", IDS, "None")),
    "nested ids": ({IDS: [[1], [[2]], [3]]}, ("token 1", IDS, "[2]")),
    "huge ids": ({IDS: [[1], [2**64], [3]]}, ("token 1", IDS, "outside")),
    "an id twice": (
        {IDS: [[1], [2, 2], [3]], LOGS: [[-1.0], [-1.0, -2.0], [-1.0]]},
        ("token 1", IDS, "the id 2 is there twice"),
    ),
    "NaN": ({LOGS: [[-0.1], [math.nan], [-0.3]]}, ("token 1", LOGS, "nan")),
    "infinity": ({LOGS: [[-0.1], [math.inf], [-0.3]]}, ("token 1", LOGS, "inf")),
    "huge values": ({LOGS: [[-0.1], [10**400], [-0.3]]}, ("token 1", LOGS)),
    "huge negative values": ({LOGS: [[-0.1], [-(10**400)], [-0.3]]}, ("token 1", LOGS)),
    "probabilities": ({LOGS: [[-0.1], [0.8], [-0.3]]}, ("token 1", LOGS, "sum to 2.2255")),
    "logits": ({LOGS: [[-0.1], [12.5], [-0.3]]}, ("token 1", LOGS, "12.5")),
    "values are words": ({LOGS: [["-0.1"], [-0.2], [-0.3]]}, ("token 0", LOGS, "'-0.1'")),
    "values are truths": ({LOGS: [[False], [-0.2], [-0.3]]}, ("token 0", LOGS, "False")),
    "missing values": ({LOGS: [[-0.1], [-0.2], [None]]}, ("token 2", LOGS, "None")),
    "nested values": ({LOGS: [[-0.1], [[-0.2]], [-0.3]]}, ("token 1", LOGS, "[-0.2]")),
    "complex values": ({LOGS: [[-0.1], [1j], [-0.3]]}, ("token 1", LOGS, "1j")),
}


@pytest.mark.parametrize("what", ROWS)
def test_rows_are_refused_with_their_number(tmp_path: Path, what: str) -> None:
    changed, words = ROWS[what]
    assert_refused(tmp_path, rows({"input_ids": [9, 9, 9]}, changed), "row 1", *words)


def test_missing_columns(tmp_path: Path) -> None:
    for name in ("input_ids", LOGS):
        row = {key: value for key, value in GOOD.items() if key != name}
        read = lambda r=row: read_columns([GOOD, r], (IDS, LOGS), False)  # noqa: E731
        assert_refused(tmp_path, read, "row 1", f"no column '{name}'")


def test_rows_that_are_right(tmp_path: Path) -> None:
    """Arrays, nothing known of a token, no token at all, one known distribution less."""
    known = {
        "input_ids": np.array([4, 5, 6], np.int32),
        IDS: [np.array([7, 8]), None, np.array([], np.int64)],
        LOGS: [np.array([-2.0, -1.0], np.float32), None, []],
    }
    less = {"input_ids": [7, 8], IDS: [[1]], LOGS: [[-1]]}
    empty: dict[str, Any] = {"input_ids": [], IDS: [], LOGS: []}
    cache = make(tmp_path / "c", rows(known, empty, less, {}))
    assert cache.manifest.sequences == 3
    assert cache.get([4, 5, 6], 1.0).ids.tolist() == [[8, 7], [-1, -1], [-1, -1]]
    np.testing.assert_allclose(cache.get([4, 5, 6], 1.0).log_probs[0], [-1, -2], atol=0.01)
    assert cache.get([7, 8], 1.0).ids.tolist() == [[1], [-1]]
    assert_refused(tmp_path, rows(empty), "no sequence")


def test_impossible_entries_belong_to_nothing(tmp_path: Path) -> None:
    """-inf is what vLLM writes for what is masked: a probability of 0, not an entry of the token,
    and no mass of its tail."""
    changed = {
        IDS: [[1, 2, 3], [4, 5], [6]],
        LOGS: [[-math.inf, math.log(0.75), -math.inf], [-math.inf, -math.inf], [0.0]],
    }
    read = make(tmp_path / "c", rows(changed)).get(GOOD["input_ids"], 1.0)
    assert read.ids.tolist() == [[2], [-1], [6]]
    np.testing.assert_allclose(np.exp(read.log_probs[:, 0]), [0.75, 0, 1], atol=1e-3)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0, 7.7])
def test_gaps_up_to_the_last_that_codes_reach(tmp_path: Path, temperature: float) -> None:
    """However the products are rounded, what codes do not reach goes to the tail."""
    reach = 63.75 / temperature
    values = [0.0, *(-reach * (1 + n * 2.0**-52) for n in range(-4, 5)), -reach - 1]
    changed = {IDS: [[*range(11)]] * 3, LOGS: [[v - 0.7 for v in values]] * 3}
    cache = make(tmp_path / "c", rows(changed), temperature=temperature)
    kept = (cache.get(GOOD["input_ids"], temperature).ids >= 0).sum(1)
    assert ((kept >= 2) & (kept <= 10)).all()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"vocab_size": 0}, "--vocab-size 0"),
        ({"vocab_size": -5}, "--vocab-size -5"),
        ({"vocab_size": 2**40}, "--vocab-size"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"k": 0}, "--top-k 0"),
        ({"k": -1}, "--top-k -1"),
        ({"k": 5000}, "--top-k 5000"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, more: dict[str, Any], word: str) -> None:
    assert_refused(tmp_path, rows({}), word, **more)


# ---- the second reading ------------------------------------------------------------------------


def test_another_source_in_the_second_pass(tmp_path: Path) -> None:
    changed = {"input_ids": [4, 5, 6]}
    for second, word in (
        ([{**GOOD, **changed}, GOOD], "row 0"),
        ([GOOD], "row 1"),
        ([], "row 0"),
        ([GOOD, {**GOOD, "input_ids": [4, 5]}], "row 1"),
        ([GOOD, {**GOOD, **changed, LOGS: [[math.nan]] * 3}], "row 1"),
    ):
        for folder in (tmp_path / "new", tmp_path / "there"):
            passes = iter([[GOOD, {**GOOD, **changed}], second])
            (tmp_path / "there").mkdir(exist_ok=True)
            with pytest.raises(CacheError, match=word):
                # a shard for each row, so that one is there already
                make(folder, lambda p=passes: read_columns(next(p), None, False), shard_bytes=1)
        assert not (tmp_path / "new").exists() and not [*(tmp_path / "there").iterdir()]


def test_what_was_there_stays(tmp_path: Path) -> None:
    """Another cache, other files, and what a killed import has written."""
    make(tmp_path / "c", rows({}))
    before = {path: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with pytest.raises(CacheError, match="begun with another"):
        make(tmp_path / "c", rows({"input_ids": [4, 5, 6]}))
    assert {path: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "index.arrow").write_text("mine")
    (tmp_path / "d" / "thesis.tex").touch()
    with pytest.raises(CacheError, match=r"thesis\.tex"):
        make(tmp_path / "d", rows({}))
    assert (tmp_path / "d" / "index.arrow").read_text() == "mine"


def test_a_full_disk_costs_no_more_than_the_open_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, written = os.fsync, []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) > 8:  # files and folders: index, manifest, shard, manifest
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match="No space left"):
            make(tmp_path / "c", rows({}, {"input_ids": [4, 5, 6]}), shard_bytes=1)
    assert (tmp_path / "c" / "shard-00000.arrow").exists()
    make(tmp_path / "c", rows({}, {"input_ids": [4, 5, 6]}), shard_bytes=1)


# ---- vLLM --------------------------------------------------------------------------------------


def line(ids: Any = (1, 2), steps: Any = (None, {"2": -0.1})) -> str:
    return json.dumps({"prompt_token_ids": ids, "prompt_logprobs": steps})


KEY = "prompt_logprobs"
LINES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "fractional tokens": (line([1.9, 2.2]), ("prompt_token_ids", "1.9")),
    "tokens outside": (line([10**6, 2]), ("prompt_token_ids", "1000000")),
    "negative tokens": (line([-2, 2]), ("prompt_token_ids", "-2")),
    "truths": (line([True, 2]), ("prompt_token_ids", "True")),
    "words": (line(["1", "2"]), ("prompt_token_ids", "'1'")),
    "nested": (line([[1], [2]]), ("prompt_token_ids", "[1]")),
    "no list of tokens": (line({"1": 2}), ("prompt_token_ids", "dict")),
    "no tokens": (line(None), ("prompt_token_ids", "None")),
    "infinite tokens": (line([math.inf, 2]), ("prompt_token_ids", "inf")),
    "tokens that are no number": (line([math.nan, 2]), ("prompt_token_ids", "nan")),
    "no steps": (line(steps=None), (KEY, "None")),
    "steps are an object": (line(steps={"2": -0.1}), (KEY, "dict")),
    "steps are a word": (line(steps="ab"), (KEY, "'ab'")),
    "steps less": (line(steps=[None]), ("2 tokens but 1", KEY)),
    "steps without end": (line(steps=[]), ("2 tokens but 0", KEY)),
    "a step is a list": (line(steps=[None, [["2", -0.1]]]), ("token 1", KEY)),
    "a step is a number": (line(steps=[None, 7]), ("token 1", KEY, "7")),
    "a step is a truth": (line(steps=[None, True]), ("token 1", KEY, "True")),
    "ids are words": (line(steps=[None, {"two": -0.1}]), ("token 0", KEY, "'two'")),
    "ids are nearly numbers": (line(steps=[None, {" 2": -0.1}]), ("token 0", KEY, "' 2'")),
    "ids with underscores": (line(steps=[None, {"1_0": -0.1}]), ("token 0", KEY, "'1_0'")),
    "ids of other digits": (line(steps=[None, {"２": -0.1}]), ("token 0", KEY)),
    "negative ids": (line(steps=[None, {"-2": -0.1}]), ("token 0", KEY, "-2")),
    "fractional ids": (line(steps=[None, {"2.0": -0.1}]), ("token 0", KEY, "2.0")),
    "ids outside": (line(steps=[None, {"50": -0.1}]), ("token 0", KEY, "outside 0 to 49")),
    "huge ids": (line(steps=[None, {"9" * 5000: -0.1}]), ("token 0", KEY)),
    "an id twice": (
        '{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"2": -1, "2": -2}]}',
        ("'2' is there twice",),
    ),
    "an id in two spellings": (line(steps=[None, {"2": -1, "02": -2}]), ("id 2 is there twice",)),
    "tokens twice": ('{"prompt_token_ids": [1], "prompt_token_ids": [2]}', ("twice",)),
    "values are words": (line(steps=[None, {"2": "-0.1"}]), ("token 0", KEY, "'-0.1'")),
    "values are truths": (line(steps=[None, {"2": {"logprob": True}}]), ("token 0", KEY, "True")),
    "values are lists": (line(steps=[None, {"2": [-0.1]}]), ("token 0", KEY, "[-0.1]")),
    "values are null": (line(steps=[None, {"2": None}]), ("token 0", KEY, "None")),
    "no value": (line(steps=[None, {"2": {"rank": 1}}]), ("token 0", KEY, "None")),
    "NaN": (line(steps=[None, {"2": math.nan}]), ("token 0", KEY, "nan")),
    "infinity": (line(steps=[None, {"2": math.inf}]), ("token 0", KEY, "inf")),
    "more than 1": (line(steps=[None, {"2": 0.5}]), ("token 0", KEY, "sum to 1.6487")),
    "no object": ("[1, 2]", ("prompt_token_ids",)),
    "a number": ("7", ("prompt_token_ids",)),
    "null": ("null", ("prompt_token_ids",)),
    "a word": ('"prompt_logprobs"', ("prompt_token_ids",)),
    "no choices": ('{"choices": []}', ("prompt_token_ids",)),
    "choices are no list": ('{"choices": {"0": 1}}', ("prompt_token_ids",)),
    "choices of numbers": ('{"choices": [7]}', ("prompt_token_ids",)),
    "half a line": (line()[:-5], ("prompt_token_ids",)),
    "two objects": (line() + line(), ("prompt_token_ids",)),
    "no JSON": ("prompt_logprobs", ("prompt_token_ids",)),
    "no UTF-8": (b'{"prompt_logprobs": "\xff"}', ("utf-8",)),
    "UTF-16": (line().encode("utf-16"), ("utf-8",)),
    "zeros": (b"\0" * 100, ("prompt_token_ids",)),
    "brackets": ("[" * 100_000, ("recursion",)),
    "braces": ('{"a":' * 100_000, ("recursion",)),
    "a nested step": (line()[:-3] + ', "3": ' + "[" * 100_000, ("recursion",)),
    "huge numbers": ('{"prompt_token_ids": [' + "9" * 5000 + "]}", ("digits",)),
}


@pytest.mark.parametrize("what", LINES)
def test_lines_are_refused_with_their_number(tmp_path: Path, what: str) -> None:
    text, words = LINES[what]
    assert_refused(
        tmp_path, lines(tmp_path / "a.jsonl", line(), "", text), "a.jsonl line 3", *words
    )


def test_lines_that_are_right(tmp_path: Path) -> None:
    """A byte order mark, an end of line as on Windows, steps that are not known, -Infinity."""
    text = '{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"2": -Infinity, "3": -1}]}'
    read = lines(tmp_path / "a", b"\xef\xbb\xbf" + text.encode() + b"\r", line([5, 6], [None] * 2))
    cache = make(tmp_path / "c", read)
    assert cache.get([1, 2], 1.0).ids.tolist() == [[3], [-1]]
    assert cache.get([5, 6], 1.0).ids.tolist() == [[], []]
