"""Which columns of a data set are trained on, and whether they hold what they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

# Kinds of rows by the columns that they have, in the order in which they are looked for.
KINDS: dict[str, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),
}
_BESIDE: dict[str, tuple[str, ...]] = dict.fromkeys(KINDS, ("tools",))
_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
_BESIDE |= {"input_ids": ("labels", *_MASKS), "text": ()}
_ALIASES = {"conversations": "messages"}


def column_names(rows: Any) -> list[str]:
    """Of a data set, or of a stream, which may not know them before it has begun."""
    return list(rows.column_names or next(iter(rows.take(1)), {}))


def kind_of(columns: Sequence[str]) -> str:
    """Of rows whose columns have their standard names."""
    return next(kind for kind, needed in KINDS.items() if set(needed) <= set(columns))


@dataclass
class Columns:
    """Finds the columns of each source, and gives them their standard names.

    Args:
        given: names in the data by standard names, where they differ.
        kept: one that is kept beside them, under its own name.
    """

    given: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    kept: str | None = None

    def __call__(self, name: str, rows: Any) -> Any:
        """The rows with the columns of one of ``KINDS``.

        Raises:
            ValueError: it has none of them, or they hold something else.
        """
        there = column_names(rows)
        found = {ours: theirs for ours, theirs in self.given.items() if theirs in there}
        self.used |= found.keys()
        names = {ours: theirs for theirs, ours in _ALIASES.items() if theirs in there}
        names |= {column: column for column in there} | found
        kind = self._kind(name, there, names, found)
        chosen = {names[ours]: ours for ours in (*KINDS[kind], *_BESIDE[kind]) if ours in names}
        if isinstance(rows, Dataset):
            for theirs, ours in chosen.items():
                _check(name, theirs, ours, rows.data.column(theirs))
        renamed = {theirs: ours for theirs, ours in chosen.items() if theirs != ours}
        kept = [] if self.kept is None else [self.kept]
        if missing := set(kept) - set(there):
            raise ValueError(
                f"{name}: --teacher_column {missing.pop()}: there is no such column, only "
                f"{', '.join(there)}."
            )
        return rows.select_columns([*chosen, *kept]).rename_columns(renamed)

    def _kind(self, name: str, there: list[str], names: Any, asked: Any) -> str:
        fitting = [kind for kind, needed in KINDS.items() if names.keys() >= set(needed)]
        fitting.sort(key=lambda kind: -len(asked.keys() & set(KINDS[kind])))  # stable
        if not fitting:
            raise ValueError(
                f"{name} has the columns {', '.join(there)}: expected input_ids, messages, prompt "
                "(and completion) or text, or names for them (--messages_column, --prompt_column, "
                "--completion_column, --text_column)."
            )
        if not asked.keys() <= set(KINDS[fitting[0]]):
            raise ValueError(
                f"{name}: {', '.join(f'--{x}_column' for x in sorted(asked))}: expected flags for "
                "one kind of rows."
            )
        return fitting[0]

    def check_used(self) -> None:
        """
        Raises:
            ValueError: a column that was asked for is in none of the sources.
        """
        for ours, theirs in self.given.items():
            if ours not in self.used:
                raise ValueError(f"--{ours}_column {theirs}: there is no such column.")


_EXPECTED = {
    "text": "text",
    "messages": "lists of messages",
    "prompt": "text or lists of messages",
    "completion": "text or lists of messages",
}


def _check(name: str, theirs: str, ours: str, values: pa.ChunkedArray) -> None:
    """What the tokenizer and the models take, in every row."""
    if ours == "tools":
        return
    kind, expected = values.type, _EXPECTED.get(ours, "lists of whole numbers")
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if ours in ("input_ids", "labels", *_MASKS):
        fits = _is_list(kind) and pa.types.is_integer(kind.value_type)
    else:  # messages may be JSON in text
        fits = text if ours == "text" else text or _is_messages(kind)
    if values and not fits:
        raise ValueError(f"{name}: the column {theirs} holds {kind}: expected {expected}.")
    if values.null_count or (_is_list(kind) and pc.list_flatten(values).null_count):
        raise ValueError(f"{name}: the column {theirs} is empty in some row.")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_messages(kind: pa.DataType) -> bool:
    if not _is_list(kind):
        return False
    inner = kind.value_type  # datasets' Json is an extension of strings, or text
    return not (pa.types.is_integer(inner) or pa.types.is_floating(inner))
