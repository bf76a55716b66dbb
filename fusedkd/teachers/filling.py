"""A cache filled by a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fusedkd.cache.build import Ids, Progress, plan
from fusedkd.cache.writer import SHARD_BYTES, Writer, only_writer, per_shard
from fusedkd.teachers.served import Columns, ServedTeacher


def fill(
    folder: Path,
    sequences: Sequence[Ids],
    teacher: ServedTeacher,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda tokens: None,
) -> None:
    """Write a cache, or what is missing or damaged of it; what the teacher's store has is not asked
    for.

    Args:
        folder: of the cache.
        sequences: token ids, without padding. Repeats are kept once.
        shard_bytes: about the size of a file.
        progress: called with the number of tokens done since the last call.

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

    def rows(number: int) -> Iterator[Columns]:
        return teacher.columns(asked(writer.sequences_of(number)))

    with only_writer(folder):
        writer = Writer(folder, found, facts)
        missing = writer.missing()
        left = sum(sum(found.lengths[i] for i in writer.sequences_of(n)) for n in missing)
        progress(writer.manifest.tokens - left)
        for number in missing:
            writer.write(number, rows(number))
