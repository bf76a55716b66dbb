"""Names of files, folders and data sets to rows, and which columns they are read from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, ONE, assistant, tokenizer, user
from datasets import Dataset, DatasetDict, IterableDataset

from fusedkd.data import sources
from fusedkd.data.arguments import DataArguments
from fusedkd.data.loading import Prepared, load_rows
from fusedkd.errors import UserError

ROWS = [{"text": f'line {i}, "quoted"\nand another', "more": i} for i in range(6)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def load(*data: str, **more: Any) -> Prepared:
    how = {"eval_share": None if more.get("data_streaming") else 0.0, "max_length": 200, **more}
    return load_rows(DataArguments(list(data), **how), tokenizer(CHATML))


def texts(rows: Prepared) -> list[str]:
    return [tokenizer(None).decode(row["input_ids"]) for row in rows.train]


FORMATS: dict[str, Callable[[Dataset, Path], Any]] = {
    "a.jsonl": lambda rows, path: rows.to_json(path),
    "a.ndjson": lambda rows, path: rows.to_json(path),
    "a.json": lambda rows, path: path.write_text(json.dumps(rows.to_list())),
    "a.jsonl.gz": lambda rows, path: write(path, rows.to_list()),
    "a.csv": lambda rows, path: rows.to_csv(path),
    "a.tsv": lambda rows, path: rows.to_csv(path, sep="\t"),
    "a.parquet": lambda rows, path: rows.to_parquet(path),
    "a.arrow": lambda rows, path: rows._data.table,
    "folder": lambda rows, path: (path.mkdir(), rows.to_parquet(path / "b.parquet")),
    "saved": lambda rows, path: rows.save_to_disk(path),
    "splits:test": lambda rows, path: DatasetDict({"test": rows}).save_to_disk(
        str(path).removesuffix(":test")
    ),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = Dataset.from_list(ROWS)
    if name == "a.arrow":
        import pyarrow as pa

        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.data.schema) as out:
            out.write_table(rows.data.table)
    else:
        FORMATS[name](rows, path)
    found = load(str(path), packing="none", data_streaming=streaming)
    assert isinstance(found.train, IterableDataset) == streaming
    assert sorted(texts(found)) == [f"<s>{row['text']}<eos>".removeprefix("<s>") for row in ROWS]


def test_cells_of_csv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a, ""b""\nc",NA\nnull,"d"\n')
    assert texts(load(str(path))) == ['a, "b"\ncNA<eos>', "nulld<eos>"]
    path.write_text("messages\n" + '"' + json.dumps(ONE).replace('"', '""') + '"\n')
    assert "hello" in texts(load(str(path)))[0]


# ---- the hub -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("someone/chat", (None, "train")),
        ("someone/chat:fine:test", ("fine", "test")),
        ("someone/chat:fine", ("fine", "train")),
        ("someone/chat:test", (None, "test")),
        ("someone/chat::test", (None, "test")),
        ("imdb", (None, "train")),
    ],
)
def test_names_on_the_hub(
    name: str, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def hub(repository: str, config: Any, **how: Any) -> Dataset:
        calls.append((repository, config, how.pop("split")))
        assert how == {"streaming": False, "revision": "v2"}
        return Dataset.from_list([{"messages": ONE}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "load_dataset", hub)
    monkeypatch.setattr(sources, "get_dataset_config_names", lambda name, revision: ["fine"])
    assert len(load(name, data_revision="v2").train) == 1
    assert calls == [(name.split(":")[0], *asked)]


def test_what_is_neither_there_nor_on_the_hub(tmp_path: Path) -> None:
    for name, said in (
        ("someone/nothing", "no such file or folder, and as the name"),
        (str(tmp_path / "none"), "does not exist"),
        ("none.jsonl", "does not exist"),
        ("a:b:c:d", "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            load(name)


# ---- columns -----------------------------------------------------------------------------------


def test_columns_by_other_names(tmp_path: Path) -> None:
    row = {"body": "ab", "chat": ONE, "question": "cd", "answer": "ef", "text": "gh"}
    data = write(tmp_path / "a.jsonl", [row])
    assert texts(load(data)) == ["gh<eos>"]
    assert texts(load(data, text_column="body")) == ["ab<eos>"]
    assert "hello" in texts(load(data, messages_column="chat"))[0]
    pair = load(data, prompt_column="question", completion_column="answer")
    assert texts(pair) == ["cdef<eos>"] and pair.summary.labels == 3
    assert load(data, prompt_column="question").summary.labels == 0
    for flags, said in (
        ({"text_column": "nothing"}, "--text_column nothing: there is no such column"),
        ({"completion_column": "answer"}, "flags for one kind"),
        ({"text_column": "body", "messages_column": "chat"}, "flags for one kind"),
    ):
        with pytest.raises(UserError, match=said):
            load(data, **flags)


def test_conversations_of_sharegpt_and_nested_json(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello\nyou"}]
    assert texts(load(write(tmp_path / "a.jsonl", [{"conversations": turns}]))) == texts(
        load(write(tmp_path / "b.jsonl", [{"messages": ONE, "meta": {"a": [1, {"b": "c"}]}}]))
    )
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    other = [{"function": {"name": "g", "arguments": {"y": "z"}}}]
    rows = [
        {"messages": [user("a"), {**assistant("b"), "tool_calls": found}]}
        for found in (calls, other, None)
    ]
    assert len(texts(load(write(tmp_path / "c.jsonl", rows)))) == 3


# ---- mixtures ----------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    first = write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(40)])
    second = write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(40)])
    return first, second


def test_sources_without_weights_are_all_there(two: tuple[str, str]) -> None:
    assert len(texts(load(*two, packing="none"))) == 80


def test_texts_of_several_files_are_one_text_and_one_is_put_aside(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    for path in files:
        path.write_text(path.stem * 30)
    names = list(map(str, files))
    assert len(load(*names, max_length=31).train) == 3
    rows = load(*names, eval_share=0.3, max_length=31)
    assert (len(rows.train), len(rows.test)) == (2, 1)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_weights_are_shares_of_the_rows(two: tuple[str, str], streaming: bool) -> None:
    def shares(*data: str, **more: Any) -> tuple[int, int]:
        found = texts(load(*data, packing="none", data_streaming=streaming, **more))
        return sum("a" in x for x in found), sum("b" in x for x in found)

    by_name = shares(f"{two[0]}=3", f"{two[1]}=1")
    assert by_name == shares(*two, data_weights=[0.75, 0.25])
    assert by_name[0] == 40 and 5 < by_name[1] < 25
    repeated = shares(*two, data_weights=[3, 1], data_stopping_strategy="all_exhausted")
    assert repeated[0] > 80 and repeated[1] >= 40


def test_what_is_put_aside_is_nowhere_in_a_mixture_that_repeats(two: tuple[str, str]) -> None:
    rows = load(
        *(f"{two[0]}=0.9", f"{two[1]}=0.1"),
        packing="none",
        eval_share=0.25,
        data_stopping_strategy="all_exhausted",
    )
    held_out = {str(row["input_ids"]) for row in rows.test}
    assert len(held_out) == 20
    assert not held_out & {str(row["input_ids"]) for row in rows.train}


def test_nothing_is_lost_or_put_aside_that_has_no_label(tmp_path: Path) -> None:
    chat = write(tmp_path / "a.jsonl", [{"messages": ONE[:1]}, {"messages": ONE}] * 4)
    prompts = write(tmp_path / "b.jsonl", [{"prompt": ONE[:1]}] * 4)
    rows = load(chat, prompts, eval_share=0.5)
    labelled = [any(label != -100 for label in row["labels"]) for row in rows.train]
    assert sorted(labelled) == [False] * 4 + [True] * 2 and rows.summary.left_out == 4
    assert len(rows.test) == 2 and all(max(row["labels"]) > 0 for row in rows.test)


def test_several_processes_read_the_same(two: tuple[str, str]) -> None:
    assert texts(load(*two, packing="none", data_num_proc=2)) == texts(load(*two, packing="none"))


def test_mixtures_of_kinds(tmp_path: Path, two: tuple[str, str]) -> None:
    chat = write(tmp_path / "c.jsonl", [{"messages": ONE, "tools": None}, {"messages": ONE}])
    pairs = write(tmp_path / "d.jsonl", [{"prompt": "x", "completion": "y", "id": 7}])
    assert len(texts(load(chat, pairs))) == 3
    with pytest.raises(UserError, match=r"is text, which is cut into blocks, and .* has answers"):
        load(two[0], chat)
    assert len(texts(load(two[0], chat, packing="none"))) == 42
    assert load(two[0], chat, packing="blocks").summary.packed
    for weights, said in (
        ([f"{two[0]}=0.5", chat], "a weight for each"),
        ([f"{two[0]}=-1", f"{chat}=1"], "is no weight"),
        ([f"{two[0]}=x", f"{chat}=1"], "is no weight"),
    ):
        with pytest.raises(UserError, match=said):
            load(*weights)


# ---- what the flags say ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"max_length": 1}, r"--max_length \(--block_size\) 1"),
        ({"packing": "tight"}, "--packing tight: expected one of none, blocks, flatten"),
        ({"train_on": "prompts"}, "--train_on prompts"),
        ({"data_stopping_strategy": "never"}, "--data_stopping_strategy never"),
        ({"eval_share": 1.0}, "--eval_share 1.0"),
        ({"data_weights": [0.5]}, "--data_weights has 1 numbers and --data 2"),
        ({"data_weights": [0.5, -1]}, "--data_weights -1"),
        ({"data_weights": [0.5, float("nan")]}, "--data_weights nan"),
        ({"data_streaming": True, "eval_share": 0.1}, "--eval_share 0.1 with --data_streaming"),
    ],
)
def test_flags_out_of_range_are_named(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataArguments(["a", "b"], **flags)


def test_answers_without_an_end_are_told(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"messages": ONE}])
    bare = tmp_path / "bare.jinja"
    bare.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert load(data).summary.stops
    found = load(data, chat_template=str(bare)).summary
    assert not found.stops and "will not learn where to stop" in str(found)


def test_a_row_that_is_none_is_named_with_its_file(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", [{"messages": ONE}])
    bad = write(tmp_path / "b.jsonl", [{"messages": ONE[:0]}, {"messages": ONE}])
    with pytest.raises(UserError, match=r"--data: .*b\.jsonl: .*empty conversation"):
        load(good, bad)


def test_a_summary_counts_what_became_of_the_rows(tmp_path: Path) -> None:
    rows = [{"messages": [user("a" * 10 * i), assistant("b" * 20)]} for i in (1, 2, 3, 6, 9)]
    rows.append({"messages": [user("alone")]})
    found = load(write(tmp_path / "a.jsonl", rows), max_length=90).summary
    assert (found.rows, found.truncated, found.left_out, found.longest) == (4, 1, 2, 101)
    assert "truncated to 90 tokens; 2 left out (no label" in str(found)
    assert found.table()["with a label"].startswith(f"{found.labels:,} (")
