"""Documents on disk to rows of tokens, for one's own loop; :mod:`fusedkd.data.loading` does it for
the commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from fusedkd.data.columns import Columns, column_names, kind_of
from fusedkd.data.packing import cut_blocks, flatten
from fusedkd.data.rows import encode, encoder_for, with_labels
from fusedkd.data.sources import STDLIB, load_files, read
from fusedkd.data.two_templates import CONVERSATION

__all__ = [
    "STDLIB",
    "check_ids",
    "default_packing",
    "load_documents",
    "load_files",
    "pack",
    "packed",
    "read",
    "split",
]


def load_documents(paths: Sequence[str | Path]) -> Dataset:
    """One row per document from files or directories of them, with the columns of one of
    :data:`fusedkd.data.columns.KINDS`.

    ``.txt``, ``.md`` and ``.py`` files are one document each; the others hold one per row, under
    ``text``, ``messages`` (for the tokenizer's chat template), ``prompt`` and ``completion``, or
    ``input_ids`` with optional ``labels``. ``"stdlib"`` is the standard library of this Python.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing readable there, an unknown kind of file, or no known column.
    """
    return read(paths, Columns())


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


def default_packing(columns: Sequence[str]) -> str:
    """Text is cut into blocks; what has a prompt and an answer never is."""
    told = {"labels", "completion_mask", "assistant_masks"} & set(columns)
    whole = kind_of(columns) != "text" and (told or "input_ids" not in columns)
    return "none" if whole else "blocks"


def pack(
    documents: Dataset,
    tokenizer: Any,
    max_length: int,
    packing: str | None = None,
    train_on: str = "assistant",
) -> Dataset:
    """Tokenize documents, each with its end of text, and make rows of at most ``max_length``
    tokens of them.

    Args:
        documents: as :func:`load_documents` gives them.
        tokenizer: not needed for ``input_ids``.
        max_length: tokens.
        packing, train_on: see :class:`~fusedkd.data.arguments.DataArguments`.

    Returns:
        ``input_ids`` and ``labels``, and ``position_ids`` where they are flattened.

    Raises:
        ValueError: the documents hold fewer than two tokens, not one label per token, or no
            answer.
    """
    packing = packing or default_packing(documents.column_names)
    encoder = encoder_for(tokenizer, packing, train_on, max_length)
    rows = encode(documents, encoder)
    if not encoder.joined:
        rows = with_labels(rows)
        if not len(rows):
            raise ValueError("no row has an answer or two tokens: there is nothing to learn from.")
    return packed(rows, packing, max_length)


def packed(rows: Any, packing: str, max_length: int, kept: str | None = None) -> Any:
    """Encoded rows, as a model gets them; where they are not joined, with a column ``kept``."""
    if packing == "blocks":
        return cut_blocks(rows, max_length)
    if packing == "flatten":
        return flatten(rows, max_length)
    also = [name for name in (kept, CONVERSATION) if name in column_names(rows)]
    return rows.select_columns(["input_ids", "labels", *also])


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
