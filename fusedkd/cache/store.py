"""Answers as they come in, in any order, from several processes: one SQLite file on a local disk.

A cache's shards are written in the order of a plan; what a server answers is worth keeping at once.
A sequence is put here before it is used, so that neither a second epoch nor a run that was killed
asks for it again. Its bytes are those of a cache's row (:mod:`fusedkd.cache.layout`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusedkd.cache.errors import CacheError, short
from fusedkd.cache.layout import Layout

NAME = "answers-{}.sqlite"  # of a machine: SQLite's locks hold on one
WAIT = 60.0  # seconds for another process to have written its row
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers
  (key BLOB PRIMARY KEY, tokens INTEGER NOT NULL, digest BLOB NOT NULL, {columns});
"""


class AnswerStore:
    """The answers of one teacher at one temperature. Safe to use from several threads and
    processes.

    Args:
        folder: made where it is missing; several machines may share it, each with a file.
        facts: what the answers depend on, by name; JSON.
        layout: how they are kept.

    Raises:
        CacheError: the folder was begun with other facts, is damaged, or cannot be written to.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], layout: Layout) -> None:
        self.folder, self.facts, self.layout = folder, dict(facts), layout
        self.path = folder / NAME.format(os.environ.get("GROUP_RANK", "0"))  # torchrun's node
        self._names = ", ".join(layout.columns)
        self._of_parents: list[sqlite3.Connection] = []  # not to be closed by a child
        self._open()
        self._check_facts()

    def _open(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(
                self.path, timeout=WAIT, isolation_level=None, check_same_thread=False
            )
            self._file.execute("PRAGMA journal_mode = WAL")  # a kill loses no row
            self._file.execute("PRAGMA synchronous = NORMAL")
            columns = ", ".join(f"{name} BLOB NOT NULL" for name in self.layout.columns)
            self._file.executescript(_TABLES.format(columns=columns))
        except OSError as error:
            raise CacheError(
                f"--teacher_answers {self.folder} cannot be written to: {error.strerror}."
            ) from error
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: object) -> CacheError:
        return CacheError(
            f"{self.path} cannot be used: {error}. Choose another folder (--teacher_answers) on a "
            "local disk; what is in this one can be asked for again."
        )

    def _check_facts(self) -> None:
        for name, value in self.facts.items():
            if (was := self.first(name, value)) != value:
                raise CacheError(
                    f"--teacher_answers {self.folder}: the answers there were given with another "
                    f"{name} ({short(was)}, now {short(value)}): expected the same, or another "
                    "folder."
                )

    def first(self, name: str, value: Any) -> Any:
        """What was said under this name when the store was begun; now, if it was nothing."""
        self._run("INSERT OR IGNORE INTO facts VALUES (?, ?)", name, json.dumps(value))
        return json.loads(self._run("SELECT value FROM facts WHERE name = ?", name)[0][0])

    def __reduce__(self) -> tuple[Callable[..., AnswerStore], tuple[Any, ...]]:
        return AnswerStore, (self.folder, self.facts, self.layout)

    def here(self) -> None:
        """To be called by the first thread of a process that may have been forked."""
        if self._process != os.getpid():
            self._of_parents.append(self._file)
            self._open()

    def _run(self, command: str, *values: Any) -> list[Any]:
        try:
            with self._lock:
                return self._file.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return int(self._run("SELECT COUNT(*) FROM answers")[0][0])

    def get(self, key: bytes, tokens: int) -> dict[str, bytes] | None:
        """The columns of a sequence; None where it is not there, or not as it was written."""
        found = self._run(f"SELECT digest, {self._names} FROM answers WHERE key = ?", key)
        if not found:
            return None
        digest, *columns = found[0]
        if digest != _digest(key, tokens, columns):
            self._run("DELETE FROM answers WHERE key = ?", key)
            return None
        return dict(zip(self.layout.columns, columns, strict=True))

    def put(self, key: bytes, tokens: int, columns: Mapping[str, bytes]) -> None:
        """Keep a sequence; it is there on return. The first that was put stays."""
        row = [columns[name] for name in self.layout.columns]
        marks = ", ".join("?" * (3 + len(row)))
        self._run(
            f"INSERT OR IGNORE INTO answers (key, tokens, digest, {self._names}) VALUES ({marks})",
            *(key, tokens, _digest(key, tokens, row), *row),
        )


def _digest(key: bytes, tokens: int, columns: list[bytes]) -> bytes:
    digest = hashlib.blake2b(key, digest_size=16)
    digest.update(tokens.to_bytes(8, "little"))
    for column in columns:
        digest.update(len(column).to_bytes(8, "little"))
        digest.update(column)
    return digest.digest()
