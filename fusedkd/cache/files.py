"""Files that are whole or not there, in folders where anybody may have left something."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedkd.cache.errors import CacheError, Damaged
from fusedkd.errors import of_the_machine

__all__ = ["check_plain", "is_vacant", "leftovers", "new_folder", "replace_file"]

_OF_CACHES = re.compile(r"(manifest\.json|index\.arrow|shard-\d{5,}\.arrow)(\.[0-9a-f]{8})?\.tmp")
_STAGED = re.compile(r"[0-9a-f]{8}\.tmp")


def replace_file(path: Path, data: Any) -> None:
    """Write a file so that, whenever the power goes, there is the old one or the whole new one. No
    link is followed: one at ``path`` is replaced.

    Raises:
        CacheError: it cannot be written; what was there is still there, and nothing else.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # exclusive: nothing was there, and no link
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {of_the_machine(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A place to write a folder's files to, in ``path``, which is missing or vacant: they are there
    when all of them are written.

    Raises:
        CacheError: they cannot be written; nothing is left of them.
    """
    made = [place for place in (path, *path.parents) if not place.exists()]
    staged = path / f"{secrets.token_hex(4)}.tmp"
    try:
        staged.mkdir(parents=True)
        yield staged
        for file in list(staged.iterdir()):
            os.replace(file, path / file.name)
        made = []
        _sync_folder(path)
    except Exception as error:
        if (said := of_the_machine(error)) is None:
            raise
        raise CacheError(f"{path} cannot be written: {said}.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def is_vacant(path: Path) -> bool:
    """Whether a folder holds nothing, but for what a killed :func:`new_folder` has left."""
    return all(_STAGED.fullmatch(entry.name) and _is_folder(entry) for entry in path.iterdir())


def leftovers(folder: Path) -> list[Path]:
    """What killed runs left of files that :func:`replace_file` was writing to a cache, or what has
    their names; links among them."""
    return [p for p in folder.iterdir() if _OF_CACHES.fullmatch(p.name) and not _is_folder(p)]


def check_plain(path: Path, remedy: str) -> int:
    """The size of a file that is nothing else: no link, folder or pipe.

    Raises:
        Damaged: it is something else, or not there.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise Damaged(f"{path} is missing ({error.strerror}). {remedy}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no file"
        raise Damaged(f"{path} is {kind}: expected a plain file, as a cache has. {remedy}")
    return found.st_size


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _sync_folder(folder: Path) -> None:
    """Make renames in it last."""
    if os.name == "nt":  # has no handles of folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
