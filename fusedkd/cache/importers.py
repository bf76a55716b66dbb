"""Caches from answers that somebody else has collected: top-k columns, or vLLM's JSON lines.

Both become an iterable of :class:`Record`. Only one temperature is there, and the entropy of the
whole distribution is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedkd.cache.build import plan
from fusedkd.cache.codes import LARGEST_GAP
from fusedkd.cache.errors import CacheError
from fusedkd.cache.layout import Answers, Layout
from fusedkd.cache.policy import Policy
from fusedkd.cache.writer import Writer, only_writer, per_shard

__all__ = ["Record", "import_records", "read_columns", "read_vllm"]

KNOWN_COLUMNS = (  # of ids and of log-probabilities
    ("target_token_ids", "target_logprobs"),
    ("top_k_ids", "top_k_logprobs"),
    ("topk_ids", "topk_logprobs"),
    ("topk_indices", "topk_logprobs"),
    ("indices", "logprobs"),
)


class Record(NamedTuple):
    """One sequence: its token ids, and for each of them the distribution of the *next* token, as
    (ids, natural log-probabilities), in any order; nothing where it is not known."""

    where: str  # for messages: file and line, or row
    input_ids: list[int]
    entries: Sequence[tuple[Sequence[int], Sequence[float]]]


def read_vllm(path: Path) -> Iterator[Record]:
    """vLLM's answers, one JSON object per line, with ``prompt_token_ids`` and ``prompt_logprobs``
    at the top or in ``choices[0]``.

    ``prompt_logprobs[n]`` is what was expected *of* token n, so it belongs to token n - 1; the
    first is null, and what follows the last token is unknown.

    Raises:
        CacheError: a line is something else.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _vllm_record(f"{path} line {number}", line)


def _vllm_record(where: str, line: str) -> Record:
    try:
        row = json.loads(line)
        if "prompt_logprobs" not in row:
            row = {**row, **row["choices"][0]}
        ids, steps = row["prompt_token_ids"], row["prompt_logprobs"]
        entries = [_vllm_entries(step) for step in [*steps[1:], None]]
        return Record(where, [int(i) for i in ids], entries)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CacheError(
            f"{where}: expected an object with prompt_token_ids and prompt_logprobs, as vLLM "
            f"answers with prompt_logprobs=K ({type(error).__name__}: {error})."
        ) from None


def _vllm_entries(step: dict[str, Any] | None) -> tuple[list[int], list[float]]:
    items = (step or {}).items()
    values = [v["logprob"] if isinstance(v, dict) else v for _, v in items]
    return [int(token) for token, _ in items], [float(v) for v in values]


def read_columns(
    rows: Iterable[dict[str, Any]], names: tuple[str, str] | None, of_token: bool
) -> Iterator[Record]:
    """A data set with ``input_ids`` and, per token, lists of ids and of log-probabilities.

    Args:
        rows: one mapping per sequence.
        names: of the two columns; None tries the usual ones.
        of_token: entry n is what was expected of token n, not what was expected after it.

    Raises:
        CacheError: a column is missing or has another length.
    """
    for number, row in enumerate(rows):
        where = f"row {number}"
        ids_name, values_name = names or _guess(row)
        for name in ("input_ids", ids_name, values_name):
            if name not in row:
                raise CacheError(f"{where}: no column {name!r}, only {', '.join(row)}.")
        ids, entries = list(row["input_ids"]), _pairs(row[ids_name], row[values_name])
        entries = entries[1:] if of_token and len(entries) == len(ids) else entries
        if len(entries) == len(ids) - 1:
            entries.append(([], []))
        yield Record(where, ids, entries)


def _pairs(ids: Any, values: Any) -> list[tuple[Any, Any]]:
    return [([] if i is None else i, [] if v is None else v) for i, v in zip(ids, values)]  # noqa: B905


def _guess(row: dict[str, Any]) -> tuple[str, str]:
    for pair in KNOWN_COLUMNS:
        if set(pair) <= set(row):
            return pair
    raise CacheError(
        f"the columns are {', '.join(row)}: say which hold the ids and the log-probabilities with "
        "--ids-column and --logprobs-column."
    )


def import_records(
    folder: Path,
    read: Callable[[], Iterable[Record]],
    *,
    facts: dict[str, Any],
    vocab_size: int,
    temperature: float = 1.0,
    k: int | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write a cache from records. They are read twice: for the plan and for the shards.

    Args:
        folder: of the cache.
        read: starts reading them, the same every time.
        facts: as in :class:`~fusedkd.cache.build.Job`, and ``source``.
        vocab_size: the true vocabulary.
        temperature: at which the log-probabilities were made.
        k: keep at most so many entries per token; None keeps all.

    Raises:
        CacheError: a record is not what it should be, or as :func:`~fusedkd.cache.build.build`.
    """
    widest = 1

    def sequences() -> Iterator[list[int]]:
        nonlocal widest
        for record in read():
            _check(record, vocab_size)
            widest = max(widest, *(len(ids) for ids, _ in record.entries))
            yield record.input_ids

    found, first = plan(sequences(), facts["tokenizer_hash"])
    layout = Layout(Policy("top", min(k or widest, vocab_size)), vocab_size, (temperature,))
    size = layout.most_bytes_per_token
    shard = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    facts = facts | {"vocab_size": vocab_size, "temperatures": layout.temperatures}
    facts |= {"policy": layout.policy, "per_shard": per_shard(found, size, **shard)}
    wanted = set(first)
    with only_writer(folder):
        writer = Writer(folder, found, facts)
        rows = (r for n, r in enumerate(read()) if n in wanted)
        missing = set(writer.missing())
        for number in range(writer.manifest.number_of_shards):
            records = [next(rows) for _ in writer.sequences_of(number)]
            if number in missing:
                writer.write(number, (layout.encode(_answers(r, layout)) for r in records))


def _check(record: Record, vocab_size: int) -> None:
    where, ids, entries = record
    if len(entries) != len(ids):
        raise CacheError(f"{where}: {len(ids)} tokens but {len(entries)} distributions.")
    for number, (tokens, values) in enumerate(entries):
        at = f"{where}, token {number}"
        if len(tokens) != len(values):
            raise CacheError(f"{at}: {len(tokens)} ids but {len(values)} log-probabilities.")
        if len(set(tokens)) < len(tokens):
            raise CacheError(f"{at}: an id is there twice.")
        if any(not 0 <= token < vocab_size for token in tokens):
            raise CacheError(f"{at}: an id is outside 0 to {vocab_size - 1}, the vocabulary.")
        mass = float(np.exp(np.asarray(values, np.float64)).sum())
        if not mass <= 1 + 1e-3:
            raise CacheError(
                f"{at}: the probabilities sum to {mass:.4f}: expected natural log-probabilities of "
                "a softmax, which sum to 1 at most."
            )


def _answers(record: Record, layout: Layout) -> Answers:
    """Sorted, cut to k and to what the codes reach; the rest is the tail."""
    length = len(record.input_ids)
    ids = np.full((length, layout.k), -1, np.int64)
    values = np.full((length, layout.k), -np.inf)
    odds = np.full((length, 1), -np.inf)
    for row, (tokens, given) in enumerate(record.entries):
        logs = np.asarray(given, np.float64)
        order = np.argsort(-logs, kind="stable")[: layout.k]
        reach = LARGEST_GAP / layout.temperatures[0]  # codes are for T = 1
        order = order[logs[order] >= logs.max(initial=-np.inf) - reach]
        if order.size:
            ids[row, : order.size] = np.asarray(tokens)[order]
            values[row, : order.size] = logs[order]
            head = np.exp(logs[order]).sum()
            odds[row] = np.log(head) - np.log1p(-head) if head < 1 else np.inf
    # the values of a declared temperature T are kept as those of T = 1 whose 1/T-th powers they are
    values *= layout.temperatures[0]
    return Answers(ids, values, odds, np.full(length, np.nan))
