"""One line of JSON for each item of a step, written when it is done: a process that crashes, hangs
or loses the GPU takes one item with it."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOST = 77  # exit code of a child whose CUDA context is lost: the next one goes on
NO_TIME = "no time"

Item = dict[str, Any]  # name, s(econds), what was found; or error, wrong or skipped, and why


class Skip(Exception):
    """An item has no meaning here."""


class Journal:
    """Of one step. Items that an earlier process has written are not done again."""

    def __init__(
        self, path: Path, deadline: float, free: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self.deadline, self.free = path, deadline, free
        self.done = {item["name"] for item in items_of(path)}

    def write(self, line: Item) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def item(self, name: str, work: Callable[..., Item | None], *arguments: Any) -> None:
        """Do it, unless it is done; whatever it raises is its result."""
        if name in self.done:
            return
        self.done.add(name)
        if time.time() > self.deadline:
            self.write({"name": name, "skipped": NO_TIME})
            return
        self.write({"begin": name})
        start, lost = time.perf_counter(), False
        try:
            result = work(*arguments) or {}
        except Skip as why:
            result = {"skipped": str(why)}
        except Exception as error:
            traceback.print_exc()
            result = {"error": one_line(error)}
            lost = "CUDA error" in str(error) or "device-side assert" in str(error)
        self.write({"name": name, "s": round(time.perf_counter() - start, 3), **result})
        if lost:
            os._exit(LOST)
        if "error" in result:
            with contextlib.suppress(Exception):
                self.free()


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def lines_of(path: Path) -> list[Item]:
    """All whole lines; a child that is killed may leave half of one."""
    lines = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def items_of(path: Path) -> list[Item]:
    return [line for line in lines_of(path) if "name" in line]


def flaw(item: Item) -> str | None:
    """What is wrong with it."""
    return item.get("error") or item.get("wrong")
