"""``manifest.json``: what a cache holds, from what it was made, and the checksums of its files.

A cache is a folder of

* ``manifest.json``: :class:`Manifest` as JSON, with the SHA-256 of everything else in it;
* ``index.arrow``: one column ``sequence`` (16 bytes each, :func:`~fusedkd.cache.keys.sequence_key`)
  and one ``tokens`` (int32): sequence n of the cache is row ``n % per_shard`` of shard
  ``n // per_shard``;
* ``shard-00000.arrow``, ...: one row per sequence with ``sequence``, ``tokens`` and the byte
  strings that :mod:`fusedkd.cache.layout` describes, as binary columns.

* ``head.safetensors``, where hidden states are kept: :mod:`fusedkd.cache.hidden`.

The ``.arrow`` files are Arrow IPC files of one record batch, not compressed, so that a memory map
is enough to read a row. ``shards`` in the manifest is there once all of them are written; until
then each has its checksum beside it (:mod:`fusedkd.cache.sums`).

A checksum tells damage, not intent: whoever writes a file can write its checksum. So nothing that
is read here is believed before it was looked at, and names are those above and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedkd.cache.errors import CacheError, Damaged, short
from fusedkd.cache.files import check_plain, replace_file
from fusedkd.cache.hidden import layout_of
from fusedkd.cache.keys import sha256
from fusedkd.cache.layout import Layout
from fusedkd.cache.policy import Policy
from fusedkd.checks import is_finite

SCHEMA = 2
NAME = "manifest.json"
INDEX = "index.arrow"
HEAD = "head.safetensors"
MOST_BYTES = 256 << 20  # of the manifest, which has some 150 for each shard
REMEDY = "The cache has to be made anew."


def shard_name(number: int) -> str:
    """Of the file."""
    return f"shard-{number:05d}.arrow"


# ---- what a field may hold ----

Check = tuple[Callable[[Any], bool], str]  # whether a value can be; what was expected


def _whole(least: int) -> Check:
    fits = lambda value: type(value) is int and least <= value < 2**63  # noqa: E731
    return fits, f"a whole number from {least} to 2^63 - 1"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # it is shown on terminals


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(is_finite, value))


_TEXT: Check = (_is_text, "text that can be printed")
_HASH: Check = (_is_hash, "a SHA-256, 64 hexadecimal digits")
_OF_FILE: dict[str, Check] = {"name": _TEXT, "bytes": _whole(0), "sha256": _HASH}
_OF_MANIFEST: dict[str, Check] = {
    "teacher": _TEXT,
    "teacher_hash": (lambda value: value is None or _is_hash(value), f"nothing or {_HASH[1]}"),
    "tokenizer_hash": _HASH,
    "vocab_size": _whole(2),
    "padded_vocab_size": _whole(2),
    "temperatures": (_are_numbers, "numbers"),
    "source": _TEXT,
    "sequences": _whole(1),
    "tokens": _whole(1),
    "per_shard": _whole(1),
}


def _check(holder: Any, checks: dict[str, Check]) -> None:
    for name, (fits, expected) in checks.items():
        if not fits(value := getattr(holder, name)):
            raise CacheError(f"{name} is {short(value)}: expected {expected}.")


# ---- the manifest ----


@dataclass(frozen=True)
class FileSum:
    """A file of the cache, as it was written.

    Raises:
        CacheError: a field is of another type, or out of range.
    """

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check(self, _OF_FILE)


@dataclass(frozen=True)
class HeadFile(FileSum):
    """The teacher's head, see :class:`fusedkd.LMHead`.

    Raises:
        CacheError: a field is of another type, or out of range.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != HEAD:
            raise CacheError(f"the head is {short(self.name)}: expected {HEAD}.")
        if not is_finite(self.logit_scale):
            raise CacheError(f"logit_scale is {short(self.logit_scale)}: expected a number.")
        if self.softcap is not None and not (is_finite(self.softcap) and self.softcap > 0):
            raise CacheError(f"softcap is {short(self.softcap)}: expected nothing, or above 0.")


@dataclass(frozen=True)
class Manifest:
    """Everything but the sequences. ``teacher_hash`` is None for a teacher that was not seen.

    Raises:
        CacheError: a field is of another type or out of range, or two contradict each other.
    """

    teacher: str
    teacher_hash: str | None
    tokenizer_hash: str
    vocab_size: int  # true: entries with an id
    padded_vocab_size: int  # columns of the teacher's logits
    temperatures: tuple[float, ...]
    policy: Policy
    source: str  # how the answers came about: dtype and batch size, or the kind of import
    sequences: int
    tokens: int
    per_shard: int
    index: FileSum
    shards: tuple[FileSum, ...] = ()
    head: HeadFile | None = None  # of hidden states

    def __post_init__(self) -> None:
        _check(self, _OF_MANIFEST)
        _ = self.layout  # their ranges
        if self.policy.hidden != (self.head is not None):
            raise CacheError(f"a head is there or not there: expected one for {self.policy}.")
        if self.vocab_size > self.padded_vocab_size:
            raise CacheError(
                f"vocab_size is {self.vocab_size}: expected at most {self.padded_vocab_size}, the "
                "padded_vocab_size."
            )
        if len(self.shards) > self.number_of_shards:
            raise CacheError(
                f"there are {len(self.shards)} shards: expected {self.number_of_shards}, of "
                f"{self.per_shard} sequences each."
            )
        if self.index.name != INDEX:
            raise CacheError(f"the index is {short(self.index.name)}: expected {INDEX}.")
        for number, file in enumerate(self.shards):
            if file.name != shard_name(number):
                raise CacheError(f"a shard is {short(file.name)}: expected {shard_name(number)}.")

    @property
    def layout(self) -> Layout:
        """How its rows are read."""
        return layout_of(self.policy, self.vocab_size, self.temperatures)

    @property
    def number_of_shards(self) -> int:
        """How many shards the complete cache has."""
        return -(-self.sequences // self.per_shard)

    @property
    def complete(self) -> bool:
        """Whether every shard has been written."""
        return len(self.shards) == self.number_of_shards

    def sequences_of(self, number: int) -> range:
        """Which of the sequences a shard holds."""
        start = number * self.per_shard
        return range(start, min(start + self.per_shard, self.sequences))

    @property
    def identity(self) -> str:
        """A hash of what the cache is to be, whatever is there of it."""
        return sha256(dataclasses.replace(self, shards=()).render())

    def render(self) -> bytes:
        """The file's content."""
        content = dataclasses.asdict(self)
        if self.head is None:
            del content["head"]
        return _render(content)

    def save(self, folder: Path) -> None:
        """Write it to ``folder``, at once."""
        replace_file(folder / NAME, self.render())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check it.

        Raises:
            CacheError: no cache there, or one of another schema.
            Damaged: it is not what was written, or not what is written.
        """
        path = folder / NAME
        if not os.path.lexists(path):
            raise CacheError(
                f"{folder}: no teacher cache there, for it has no {NAME}. `fusedkd cache` makes it."
            )
        content, schema = _read(path)
        if type(schema) is not int or schema != SCHEMA:
            raise CacheError(
                f"{path}: schema {short(schema)}, but this version of fusedkd reads {SCHEMA}. Make "
                "the cache anew, in another folder, or read it with the version that made it."
            )
        try:
            return _parsed(content)
        except (CacheError, RecursionError) as error:
            raise Damaged(f"{path} is damaged: {error} {REMEDY}") from None


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """(content, schema) of a manifest that is what was written."""
    if (size := check_plain(path, REMEDY)) > MOST_BYTES:
        raise Damaged(f"{path} is damaged: {size:,} bytes are no manifest's. {REMEDY}")
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        found, schema = content.pop("sha256"), content.pop("schema")
        intact = _render(content, schema) == raw and isinstance(found, str)
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Damaged(f"{path} is damaged: its checksum differs. {REMEDY}")
    return content, schema


def _parsed(content: dict[str, Any]) -> Manifest:
    head = HeadFile(**_exactly(content["head"], HeadFile)) if "head" in content else None
    values = _exactly({**content, "head": head}, Manifest)
    for name in ("temperatures", "shards"):
        if not isinstance(values[name], list):
            raise CacheError(f"{name} is {short(values[name])}: expected a list.")
    values["temperatures"] = tuple(values["temperatures"])
    values["policy"] = Policy(**_exactly(values["policy"], Policy))
    values["index"] = FileSum(**_exactly(values["index"], FileSum))
    values["shards"] = tuple(FileSum(**_exactly(shard, FileSum)) for shard in values["shards"])
    return Manifest(**values)


def _exactly(value: Any, kind: Any) -> dict[str, Any]:
    """A JSON object with the keys of a dataclass, and no others."""
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        keys = sorted(value) if isinstance(value, dict) else value
        odd = sorted(names ^ set(value)) if isinstance(value, dict) else keys
        raise CacheError(
            f"the keys of a {kind.__name__} are not those that it has, see {short(odd)}: expected "
            f"{', '.join(sorted(names))}."
        )
    return dict(value)


def _render(content: dict[str, Any], schema: int = SCHEMA) -> bytes:
    """The only bytes that stand for this content, so that any other bytes are damage."""
    body = {"schema": schema, **content}
    checksum = sha256(json.dumps(body, sort_keys=True).encode())
    return (json.dumps({**body, "sha256": checksum}, indent=1) + "\n").encode()
