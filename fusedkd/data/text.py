"""Text on disk to blocks of tokens. Reading is ``datasets``' work; here a path finds its reader,
and blocks are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_dataset

from fusedkd.data.stdlib import stdlib_texts

__all__ = ["STDLIB", "check_ids", "load_documents", "load_files", "pack", "read", "split"]

STDLIB = "stdlib"  # in place of a path

_READERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
_COLUMNS = ("input_ids", "messages", "text")  # the first one that a file has is used


def load_documents(paths: Sequence[str | Path]) -> Dataset:
    """One row per document from files or directories of them, with one column out of
    ``input_ids``, ``messages``, ``text``.

    ``.txt``, ``.md`` and ``.py`` files are one document each; ``.jsonl``, ``.json`` and
    ``.parquet`` hold one per row, under ``text``, or ``messages`` (for the tokenizer's chat
    template), or ``input_ids`` with optional ``labels``. ``"stdlib"`` is the standard library of
    this Python.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing readable there, an unknown kind of file, or no known column.
    """
    return read(paths, _documents)


def read(paths: Sequence[str | Path], choose: Callable[[str, Dataset], Dataset]) -> Dataset:
    """Every row of every file, of each kind of file those columns that ``choose(name, rows)``
    gives."""
    parts = [choose(STDLIB, _stdlib()) for path in paths if str(path) == STDLIB]
    by_reader: dict[str, list[str]] = {}
    files = (_files(Path(path)) for path in paths if str(path) != STDLIB)
    for path in chain.from_iterable(files):
        by_reader.setdefault(_READERS[path.suffix.lower()], []).append(str(path))
    parts += [choose(files[0], load_files(reader, files)) for reader, files in by_reader.items()]
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise ValueError(
            f"the data mix {' and '.join(str(part.column_names) for part in parts)}: expected one "
            "kind."
        )
    return concatenate_datasets(parts)


def _stdlib() -> Dataset:
    return Dataset.from_dict({"text": stdlib_texts()})


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in _READERS)
        if not found:
            raise ValueError(f"{path} is a directory without any {', '.join(_READERS)} file.")
        return found
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path}: expected a {', '.join(_READERS)} file or a directory of them.")
    return [path]


def load_files(reader: str, files: list[str]) -> Dataset:
    """Their rows, through one of ``datasets``' readers.

    Raises:
        ValueError: they cannot be read.
    """
    options = {"sample_by": "document"} if reader == "text" else {}
    try:
        return load_dataset(reader, data_files=files, split="train", **options)
    except Exception as error:  # datasets wraps whatever its readers raise
        said = str(error.__cause__ or error) or "there are no rows"
        raise ValueError(f"cannot read {files[0]} as {reader}: {said}") from error


def _documents(name: str, rows: Dataset) -> Dataset:
    column = next((name for name in _COLUMNS if name in rows.column_names), None)
    if column is None:
        raise ValueError(
            f"{name} has the columns {', '.join(rows.column_names)}: expected one of "
            f"{', '.join(_COLUMNS)}."
        )
    both = column == "input_ids" and "labels" in rows.column_names
    columns = [column, "labels"] if both else [column]
    for column in columns:
        _check_column(name, column, rows.data.column(column))
    return rows.select_columns(columns)


def _check_column(name: str, column: str, values: pa.ChunkedArray) -> None:
    """What the tokenizer and the models take, in every row."""
    kind, expected = values.type, {"text": "text", "messages": "lists of messages"}
    fits = {
        "text": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "messages": _is_list(kind),
    }.get(column, _is_list(kind) and pa.types.is_integer(kind.value_type))
    if values and not fits:
        what = expected.get(column, "lists of whole numbers")
        raise ValueError(f"{name}: the column {column} holds {kind}: expected {what}.")
    if values.null_count or (_is_list(kind) and pc.list_flatten(values).null_count):
        raise ValueError(f"{name}: the column {column} is empty in some row.")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


SPLIT_SEED = 42


def split(documents: Dataset, share: float) -> tuple[Dataset, Dataset | None]:
    """Put a share of the documents aside for evaluation; none where there is only one document or
    no share. Always the same ones: runs with other seeds can be compared, and a teacher's cache
    stays good for them."""
    if not share or len(documents) < 2:
        return documents, None
    held_out = min(max(1, round(share * len(documents))), len(documents) - 1)
    parts = documents.train_test_split(test_size=held_out, seed=SPLIT_SEED)
    return parts["train"], parts["test"]


def pack(documents: Dataset, tokenizer: Any, block_size: int) -> Dataset:
    """Tokenize, join the documents with the end-of-text token between them, and cut blocks.

    Returns:
        ``input_ids`` and ``labels``, ``block_size`` long each. What does not fill a last block is
        dropped, unless it is all there is.

    Raises:
        ValueError: the documents hold fewer than two tokens, or not one label per token.
    """
    if "input_ids" not in documents.column_names:
        end = (
            tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        )
        documents = documents.map(
            _tokenize,
            fn_kwargs={"tokenizer": tokenizer, "end": [] if end is None else [end]},
            batched=True,
            remove_columns=documents.column_names,
            desc="Tokenizing",
        )
    for short in (False, True):
        blocks = documents.map(
            _cut,
            fn_kwargs={"block_size": block_size, "short": short},
            batched=True,
            batch_size=10_000,  # the remainder is dropped once per batch
            remove_columns=documents.column_names,
            desc=f"Cutting blocks of {block_size}",
        )
        if len(blocks):
            break
    else:
        raise ValueError("the data are empty: expected at least two tokens of text.")
    return blocks


def _tokenize(rows: dict[str, list[Any]], tokenizer: Any, end: list[int]) -> dict[str, list[Any]]:
    if "messages" in rows:
        texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in rows["messages"]]
    else:
        texts = rows["text"]
    # no special tokens: what the model was trained with stands between documents, not within
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": [ids + end for ids in encoded["input_ids"]]}


def _cut(
    rows: dict[str, list[list[int]]], block_size: int, short: bool
) -> dict[str, list[list[int]]]:
    for ids, labels in zip(rows["input_ids"], rows.get("labels", rows["input_ids"]), strict=True):
        if len(ids) != len(labels):
            raise ValueError(
                f"a row has {len(ids)} input_ids and {len(labels)} labels: expected one label per "
                "token (-100 where it does not count; nothing is shifted)."
            )
    joined = {name: list(chain.from_iterable(values)) for name, values in rows.items()}
    joined.setdefault("labels", joined["input_ids"])
    length = len(joined["input_ids"])
    last = length if short and length > 1 else length - length % block_size
    return {
        name: [values[start : start + block_size] for start in range(0, last, block_size)]
        for name, values in joined.items()
    }


def check_ids(rows: Dataset, vocabulary: int, labels: bool) -> None:
    """Raise unless every token, and with ``labels`` every label that counts, is one of
    ``vocabulary``.

    Raises:
        ValueError: naming the column and what it holds.
    """
    for name, ignored in (("input_ids", None), ("labels", -100))[: 1 + labels]:
        values = pc.list_flatten(rows.data.column(name))
        counted = values if ignored is None else values.filter(pc.not_equal(values, ignored))
        found = pc.min_max(counted).as_py()
        least, most = found["min"], found["max"]
        if most is not None and not 0 <= least <= most < vocabulary:
            extra = "" if ignored is None else f", or {ignored} where a label does not count"
            raise ValueError(
                f"{name} holds {most if most >= vocabulary else least}: expected 0 to "
                f"{vocabulary - 1}, the models' vocabulary{extra}. Was another tokenizer used?"
            )
