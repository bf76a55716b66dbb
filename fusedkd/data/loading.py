"""The rows that a run trains and evaluates on, and what is known of them. ``fusedkd distill``,
``cache`` and ``data`` get the same ones for the same flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets
from rich.console import Console

from fusedkd.data.arguments import DataArguments
from fusedkd.data.chat import IGNORED, with_template
from fusedkd.data.columns import Columns, column_names, kind_of
from fusedkd.data.packing import collator
from fusedkd.data.rows import LABELLED, LENGTH, Encoder, encode, encoder_for, with_labels
from fusedkd.data.sources import Part, names_and_weights, read_parts
from fusedkd.data.text import SPLIT_SEED, default_packing, packed, split
from fusedkd.errors import UserError, as_user_error

BUFFER = 1000  # rows of a stream that are shuffled among each other
LOOKED_AT = 100  # rows of a stream that are counted
PROMPTS = "prompts alone"
ENDLESS = "no special token ends an answer: the student will not learn where to stop"
LEFT_OUT = "no label, or a prompt that is too long"


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
    stops: bool = True  # whether answers end with a special token

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
            parts.append(f"{self.left_out:,} left out ({LEFT_OUT})")
        if self.packing != "none" and not self.streamed:
            parts.append(f"packed into {self.packed:,} {self._unit}")
        if not self.stops:
            parts.append(ENDLESS)
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
            found[f"left out ({LEFT_OUT})"] = f"{self.left_out:,}"
        if self.packing != "none" and not self.streamed:
            found["packing"] += (
                f", {self.packed:,} {self._unit} of up to {self.max_length:,} tokens"
            )
        if not self.stops:
            found["how answers end"] = ENDLESS
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
        documents = _documents(flags, names, weights)
        packing = packing or flags.packing or _packing(documents)
        how = packing, flags.train_on, flags.max_length, flags.conversations
        encoder = encoder_for(tokenizer, *how)
        if flags.teacher_column and packing != "none":
            raise ValueError(
                f"--teacher_column {flags.teacher_column} with packing {packing}: rows of several "
                "teachers cannot be joined: expected --packing none."
            )
        parts, left_out = _encoded(documents, encoder, flags)
    test: list[Any] = []
    if flags.eval_data:
        with as_user_error("--eval_data", Exception):
            found, _ = _encoded(_documents(flags, flags.eval_data, None), encoder, flags)
            test = [part.rows for part in found]
    elif flags.eval_share:
        parts, test = _held_out(parts, flags.eval_share)
    rows = _mixed(parts, flags.data_stopping_strategy)
    with as_user_error("--data", Exception):
        train = packed(rows, packing, flags.max_length, flags.teacher_column)
        summary = _summary(rows, left_out, packing, flags.max_length, train)
        if any("messages" in column_names(part.rows) for part in documents):
            summary = replace(summary, stops=_stops(rows, tokenizer))
    with as_user_error("--eval_data", Exception):
        column = flags.teacher_column
        held_out = packed(_joined(test), packing, flags.max_length, column) if test else None
    if flags.data_streaming:
        train = train.shuffle(seed=SPLIT_SEED, buffer_size=BUFFER)
    with as_user_error():
        return Prepared(train, held_out, collator(packing, tokenizer), packing, summary)


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
    columns = Columns(given, kept=flags.teacher_column)
    found = read_parts(names, weights, streaming=flags.data_streaming, revision=flags.data_revision)
    parts = [Part(part.name, columns(part.name, part.rows), part.weight) for part in found]
    columns.check_used()
    return parts


def _packing(parts: list[Part]) -> str:
    found = {default_packing(column_names(part.rows)): part.name for part in parts}
    if len(found) > 1:
        raise ValueError(
            f"{found['blocks']} is text, which is cut into blocks, and {found['none']} has "
            "answers, which are not: expected --packing flatten or none (long texts are truncated) "
            "or blocks (conversations are cut) for such a mixture."
        )
    return next(iter(found))


def _encoded(parts: list[Part], encoder: Encoder, flags: DataArguments) -> tuple[list[Part], int]:
    """Ids and labels, and how many rows without any were left out. Sources that are not weighted
    are one; prompts alone stay apart."""
    done: dict[Any, list[Part]] = {}
    left_out = 0
    for place, part in enumerate(parts):
        prompts = kind_of(column_names(part.rows)) == "prompt"
        try:
            rows = encode(part.rows, encoder, flags.data_num_proc, flags.teacher_column)
        except ValueError as error:
            raise ValueError(f"{part.name}: {error}") from error
        if not encoder.joined:
            kept = with_labels(rows)
            left_out += len(rows) - len(kept) if isinstance(rows, Dataset) else 0
            rows = kept
        key = (prompts, None if part.weight is None else place)
        done.setdefault(key, []).append(Part(PROMPTS if prompts else part.name, rows, part.weight))
    found = [Part(p[0].name, _joined([x.rows for x in p]), p[0].weight) for p in done.values()]
    if not any(not isinstance(part.rows, Dataset) or len(part.rows) for part in found):
        raise ValueError(
            "no row has an answer, or two tokens: there is nothing to learn from (see --train_on, "
            "--max_length)."
        )
    return found, left_out


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _held_out(parts: list[Part], share: float) -> tuple[list[Part], list[Any]]:
    """Of each source, before they are mixed: a row that is repeated is not in both. Prompts alone
    cannot be evaluated."""
    pairs = [
        (part.rows, None) if part.name == PROMPTS else split(part.rows, share) for part in parts
    ]
    train = [replace(part, rows=rows) for part, (rows, _) in zip(parts, pairs, strict=True)]
    return train, [rows for _, rows in pairs if rows is not None]


def _mixed(parts: list[Part], stopping: str) -> Any:
    given = [part.weight for part in parts if part.weight is not None]
    rows = [part.rows for part in parts]
    if not given:
        return _joined(rows)
    shares = [weight / sum(given) for weight in given]
    return interleave_datasets(rows, shares, seed=SPLIT_SEED, stopping_strategy=stopping)  # type: ignore[arg-type]


def _summary(rows: Any, left_out: int, packing: str, most: int, done: Any) -> Summary:
    if not isinstance(rows, Dataset):
        rows = Dataset.from_list(list(rows.take(LOOKED_AT)))
    columns = rows.select_columns([LENGTH, LABELLED]).with_format("numpy")[:]
    lengths = np.asarray(columns[LENGTH], np.int64)
    kept = lengths if packing == "blocks" else np.minimum(lengths, most)
    return Summary(
        rows=len(rows),
        tokens=int(kept.sum()),
        labels=int(np.sum(columns[LABELLED])),
        longest=int(lengths.max(initial=0)),
        truncated=0 if packing == "blocks" else int((lengths > most).sum()),
        left_out=left_out,
        packed=len(done) if isinstance(done, Dataset) else None,
        packing=packing,
        max_length=most,
    )


def _stops(rows: Any, tokenizer: Any) -> bool:
    """Whether one of the last tokens with a label is special, in any of the first rows."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ends = ([x for x in row["labels"] if x != IGNORED][-3:] for row in rows.take(10))
    return any(special & set(end) for end in ends)
