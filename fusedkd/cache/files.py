"""The files of a cache: written whole, read only if they are plain files."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

from fusedkd import files
from fusedkd.cache.errors import CacheError, Damaged
from fusedkd.errors import UserError

_OF_CACHES = re.compile(
    r"(manifest\.json|index\.arrow|head\.safetensors|shard-\d{5,}\.(arrow|json))"
    r"(\.[0-9a-f]{8})?\.tmp"
)


def replace_file(path: Path, content: Any) -> None:
    """:func:`fusedkd.files.replace_file`.

    Raises:
        CacheError: it cannot be written; what was there is still there, and nothing else.
    """
    try:
        files.replace_file(path, content)
    except UserError as error:
        raise CacheError(str(error)) from error.__cause__  # what the system says


def leftovers(folder: Path) -> list[Path]:
    """What killed runs left of files that :func:`replace_file` was writing to a cache, or what has
    their names; links among them."""
    return [
        path
        for path in folder.iterdir()
        if _OF_CACHES.fullmatch(path.name) and not files.is_folder(path)
    ]


def check_plain(path: Path, remedy: str) -> int:
    """The size of a file that is nothing else: no link, folder or pipe.

    Raises:
        Damaged: it is something else, or not there.
    """
    try:
        entry = path.lstat()
    except OSError as error:
        raise Damaged(f"{path} is missing ({error.strerror}). {remedy}") from None
    if not stat.S_ISREG(entry.st_mode):
        kind = "a link" if stat.S_ISLNK(entry.st_mode) else "no file"
        raise Damaged(f"{path} is {kind}: expected a plain file, as a cache has. {remedy}")
    return entry.st_size
