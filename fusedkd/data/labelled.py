"""Labelled examples, and pairs of texts, on disk to rows for a model that gives one answer for a
sequence, one for each word, or another text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from fusedkd.data.arguments import DataArguments
from fusedkd.data.text import read, split
from fusedkd.errors import UserError, as_user_error

Columns = dict[str, list[Any]]
# the name here, and those that it may have in the data, likeliest first
_EXAMPLES = {"text": ("text",), "label": ("label", "labels"), "text_pair": ("text_pair",)}
_WORDS = {"tokens": ("tokens", "words"), "tags": ("labels", "tags", "ner_tags")}
_PAIRS = {"source": ("source", "text", "prompt"), "target": ("target", "label", "completion")}


def load_examples(
    flags: DataArguments, tokenizer: Any, label2id: dict[str, int], numbers: bool
) -> tuple[Dataset, Dataset | None]:
    """Rows to train and to evaluate on, from the columns ``text``, ``label`` and, for pairs,
    ``text_pair``. A label is a class's name or number, a list of these where several may be true,
    or, with ``numbers``, what a regression predicts.

    Returns:
        What the tokenizer gives, cut to ``flags.max_length``, and ``labels``; not padded.

    Raises:
        UserError: missing files or columns, or a label that the teacher does not know.
    """

    def encode(rows: Columns) -> dict[str, Any]:
        texts = [rows[name] for name in ("text", "text_pair") if name in rows]
        encoded = tokenizer(*texts, truncation=True, max_length=flags.max_length)
        find = _number if numbers else partial(_class_or_classes, label2id=label2id)
        return {**encoded, "labels": [find(label) for label in rows["label"]]}

    return _load(flags, "a classifier", _EXAMPLES, {"text_pair"}, encode)


def load_words(
    flags: DataArguments, tokenizer: Any, label2id: dict[str, int]
) -> tuple[Dataset, Dataset | None]:
    """Rows from the columns ``tokens`` (words) and ``labels`` (also ``tags``, ``ner_tags``), one
    class for each word. The first token of a word carries its label, the others none.

    Raises:
        UserError: as :func:`load_examples`; a tokenizer that cannot tell the words apart.
    """
    if not tokenizer.is_fast:
        raise UserError("token classification: expected a fast tokenizer, which knows its words.")

    def encode(rows: Columns) -> dict[str, Any]:
        encoded = tokenizer(
            rows["tokens"], is_split_into_words=True, truncation=True, max_length=flags.max_length
        )
        pairs = enumerate(zip(rows["tokens"], rows["tags"], strict=True))
        labels = [_of_tokens(encoded.word_ids(i), *pair, label2id) for i, pair in pairs]
        return {**encoded, "labels": labels}

    return _load(flags, "token classification", _WORDS, set(), encode)


def load_pairs(flags: DataArguments, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Rows from the columns ``source`` and ``target`` (also ``text`` and ``label``, ``prompt`` and
    ``completion``): ids of the one, labels of the other.

    Raises:
        UserError: missing files or columns.
    """

    def encode(rows: Columns) -> dict[str, Any]:
        cut: dict[str, Any] = {"truncation": True, "max_length": flags.max_length}
        encoded = tokenizer(rows["source"], **cut)
        return {**encoded, "labels": tokenizer(text_target=rows["target"], **cut)["input_ids"]}

    return _load(flags, "an encoder-decoder", _PAIRS, set(), encode)


def _load(
    flags: DataArguments,
    task: str,
    columns: Mapping[str, tuple[str, ...]],
    optional: set[str],
    encode: Callable[[Columns], dict[str, Any]],
) -> tuple[Dataset, Dataset | None]:
    if flags.data_streaming or flags.packing not in (None, "none"):
        raise UserError("--data_streaming, --packing: expected neither for examples with labels.")
    choose = partial(_chosen, task=task, columns=columns, optional=optional)
    with as_user_error("--data"):
        train = read(flags.data, choose)
    with as_user_error("--eval_data"):
        test = read(flags.eval_data, choose) if flags.eval_data else None
    if test is None:
        train, test = split(train, flags.eval_share or 0.0)

    def encoded(rows: Dataset) -> Dataset:
        return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")

    with as_user_error("--data"):
        return encoded(train), None if test is None else encoded(test)


def _chosen(
    name: str, rows: Dataset, task: str, columns: Mapping[str, tuple[str, ...]], optional: set[str]
) -> Dataset:
    """The rows with the columns that are wanted, under the names that they have here."""
    found = {}
    for ours, names in columns.items():
        theirs = next((x for x in names if x in rows.column_names), None)
        if theirs is not None:
            found[theirs] = ours
        elif ours not in optional:
            wanted = " and ".join(names[0] for x, names in columns.items() if x not in optional)
            more = f" (and {', '.join(optional)})" if optional else ""
            raise ValueError(
                f"{name} has the columns {', '.join(rows.column_names)}: expected {wanted}{more}, "
                f"for {task}."
            )
    renamed = {theirs: ours for theirs, ours in found.items() if theirs != ours}
    return rows.select_columns(list(found)).rename_columns(renamed)


def _of_tokens(
    words: Sequence[int | None], texts: Sequence[str], labels: Sequence[Any], label2id: Any
) -> list[int]:
    """A label for each token: its word's for the first of a word."""
    if len(texts) != len(labels):
        raise ValueError(
            f"a row has {len(texts)} tokens and {len(labels)} labels: expected one for each."
        )
    before = [None, *words[:-1]]
    return [
        -100 if word is None or word == last else _class(labels[word], label2id)
        for word, last in zip(words, before, strict=True)
    ]


def _class_or_classes(label: Any, label2id: dict[str, int]) -> Any:
    """A class's number, or for a list one 0.0 or 1.0 for each class."""
    if not isinstance(label, list):
        return _class(label, label2id)
    true = {_class(one, label2id) for one in label}
    return [float(number in true) for number in sorted(label2id.values())]


def _class(label: Any, label2id: dict[str, int]) -> int:
    if isinstance(label, str) and label in label2id:
        return label2id[label]
    if isinstance(label, int) and label in label2id.values():
        return label
    raise ValueError(f"label {label!r}: expected one of the teacher's classes, {label2id}.")


def _number(label: Any) -> Any:
    if isinstance(label, list):
        return [_number(one) for one in label]
    if isinstance(label, int | float):
        return float(label)
    raise ValueError(f"label {label!r}: expected a number, as of a regression.")
