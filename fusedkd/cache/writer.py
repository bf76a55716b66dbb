"""Writing a cache shard by shard, so that being killed costs no more than the open shard; by one
process, or by several that each write shards of their own (:mod:`fusedkd.cache.sums`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fusedkd.cache.errors import CacheError, Damaged, short
from fusedkd.cache.files import leftovers, replace_file
from fusedkd.cache.head import SavedHead, open_head
from fusedkd.cache.keys import KEY_BYTES, sha256
from fusedkd.cache.manifest import HEAD, INDEX, NAME, FileSum, Manifest, shard_name
from fusedkd.cache.shard import Index, index_bytes, open_index, open_shard, shard_bytes
from fusedkd.cache.sums import known, merge, read_sum, save_sum

SHARD_BYTES = 64 << 20  # what is lost at most; a checksum over it takes about 50 ms

Rows = Iterable[Mapping[str, bytes]]
Progress = Callable[[int], Any]


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


@dataclass(frozen=True)
class Share:
    """Which shards of a cache a process writes: every ``world``-th, from ``rank`` on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_torchrun(cls) -> Share:
        """Of the process that torchrun, or what sets the same variables, has started."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @classmethod
    def of_group(cls) -> Share:
        """Of this process in torch.distributed's group, where there is one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def numbers(self, shards: int) -> range:
        """Of so many."""
        return range(self.rank, shards, self.world)


ALONE = Share()


class Writer:
    """A cache that is being written: a new one, or one that is gone on with.

    Shards hold the plan's sequences in order, ``manifest.per_shard`` each. What they contain must
    depend on their number alone, so that runs that were killed, of any number of processes, and one
    that was not leave the same bytes.

    Args:
        folder: made where it is missing.
        plan: all the sequences.
        facts: the manifest's fields but the counts, the index, the shards and the head.
        head: the teacher's, where hidden states are kept.
        share: which of the shards are this process' own.

    Raises:
        CacheError: the folder holds a cache made with other settings or data, or other files.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        facts: Mapping[str, Any],
        head: SavedHead | None = None,
        share: Share = ALONE,
    ) -> None:
        self.folder, self.plan, self.share = folder, plan, share
        index = index_bytes(plan.keys, plan.lengths)
        self.manifest = Manifest(
            **facts,
            sequences=len(plan.keys),
            tokens=sum(plan.lengths),
            index=FileSum(INDEX, index.size, sha256(index)),
            head=None if head is None else head.file,
        )
        folder.mkdir(parents=True, exist_ok=True)
        if self._is_new():
            replace_file(folder / INDEX, index)
            if head is not None:
                replace_file(folder / HEAD, head.data)
            # Nobody's shards can be complete before this process has written its own: so this
            # replaces no more than what another one begins at the same time.
            self.manifest.save(folder)
        else:
            self._go_on()
        self._restore(index, head)

    def _is_new(self) -> bool:
        ours = {INDEX, HEAD, *(path.name for path in leftovers(self.folder))}
        foreign = sorted({path.name for path in self.folder.iterdir()} - ours)
        if os.path.lexists(self.folder / NAME):  # by now: looked at last
            return False
        if foreign:
            raise CacheError(
                f"--output {self.folder}: there is {foreign[0]} but no cache; expected a new or "
                "empty folder."
            )
        return True

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
        """The numbers of this process' shards that are still to be written, or are damaged."""
        keys = np.frombuffer(b"".join(self.plan.keys), f"S{KEY_BYTES}")
        index = Index(keys, np.asarray(self.plan.lengths, np.int32))
        mine = self.share.numbers(self.manifest.number_of_shards)
        return [number for number in mine if not self._is_there(number, index)]

    def _is_there(self, number: int, index: Index) -> bool:
        sums = [read_sum(self.folder, number, self.manifest.identity)]
        sums += self.manifest.shards[number : number + 1]
        for expected in sums:
            if expected is not None:
                with suppress(Damaged):
                    open_shard(self.folder, self.manifest, number, expected, index)
                    return True
        return False

    def check_space(self, missing: Sequence[int]) -> None:
        """
        Raises:
            CacheError: the disk is too small for these shards and those of the other processes.
        """
        absent = {*range(self.manifest.number_of_shards)} - {*known(self.folder, self.manifest)}
        absent |= {*missing}
        needed = self.tokens_of(absent) * self.manifest.layout.most_bytes_per_token
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"--output {self.folder}: up to {needed / 1e9:.1f} GB are still to be written, but "
                f"the disk has {free / 1e9:.1f} GB left. Keep less (--top-k, --sample) or choose "
                "another disk."
            )

    def tokens_of(self, numbers: Iterable[int]) -> int:
        """In these shards."""
        return sum(self.plan.lengths[i] for n in numbers for i in self.sequences_of(n))

    def sequences_of(self, number: int) -> range:
        """Which of the plan's sequences a shard holds."""
        return self.manifest.sequences_of(number)

    def write(self, number: int, rows: Rows) -> None:
        """Write one shard, from its sequences' columns in order; it is on the disk on return."""
        span = self.sequences_of(number)
        part = slice(span.start, span.stop)
        write_shard(
            *(self.folder, self.manifest, number),
            Plan(self.plan.keys[part], self.plan.lengths[part]),
            rows,
        )

    def finish(self) -> bool:
        """To be called when this process' shards are written: whether those of all others are too,
        so that the cache is complete."""
        self.manifest = merge(self.folder, self.manifest)
        return self.manifest.complete


def write_shard(folder: Path, manifest: Manifest, number: int, part: Plan, rows: Rows) -> None:
    """Write a shard of a cache that was begun; it is on the disk on return."""
    data = shard_bytes(part.keys, part.lengths, manifest.layout.columns, list(rows))
    name = shard_name(number)
    replace_file(folder / name, data)
    save_sum(folder, number, FileSum(name, data.size, sha256(data)), manifest.identity)


def _shown(value: Any) -> str:
    return short(value.sha256 if isinstance(value, FileSum) else value)


def write_cache(
    folder: Path,
    plan: Plan,
    facts: Mapping[str, Any],
    rows: Callable[[range], Rows],
    head: SavedHead | None = None,
    share: Share = ALONE,
    progress: Progress = lambda tokens: None,
) -> bool:
    """Write a cache, or what is missing or damaged of this process' share of it.

    Args:
        rows: from numbers of the plan's sequences to their columns.
        progress: called with the tokens of the share's shards that were there before.
        folder, plan, facts, head, share: of :class:`Writer`.

    Returns:
        Whether it is complete. Where other processes are still writing, it is not.

    Raises:
        CacheError: another command writes there, the folder holds something else, or the disk is
            too small.
    """
    shards = -(-len(plan.keys) // facts["per_shard"])
    if not share.numbers(shards):  # more processes than shards
        return False
    with held(folder, share):
        writer = Writer(folder, plan, facts, head, share)
        missing = writer.missing()
        writer.check_space(missing)
        progress(writer.tokens_of(share.numbers(shards)) - writer.tokens_of(missing))
        for number in missing:
            writer.write(number, rows(writer.sequences_of(number)))
        return writer.finish()


@contextmanager
def held(folder: Path, share: Share = ALONE) -> Iterator[None]:
    """Make the folder, where it is missing, and hold it, so that no other command writes to it.
    Who leaves it last removes what killed runs have left of single files.

    Raises:
        CacheError: another command does, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if os.name == "nt" else os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CacheError(f"--output {folder} cannot be written to: {error.strerror}.") from error
    try:
        if handle is not None and _lock(handle, alone=share.world == 1) is False:
            raise CacheError(f"--output {folder}: another process is writing to it.")
        yield
        if share.world == 1 or (handle is not None and _lock(handle, alone=True)):
            for path in leftovers(folder):
                path.unlink(missing_ok=True)
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, alone: bool) -> bool | None:
    """Without waiting; several hold it that are not alone. None where the file system of some
    cluster has no locks."""
    import fcntl

    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
