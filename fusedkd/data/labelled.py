"""Labelled examples on disk to rows for a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from fusedkd.data.text import read, split

__all__ = ["load_examples"]

COLUMNS = ("text", "text_pair", "label")


def load_examples(
    data: Sequence[str | Path],
    eval_data: Sequence[str | Path],
    eval_share: float,
    tokenizer: Any,
    length: int,
    label2id: dict[str, int],
) -> tuple[Dataset, Dataset | None]:
    """Rows to train and to evaluate on, from ``.jsonl``, ``.json`` or ``.parquet`` with the columns
    ``text``, ``label`` (a class's name or number) and, for pairs, ``text_pair``.

    Returns:
        What the tokenizer gives, cut to ``length``, and ``labels``; not padded.

    Raises:
        FileNotFoundError, ValueError: missing files or columns, or a label that the teacher does
            not know.
    """
    train, test = (None if not paths else read(paths, _columns) for paths in (data, eval_data))
    if train is None:
        raise ValueError("data is missing: expected files with text and label.")
    if test is None:
        train, test = split(train, eval_share)
    fn_kwargs = {"tokenizer": tokenizer, "length": length, "label2id": label2id}
    encoded = [
        None
        if part is None
        else part.map(
            _encode,
            fn_kwargs=fn_kwargs,
            batched=True,
            remove_columns=part.column_names,
            desc="Tokenizing",
        )
        for part in (train, test)
    ]
    assert encoded[0] is not None
    return encoded[0], encoded[1]


def _columns(name: str, rows: Dataset) -> Dataset:
    if not {"text", "label"} <= set(rows.column_names):
        raise ValueError(
            f"{name} has the columns {', '.join(rows.column_names)}: expected text and label (and "
            "text_pair for pairs), for a classifier."
        )
    return rows.select_columns([column for column in COLUMNS if column in rows.column_names])


def _encode(
    rows: dict[str, list[Any]], tokenizer: Any, length: int, label2id: dict[str, int]
) -> dict[str, Any]:
    texts = [rows[name] for name in ("text", "text_pair") if name in rows]
    encoded = tokenizer(*texts, truncation=True, max_length=length)
    return {**encoded, "labels": [_label(label, label2id) for label in rows["label"]]}


def _label(label: Any, label2id: dict[str, int]) -> int:
    if isinstance(label, str) and label in label2id:
        return label2id[label]
    if isinstance(label, int) and label in label2id.values():
        return label
    raise ValueError(f"label {label!r}: expected one of the teacher's classes, {label2id}.")
