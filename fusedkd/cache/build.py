"""Running a teacher over sequences, once each, into a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedkd.cache.actual import ActualLayout, actual_log_probs
from fusedkd.cache.errors import CacheError
from fusedkd.cache.head import SavedHead
from fusedkd.cache.hidden import HiddenLayout
from fusedkd.cache.keys import sequence_key
from fusedkd.cache.layout import Layout
from fusedkd.cache.manifest import Manifest
from fusedkd.cache.summary import summarize
from fusedkd.cache.writer import (
    ALONE,
    SHARD_BYTES,
    Plan,
    Progress,
    Share,
    Writer,
    held,
    per_shard,
    write_cache,
    write_shard,
)
from fusedkd.distributions import LMHead

Ids = Sequence[int] | np.ndarray
Answer = Callable[[Tensor], Tensor | LMHead]


@dataclass(frozen=True)
class Job:
    """What a cache is made from, and how.

    Args:
        sequences: token ids, without padding; any number of lengths. Repeats are kept once.
        layout: what is kept of the teacher's answers.
        facts: ``teacher``, ``teacher_hash``, ``tokenizer_hash``, ``padded_vocab_size`` of
            :class:`~fusedkd.cache.manifest.Manifest`, and ``dtype``.
        batch_size: sequences of one length in a forward pass.
        shard_bytes: about the size of a file; no more than one is lost to an interruption.
        head: the teacher's, where the layout keeps hidden states.
    """

    sequences: Sequence[Ids]
    layout: Layout
    facts: dict[str, Any]
    batch_size: int = 8
    shard_bytes: int = SHARD_BYTES
    head: LMHead | None = None


def build(
    folder: Path,
    job: Job,
    answer: Answer,
    progress: Progress = lambda tokens: None,
    share: Share = ALONE,
) -> bool:
    """Write the cache, or what is missing or damaged of it.

    Args:
        folder: of the cache.
        job: see there. The same job gives the same bytes, however often it is interrupted, and
            however many processes share it.
        answer: input ids (B, L) to logits (B, L, columns), or a head with hidden states (B, L, H).
        progress: called with the number of tokens that have been done since the last call; those
            of shards that were there before come first.
        share: of this process, where several are given the same job.

    Returns:
        Whether it is complete. Where other processes are still writing, it is not.

    Raises:
        CacheError: another command writes there, the folder holds something else, the disk is too
            small, or the teacher answers with NaN.
    """
    found, first, facts, head = _outline(job)

    def rows(numbers: range) -> Iterator[dict[str, bytes]]:
        ids = [job.sequences[first[i]] for i in numbers]
        return _rows(
            ids,
            job.layout,
            found.keys[numbers.start : numbers.stop],
            job.batch_size,
            answer,
            progress,
        )

    return write_cache(folder, found, facts, rows, head, share, progress)


@contextmanager
def begun(folder: Path, job: Job) -> Iterator[Iterator[tuple[int, list[Ids]]]]:
    """A cache, new or gone on with, for an engine that hands work out to processes of its own.

    Gives the shards that are missing or damaged, their numbers and sequences, which
    :func:`answer_shard` is to write, wherever and in whichever order, before the block ends.

    Raises:
        CacheError: as :func:`build`; or at the end of the block, that shards are missing still.
    """
    found, first, facts, head = _outline(job)
    with held(folder):
        writer = Writer(folder, found, facts, head)
        missing = writer.missing()
        writer.check_space(missing)
        yield (
            (number, [job.sequences[first[i]] for i in writer.sequences_of(number)])
            for number in missing
        )
        if not writer.finish():
            raise CacheError(f"{folder}: not all shards were written. The same again goes on.")


def answer_shard(
    folder: Path, number: int, sequences: Sequence[Ids], answer: Answer, batch_size: int = 8
) -> None:
    """Write a shard of a cache that has :func:`begun`.

    Args:
        folder, number, sequences: as they come from there.
        answer, batch_size: as in :func:`build`.
    """
    manifest = Manifest.load(folder)
    keys = [sequence_key(ids, manifest.tokenizer_hash) for ids in sequences]
    rows = _rows(sequences, manifest.layout, keys, batch_size, answer)
    write_shard(folder, manifest, number, Plan(keys, [len(ids) for ids in sequences]), rows)


def _outline(job: Job) -> tuple[Plan, list[int], dict[str, Any], SavedHead | None]:
    """The plan, where its sequences are in the job, and what the manifest says."""
    found, first = plan(job.sequences, job.facts["tokenizer_hash"])
    size = job.layout.most_bytes_per_token
    facts = {
        **{name: value for name, value in job.facts.items() if name != "dtype"},
        "vocab_size": job.layout.vocab_size,
        "temperatures": job.layout.temperatures,
        "policy": job.layout.policy,
        "source": f"{job.facts['dtype']} forward passes of {job.batch_size} sequences",
        "per_shard": per_shard(found, size, job.shard_bytes, of=job.batch_size),
    }
    return found, first, facts, None if job.head is None else SavedHead.of(job.head)


def plan(sequences: Iterable[Ids], tokenizer: str) -> tuple[Plan, list[int]]:
    """The different sequences in the order of their first appearance, and where that was.

    Raises:
        CacheError: there are none.
    """
    places: dict[bytes, int] = {}
    lengths = []
    for place, ids in enumerate(sequences):
        key = sequence_key(ids, tokenizer)
        if key not in places and len(ids):
            places[key] = place
            lengths.append(len(ids))
    if not places:
        raise CacheError("the data hold no sequence: nothing to cache.")
    return Plan(list(places), lengths), list(places.values())


def _rows(
    sequences: Sequence[Ids],
    layout: Layout,
    keys: Sequence[bytes],
    batch_size: int,
    answer: Answer,
    progress: Progress = lambda tokens: None,
) -> Iterator[dict[str, bytes]]:
    """The columns of these sequences, in order."""
    done = 0
    for batch in _batches(sequences, batch_size):
        with torch.inference_mode():
            given = torch.as_tensor(np.stack(batch))
            answers = answer(given)
            if isinstance(layout, HiddenLayout):
                yield from map(layout.encode_states, _hidden(answers))
            elif isinstance(layout, ActualLayout):
                yield from map(layout.encode_log_probs, actual_log_probs(answers, given))
            else:
                yield from map(
                    layout.encode, summarize(answers, layout, keys[done : done + len(batch)])
                )
        done += len(batch)
        progress(sum(len(ids) for ids in batch))


def _hidden(answers: Tensor | LMHead) -> Tensor:
    if not isinstance(answers, LMHead):
        raise CacheError(NO_HEAD)
    return answers.hidden


NO_HEAD = (
    "--hidden: the teacher's logits are not those of a plain output projection, so its hidden "
    "states do not tell them. Keep entries (--top-k, --sample)."
)


def _batches(sequences: Sequence[Ids], size: int) -> Iterator[list[np.ndarray]]:
    """Neighbours of one length, at most ``size`` of them."""
    batch: list[np.ndarray] = []
    for ids in sequences:
        if batch and (len(batch) == size or len(batch[0]) != len(ids)):
            yield batch
            batch = []
        batch.append(np.asarray(ids, dtype=np.int64))
    if batch:
        yield batch
