"""Real text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Tests and installed packages differ between installations; the last two are generated tables.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
FILE_BYTES = range(500, 64_000)  # a larger file would be a large part of its split


def stdlib_texts() -> list[str]:
    """One document per file, in an order that only the files' names decide."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not LEFT_OUT & set(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    texts = []
    for name in names:
        raw = (root / name).read_bytes()
        if len(raw) in FILE_BYTES:
            texts.append(raw.decode("utf-8", errors="replace"))
    return texts
