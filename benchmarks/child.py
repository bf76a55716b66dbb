"""Work in a process of its own, for its memory's sake. Run as a module it is that process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ChildFailed(RuntimeError):
    """No answer came; the message has the last line of what the process said."""


def in_child(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """What a module's ``function(*arguments)`` returns in a fresh process: both are plain data, as
    JSON has them. What it prints is not shown.

    Raises:
        ChildFailed: it took more than ``timeout`` seconds, or ended otherwise than by returning.
    """
    spec = sys.modules[function.__module__].__spec__  # has the name of what runs as __main__, too
    assert spec is not None
    command = [sys.executable, "-m", f"{__package__}.child", spec.name, function.__name__]
    environment = dict(os.environ)
    if __package__ == "benchmarks":
        root, paths = str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([root, *([paths] if paths else [])])
    try:
        done = subprocess.run(
            [*command, json.dumps(arguments)], env=environment, timeout=timeout,
            capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"took more than {timeout:g} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ChildFailed(f"the child process ended with {done.returncode}: {last[:200]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name, call = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        answer = getattr(importlib.import_module(module), name)(*json.loads(call))
    print(json.dumps(answer))
