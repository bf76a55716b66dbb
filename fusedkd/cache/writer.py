"""Writing a cache shard by shard, so that being killed costs no more than the open shard."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusedkd.cache.errors import CacheError, Damaged, short
from fusedkd.cache.files import leftovers, replace_file
from fusedkd.cache.head import SavedHead, open_head
from fusedkd.cache.keys import KEY_BYTES, sha256
from fusedkd.cache.manifest import HEAD, INDEX, NAME, FileSum, Manifest, shard_name
from fusedkd.cache.shard import Index, index_bytes, open_index, open_shard, shard_bytes

SHARD_BYTES = 64 << 20  # what is lost at most; a checksum over it takes about 50 ms


@dataclass(frozen=True)
class Plan:
    """The sequences of a cache in the order in which they are written: ``keys`` without repeats."""

    keys: Sequence[bytes]
    lengths: Sequence[int]


def per_shard(
    plan: Plan, bytes_per_token: float, shard_bytes: int = SHARD_BYTES, of: int = 1
) -> int:
    """How many sequences make a shard of about ``shard_bytes``: a multiple of ``of``, so that
    batches end where shards do."""
    longest = max(plan.lengths)
    return max(1, int(shard_bytes / (bytes_per_token * longest)) // of) * of


class Writer:
    """A cache that is being written: a new one, or one that is gone on with.

    Shards hold the plan's sequences in order, ``manifest.per_shard`` each. What they contain must
    depend on their number alone, so that a run that was killed and one that was not leave the same
    bytes.

    Args:
        folder: made where it is missing.
        plan: all the sequences.
        facts: the manifest's fields but the counts, the index, the shards and the head.
        head: the teacher's, where hidden states are kept.

    Raises:
        CacheError: the folder holds a cache made with other settings or data, or other files.
    """

    def __init__(
        self, folder: Path, plan: Plan, facts: Mapping[str, Any], head: SavedHead | None = None
    ) -> None:
        self.folder, self.plan = folder, plan
        index = index_bytes(plan.keys, plan.lengths)
        self.manifest = Manifest(
            **facts,
            sequences=len(plan.keys),
            tokens=sum(plan.lengths),
            index=FileSum(INDEX, index.size, sha256(index)),
            head=None if head is None else head.file,
        )
        folder.mkdir(parents=True, exist_ok=True)
        left = leftovers(folder)  # of a run that was killed
        if os.path.lexists(folder / NAME):
            self._go_on()
        else:
            self._check_empty({INDEX, HEAD, *(path.name for path in left)})
            replace_file(folder / INDEX, index)
            if head is not None:
                replace_file(folder / HEAD, head.data)
            self.manifest.save(folder)
        for path in left:
            path.unlink(missing_ok=True)
        self._restore(index, head)

    def _check_empty(self, known: set[str]) -> None:
        if foreign := sorted({path.name for path in self.folder.iterdir()} - known):
            raise CacheError(
                f"--output {self.folder}: there is {foreign[0]} but no cache; expected a new or "
                "empty folder."
            )

    def _go_on(self) -> None:
        found = Manifest.load(self.folder)
        for field in fields(Manifest):
            was, now = getattr(found, field.name), getattr(self.manifest, field.name)
            if field.name != "shards" and was != now:
                what = "the data" if field.name in ("index", "sequences", "tokens") else field.name
                raise CacheError(
                    f"--output {self.folder}: the cache there was begun with another {what} "
                    f"({_shown(was)}, now {_shown(now)}). Give the same command to go on with it, "
                    "or another folder."
                )
        self.manifest = found

    def _restore(self, index: Any, head: SavedHead | None) -> None:
        try:
            open_index(self.folder, self.manifest)
        except Damaged:
            replace_file(self.folder / INDEX, index)
        if head is None:
            return
        try:
            open_head(
                self.folder, head.file, self.manifest.padded_vocab_size, self.manifest.layout.k
            )
        except Damaged:
            replace_file(self.folder / HEAD, head.data)

    def missing(self) -> list[int]:
        """The numbers of the shards that are still to be written, or are damaged."""
        keys = np.frombuffer(b"".join(self.plan.keys), f"S{KEY_BYTES}")
        index = Index(keys, np.asarray(self.plan.lengths, np.int32))
        numbers = range(self.manifest.number_of_shards)
        return [n for n in numbers if not self._is_there(n, index)]

    def _is_there(self, number: int, index: Index) -> bool:
        if number >= len(self.manifest.shards):
            return False
        try:
            open_shard(self.folder, self.manifest, number, index)
        except Damaged:
            return False
        return True

    def sequences_of(self, number: int) -> range:
        """Which of the plan's sequences a shard holds."""
        return self.manifest.sequences_of(number)

    def write(self, number: int, rows: Iterable[Mapping[str, bytes]]) -> None:
        """Write one shard, from its sequences' columns in order; it is on the disk on return."""
        span = self.sequences_of(number)
        data = shard_bytes(
            self.plan.keys[span.start : span.stop],
            self.plan.lengths[span.start : span.stop],
            self.manifest.layout.columns,
            list(rows),
        )
        replace_file(self.folder / shard_name(number), data)
        shards = list(self.manifest.shards)
        shards[number : number + 1] = [FileSum(shard_name(number), data.size, sha256(data))]
        self.manifest = replace(self.manifest, shards=tuple(shards))
        self.manifest.save(self.folder)


def _shown(value: Any) -> str:
    return short(value.sha256 if isinstance(value, FileSum) else value)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, where it is missing, and hold it, so that no second process writes to it.

    Raises:
        CacheError: another one does, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if os.name == "nt" else os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CacheError(f"--output {folder} cannot be written to: {error.strerror}.") from error
    try:
        if handle is not None:
            _lock(folder, handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, handle: int) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CacheError(f"--output {folder}: another process is writing to it.") from None
