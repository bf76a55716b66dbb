"""The rows that a run trains and evaluates on, and what is known of them. ``fusedkd distill``,
``cache`` and ``data`` get the same ones for the same flags."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets
from rich.console import Console

from fusedkd.data.arguments import DataArguments
from fusedkd.data.chat import with_template
from fusedkd.data.columns import Columns, kind_of
from fusedkd.data.packing import collator
from fusedkd.data.rows import COUNTED, LABELLED, LENGTH, Encoder, encode
from fusedkd.data.sources import Part, names_and_weights, read_parts
from fusedkd.data.text import SPLIT_SEED, default_packing, packed, split
from fusedkd.errors import UserError, as_user_error

__all__ = ["Prepared", "Summary", "load_rows", "say"]

BUFFER = 1000  # rows of a stream that are shuffled among each other
LOOKED_AT = 100  # rows of a stream that are counted


@dataclass(frozen=True)
class Summary:
    """What a data set came to: rows, and tokens before they were packed."""

    rows: int
    tokens: int
    labels: int  # tokens that carry one
    longest: int
    truncated: int
    left_out: int  # rows without a label
    packed: int | None  # rows afterwards; None: of a stream
    packing: str
    max_length: int

    @property
    def streamed(self) -> bool:
        """Whether only the first rows were looked at."""
        return self.packed is None

    @property
    def share(self) -> float:
        """Of the tokens, those that carry a label."""
        return self.labels / max(self.tokens, 1)

    def __str__(self) -> str:
        tokens = f"{self.rows:,} rows, {self.tokens:,} tokens"
        if self.streamed:
            tokens = f"a stream, whose first {tokens}"
        parts = [tokens, f"{self.share:.0%} of the tokens carry a label"]
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated to {self.max_length:,} tokens")
        if self.left_out:
            parts.append(f"{self.left_out:,} left out, without a label")
        if self.packing != "none" and not self.streamed:
            parts.append(f"packed into {self.packed:,} {self._unit}")
        return "; ".join(parts)

    @property
    def _unit(self) -> str:
        return "blocks" if self.packing == "blocks" else "rows"

    def table(self) -> dict[str, str]:
        """The same, as names and values."""
        found = {
            "rows": f"{self.rows:,}{' (the first ones of a stream)' if self.streamed else ''}",
            "tokens": f"{self.tokens:,}",
            "with a label": f"{self.labels:,} ({self.share:.1%})",
            "tokens of the longest row": f"{self.longest:,}",
            "packing": self.packing,
        }
        if self.packing != "blocks":
            found[f"truncated to {self.max_length:,} tokens"] = f"{self.truncated:,}"
        if self.packing != "blocks" and not self.streamed:
            found["left out, without a label"] = f"{self.left_out:,}"
        if self.packing != "none" and not self.streamed:
            found["packing"] += (
                f", {self.packed:,} {self._unit} of up to {self.max_length:,} tokens"
            )
        return found


class Prepared(NamedTuple):
    """Rows with ``input_ids`` and ``labels``, what makes batches of them, and how they were
    packed. ``test`` is None where nothing is put aside."""

    train: Any
    test: Any
    collator: Any
    packing: str
    summary: Summary


def load_rows(flags: DataArguments, tokenizer: Any, packing: str | None = None) -> Prepared:
    """The rows of ``flags``, from :mod:`datasets`. The same flags give the same ones, which a
    teacher's cache counts on.

    Args:
        flags: see there.
        tokenizer: gets ``flags.chat_template``, so that it is saved with the student.
        packing: instead of what the flags say.

    Raises:
        UserError: missing, unreadable, empty or unfit data.
    """
    if not flags.data:
        raise UserError("--data is missing: expected files, folders or names of data sets.")
    with as_user_error(f"--chat_template {flags.chat_template}"):
        with_template(tokenizer, flags.chat_template)
    with as_user_error("--data", Exception):
        names, weights = names_and_weights(flags.data, flags.data_weights)
        train = _documents(flags, names, weights)
    with as_user_error("--eval_data", Exception):
        test = _documents(flags, flags.eval_data, None) if flags.eval_data else []
    if not test and flags.eval_share:
        train, test = _held_out(train, flags.eval_share)
    with as_user_error("--data", Exception):
        packing = packing or flags.packing or _packing(train)
        prepare = partial(_prepare, flags=flags, tokenizer=tokenizer, packing=packing)
        rows, summary = prepare(train)
    with as_user_error("--eval_data", Exception):
        held_out = prepare(test)[0] if test else None
    if flags.data_streaming:
        rows = rows.shuffle(seed=SPLIT_SEED, buffer_size=BUFFER)
    with as_user_error():
        return Prepared(rows, held_out, collator(packing, tokenizer), packing, summary)


def say(summary: Summary) -> None:
    """Print it, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        console = Console(markup=False, emoji=False, highlight=False)
        console.print(f"data: {summary}", soft_wrap=True)


def _documents(flags: DataArguments, names: list[str], weights: list[float] | None) -> list[Part]:
    given = {
        ours: theirs
        for ours in ("messages", "prompt", "completion", "text")
        if (theirs := getattr(flags, f"{ours}_column")) is not None
    }
    columns = Columns(given)
    found = read_parts(names, weights, streaming=flags.data_streaming, revision=flags.data_revision)
    parts = [Part(part.name, columns(part.name, part.rows), part.weight) for part in found]
    columns.check_used()
    return parts if weights else _merged(parts)


def _merged(parts: list[Part]) -> list[Part]:
    """Parts with the same columns as one, of whose rows a share is put aside."""
    by_columns: dict[str, list[Part]] = {}
    for part in parts:
        key = str(part.rows.features) if isinstance(part.rows, Dataset) else part.name
        by_columns.setdefault(key, []).append(part)
    return [
        same[0]
        if len(same) == 1
        else Part(same[0].name, concatenate_datasets([p.rows for p in same]))
        for same in by_columns.values()
    ]


def _held_out(parts: list[Part], share: float) -> tuple[list[Part], list[Part]]:
    """Of each source, before they are mixed: a row that is repeated is not in both."""
    pairs = [(part, split(part.rows, share)) for part in parts if not _only_prompts(part.rows)]
    if not pairs:
        return parts, []
    train = [Part(part.name, rows, part.weight) for part, (rows, _) in pairs]
    return train, [Part(part.name, rows) for part, (_, rows) in pairs if rows is not None]


def _names(rows: Any) -> list[str]:
    return list(rows.column_names or next(iter(rows.take(1))))


def _only_prompts(rows: Any) -> bool:
    return kind_of(_names(rows)) == "prompt"


def _packing(parts: list[Part]) -> str:
    found = {default_packing(_names(part.rows)): part.name for part in parts}
    if len(found) > 1:
        raise ValueError(
            f"{found['blocks']} is text, which is cut into blocks, and {found['none']} has "
            "answers, which are not: expected --packing flatten or none (long texts are truncated) "
            "or blocks (conversations are cut) for such a mixture."
        )
    return next(iter(found))


def _prepare(
    parts: list[Part], flags: DataArguments, tokenizer: Any, packing: str
) -> tuple[Any, Summary]:
    blocks = packing == "blocks"
    encoder = Encoder(
        tokenizer, flags.train_on, None if blocks else flags.max_length, joined=blocks
    )
    encoded = [encode(part.rows, encoder) for part in parts]
    rows = _mixed(encoded, [part.weight for part in parts], flags.data_stopping_strategy)
    total = len(rows) if isinstance(rows, Dataset) else 0
    if not blocks and not any(_only_prompts(part.rows) for part in parts):
        rows = rows.filter(_counts, input_columns=COUNTED, batched=True)
        if isinstance(rows, Dataset) and not len(rows):
            raise ValueError(
                "no row has an answer, or two tokens: there is nothing to learn from (see "
                "--train_on, --max_length)."
            )
    counted = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows.take(LOOKED_AT)))
    done = packed(rows, packing, flags.max_length)
    summary = _summary(counted, total, packing, flags.max_length, done)
    return done, summary


def _counts(numbers: list[int]) -> list[bool]:
    return [number > 0 for number in numbers]


def _mixed(parts: list[Any], weights: list[float | None], stopping: str) -> Any:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    shares = [weight / sum(given) for weight in given]
    return interleave_datasets(parts, shares, seed=SPLIT_SEED, stopping_strategy=stopping)  # type: ignore[arg-type]


def _summary(rows: Dataset, total: int, packing: str, most: int, done: Any) -> Summary:
    columns = rows.select_columns([LENGTH, LABELLED]).with_format("numpy")[:]
    lengths = np.asarray(columns[LENGTH], np.int64)
    kept = lengths if packing == "blocks" else np.minimum(lengths, most)
    return Summary(
        rows=len(rows),
        tokens=int(kept.sum()),
        labels=int(np.sum(columns[LABELLED])),
        longest=int(lengths.max(initial=0)),
        truncated=0 if packing == "blocks" else int((lengths > most).sum()),
        left_out=max(total - len(rows), 0),
        packed=len(done) if isinstance(done, Dataset) else None,
        packing=packing,
        max_length=most,
    )
