"""Caches from answers that somebody else has collected: top-k columns, or vLLM's JSON lines.

Both become an iterable of :class:`Record` (:mod:`fusedkd.cache.records`). Only one temperature is
there, and the entropy of the whole distribution is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusedkd.cache.build import plan
from fusedkd.cache.codes import LARGEST_GAP
from fusedkd.cache.errors import CacheError
from fusedkd.cache.keys import sequence_key
from fusedkd.cache.layout import Answers, Layout
from fusedkd.cache.policy import Policy
from fusedkd.cache.records import Flat, Record, checked, read_columns, read_vllm
from fusedkd.cache.writer import Plan, Writer, held, per_shard

__all__ = ["Record", "import_records", "ranked", "read_columns", "read_vllm"]


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
    """Write a cache from records. They are read twice: for the plan and for the shards. A record
    that is not what it should be leaves nothing behind.

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
    Layout(Policy("top", 1 if k is None else k), vocab_size, (temperature,))  # in range?
    found, first, widest = _planned(read(), facts["tokenizer_hash"], vocab_size)
    layout = Layout(Policy("top", min(k or widest, vocab_size)), vocab_size, (temperature,))
    size = layout.most_bytes_per_token
    shard = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    facts = facts | {"vocab_size": vocab_size, "temperatures": layout.temperatures}
    facts |= {"policy": layout.policy, "per_shard": per_shard(found, size, **shard)}
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with held(folder), _undone(folder, made):
        writer = Writer(folder, found, facts)
        rows = (
            layout.encode(_answers(checked(record, vocab_size), layout))
            for record in _again(read(), found, first, facts["tokenizer_hash"])
        )
        missing = set(writer.missing())
        for number in range(writer.manifest.number_of_shards):
            part = list(islice(rows, len(writer.sequences_of(number))))
            if number in missing:
                writer.write(number, part)
        writer.finish()


def _planned(
    records: Iterable[Record], tokenizer: str, vocab_size: int
) -> tuple[Plan, list[int], int]:
    """The plan, the places of its records, and the most entries that a token has."""
    widest = 1

    def sequences() -> Iterator[Any]:
        nonlocal widest
        for record in records:
            flat = checked(record, vocab_size)
            widest = max(widest, int(flat.counts.max(initial=0)))
            yield flat.input_ids

    return *plan(sequences(), tokenizer), widest


def _again(
    records: Iterable[Record], found: Plan, first: list[int], tokenizer: str
) -> Iterator[Record]:
    """The records that the plan is made of, in its order.

    Raises:
        CacheError: they are others than when the plan was made.
    """
    rows, passed = iter(records), 0
    for key, place in zip(found.keys, first, strict=True):
        record = next(islice(rows, place - passed, None), None)
        passed = place + 1
        where = f"row {place}" if record is None else record.where
        if record is None or sequence_key(record.input_ids, tokenizer) != key:
            raise CacheError(
                f"{where}: its tokens were others when the same source was read before, for the "
                "plan: expected a source that gives the same rows every time."
            )
        yield record


@contextmanager
def _undone(folder: Path, made: list[Path]) -> Iterator[None]:
    """Whatever fails but the disk, where the same command can go on later, leaves no more than was
    there; ``made`` are the folders that were not."""
    before = {path.name for path in folder.iterdir()}
    try:
        yield
    except Exception as error:
        if not isinstance(error.__cause__, OSError):
            for path in folder.iterdir():
                if path.name not in before:
                    path.unlink()
            for path in made:
                with suppress(OSError):  # somebody put something there meanwhile
                    path.rmdir()
        raise


def _answers(flat: Flat, layout: Layout) -> Answers:
    shape = len(flat.counts), max(1, flat.counts.max(initial=0))
    there = np.arange(shape[1]) < flat.counts[:, None]
    ids, logs = np.full(shape, -1, np.int64), np.full(shape, -np.inf)
    ids[there], logs[there] = flat.ids, flat.logs
    return ranked(ids, logs, layout)


def ranked(ids: np.ndarray, logs: np.ndarray, layout: Layout) -> Answers:
    """What a cache keeps of entries (L, K) in any order, with -1 and -inf for nothing: sorted, cut
    to k and to what the codes reach; the rest is the tail."""
    order = np.argsort(-logs, axis=1, kind="stable")[:, : layout.k]
    ids, logs = (np.take_along_axis(part, order, 1) for part in (ids, logs))
    # the values of a declared temperature T are kept as those of T = 1 whose 1/T-th powers they are
    values = logs * layout.temperatures[0]
    with np.errstate(invalid="ignore", divide="ignore"):  # where nothing is
        beyond = ~(values[:, :1] - values <= LARGEST_GAP)
        ids[beyond], values[beyond], logs[beyond] = -1, -np.inf, -np.inf
        head = np.exp(logs).sum(1)
        odds = np.where(head < 1, np.log(head) - np.log1p(-np.minimum(head, 1)), np.inf)
    return Answers(ids, values, odds[:, None], np.full(len(ids), np.nan))
