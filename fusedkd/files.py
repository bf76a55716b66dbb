"""Files that are whole or not there, in folders where anybody may have left something."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedkd.errors import UserError, of_the_machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STAGED = re.compile(r"[0-9a-f]{8}\.tmp")


def replace_file(path: Path, content: Any) -> None:
    """Write a file so that, whenever the power goes, there is the old one or the whole new one. No
    link is followed: one at ``path`` is replaced.

    Args:
        content: text, or what a binary file takes.

    Raises:
        UserError: it cannot be written; what was there is still there, and nothing else.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # exclusive: nothing was there, and no link
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {of_the_machine(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """:func:`replace_file` with a report for machines."""
    replace_file(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """An object; None if there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_figure(path: Path, figure: Figure, dpi: int = 130) -> None:
    """:func:`replace_file` with a figure of matplotlib, as PNG. Made without pyplot, it asks for no
    window system and leaves no global state."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    replace_file(path, picture.getvalue())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A place to write a folder's files to, in ``path``, which is missing or vacant: they are there
    when all of them are written.

    Raises:
        UserError: they cannot be written; nothing is left of them.
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
        raise UserError(f"{path} cannot be written: {said}.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A place to write a folder's files to; when all of them are written it takes the place of
    ``path``, whatever that held. Nobody finds half of them."""
    staged = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield staged
        shutil.rmtree(path, ignore_errors=True)
        staged.rename(path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def is_vacant(path: Path) -> bool:
    """Whether a folder holds nothing, but for what a killed :func:`new_folder` has left."""
    return all(_STAGED.fullmatch(entry.name) and is_folder(entry) for entry in path.iterdir())


def is_folder(path: Path) -> bool:
    """Whether it is one, and no link to one."""
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


def private_folder(kind: str) -> Path:
    """Where compiled code of one ``kind`` is kept: in ``$FUSEDKD_CACHE``, or ``fusedkd`` in the
    user's cache. Nobody else may write there, for what lies there is run.

    Raises:
        RuntimeError: somebody else can.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("FUSEDKD_CACHE") or Path(home) / "fusedkd") / kind
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.lstat()
    private = facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not private or not stat.S_ISDIR(facts.st_mode):
        raise RuntimeError(
            f"{path}: others can write here, and compiled code would be run from it: expected a "
            "folder of your own with permissions 0700. `chmod go-w` it, or set FUSEDKD_CACHE."
        )
    return path
