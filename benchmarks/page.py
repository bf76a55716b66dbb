"""The part of docs/performance.md that programs write: what is known of GPUs."""

from __future__ import annotations

import re
from pathlib import Path

from fusedkd.files import replace_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/performance.md"
MARKED = re.compile(r"(<!-- gpu: written by programs -->\n).*?(\n<!-- /gpu -->)", re.S)


def replace(text: str, root: Path = ROOT) -> None:
    """Put ``text`` there.

    Raises:
        ValueError: the page has no such part.
    """
    path = root / PAGE
    old = path.read_text()
    if not MARKED.search(old):
        raise ValueError(
            f"{path} has no <!-- gpu: written by programs --> ... <!-- /gpu --> to write into."
        )
    replace_file(path, MARKED.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", old))
