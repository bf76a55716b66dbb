"""``shard-00003.json``: the checksum of a shard, until all shards of a cache are there.

Any number of processes, on any machines that share the folder, may write one cache, and none waits
for another: each writes shards of its own, and beside each its sum. Whoever then finds the sums of
all shards puts them into the manifest, which completes the cache, and removes them. Several may do
so at once, for they write the same. A kill between any two of these steps costs the open shard.

A sum names the cache that it belongs to, :attr:`~fusedkd.cache.manifest.Manifest.identity`:
processes that were given other data, settings or weights do not complete each other's.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from fusedkd.cache.errors import CacheError
from fusedkd.cache.files import check_plain, replace_file
from fusedkd.cache.manifest import FileSum, Manifest, shard_name

_NAME = re.compile(r"shard-(\d{5,})\.json")
_MOST_BYTES = 1000


def save_sum(folder: Path, number: int, file: FileSum, identity: str) -> None:
    """To be called when the shard is on the disk."""
    content = {**dataclasses.asdict(file), "cache": identity}
    replace_file(_path(folder, number), json.dumps(content, indent=1) + "\n")


def known(folder: Path, manifest: Manifest) -> dict[int, FileSum]:
    """The sums of all shards that are there, by their numbers."""
    found = {} if manifest.complete else _read(folder, manifest)
    return dict(enumerate(manifest.shards)) | found


def read_sum(folder: Path, number: int, identity: str) -> FileSum | None:
    """None where there is none of this cache."""
    path = _path(folder, number)
    try:
        if check_plain(path, "") > _MOST_BYTES:
            return None
        content = json.loads(path.read_bytes())
        file = FileSum(content["name"], content["bytes"], content["sha256"])
        mine = content["cache"] == identity and file.name == shard_name(number)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return file if mine else None


def merge(folder: Path, manifest: Manifest) -> Manifest:
    """Put the sums into the manifest of a cache, if all are there; what is in it then.

    Raises:
        CacheError: another cache is there.
    """
    found: dict[int, FileSum] = {}
    there = _numbers(folder, manifest)
    if len({*there, *range(len(manifest.shards))}) == manifest.number_of_shards:
        found = _read(folder, manifest)
    now = Manifest.load(folder)  # after them: what another process has merged and removed is in it
    if now.identity != manifest.identity:
        raise CacheError(
            f"--output {folder}: another process has begun a cache of other data, weights or "
            "settings there. Give all of them the same command, and start in a new folder."
        )
    shards = dict(enumerate(now.shards)) | found
    if len(shards) < now.number_of_shards:
        return now
    whole = dataclasses.replace(now, shards=tuple(shards[n] for n in sorted(shards)))
    if whole != now:
        whole.save(folder)
    for number in there:
        _path(folder, number).unlink(missing_ok=True)
    return whole


def _numbers(folder: Path, manifest: Manifest) -> list[int]:
    """Of the shards that have a file of a sum's name."""
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    every = sorted(int(match[1]) for match in found if match)
    return [number for number in every if number < manifest.number_of_shards]


def _read(folder: Path, manifest: Manifest) -> dict[int, FileSum]:
    read = {n: read_sum(folder, n, manifest.identity) for n in _numbers(folder, manifest)}
    return {number: file for number, file in read.items() if file is not None}


def _path(folder: Path, number: int) -> Path:
    return folder / Path(shard_name(number)).with_suffix(".json")
