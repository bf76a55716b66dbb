"""A cache filled by a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fusedkd.cache.build import Ids, plan
from fusedkd.cache.writer import ALONE, SHARD_BYTES, Progress, Share, per_shard, write_cache
from fusedkd.teachers.served import Columns, ServedTeacher


def fill(
    folder: Path,
    sequences: Sequence[Ids],
    teacher: ServedTeacher,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda tokens: None,
    share: Share = ALONE,
) -> bool:
    """Write a cache, or what is missing or damaged of it; what the teacher's store has is not asked
    for.

    Args:
        folder: of the cache.
        sequences: token ids, without padding. Repeats are kept once.
        shard_bytes: about the size of a file.
        progress: called with the number of tokens done since the last call.
        share: of this process, where several fill the cache.

    Returns:
        Whether it is complete. Where other processes are still writing, it is not.

    Raises:
        CacheError: as :func:`fusedkd.cache.build.build`.
        TeacherError: no server gives a good answer.
    """
    found, first = plan(sequences, teacher.tokenizer_hash)
    layout, served = teacher.layout, teacher.served
    facts = {
        "teacher": served.model,
        "teacher_hash": None,
        "tokenizer_hash": teacher.tokenizer_hash,
        "vocab_size": layout.vocab_size,
        "padded_vocab_size": layout.vocab_size,
        "temperatures": layout.temperatures,
        "policy": layout.policy,
        "source": f"served by {served.protocol.name}",
        "per_shard": per_shard(found, layout.most_bytes_per_token, shard_bytes),
    }

    def asked(numbers: range) -> Iterator[np.ndarray]:
        for number in numbers:
            ids = np.asarray(sequences[first[number]])
            progress(len(ids))
            yield ids

    def rows(numbers: range) -> Iterator[Columns]:
        return teacher.columns(asked(numbers))

    return write_cache(folder, found, facts, rows, None, share, progress)
