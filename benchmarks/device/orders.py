"""What a child process is told, how it is started, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from .journal import Skip


@dataclass(frozen=True)
class Orders:
    """Plain data, as JSON has it."""

    what: str  # a step, or one of child.INNER
    device: str  # "cuda", or "cpu": a dry run
    root: str  # the checkout; "": there is none, the package is installed
    state: str  # caches and journals
    deadline: float  # time.time() after which no further item is begun
    part: str = ""
    faults: tuple[str, ...] = ()  # "smoke=hang": to try the safety nets

    @property
    def journal(self) -> Path:
        return Path(self.state) / f"{self.what}{self.part.replace('/', '-')}.jsonl"

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def but(self, **changes: Any) -> Orders:
        return replace(self, faults=(), **changes)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "fusedkd.benchmarks.device.child", json.dumps(asdict(self))]


def start(
    command: list[str], output: IO[str] | int | None, session: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """``output``: where both of its streams go; None: where ours go. ``session``: one of its own,
    so that it can be ended with all that it has started, even when it is gone itself."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, start_new_session=session, text=True,
        stderr=None if output is None else subprocess.STDOUT, errors="replace",
        env={**os.environ, **environment},
    )  # fmt: skip


def output_of(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit code and output, which goes into the log too.

    Raises:
        Skip: not ready in time; the whole family has ended.
    """
    process = start(command, subprocess.PIPE, **environment)
    try:
        text, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        end(process.pid)
        text, _ = process.communicate()
        print(text[-4000:], flush=True)
        raise Skip(f"not ready after {seconds:.0f} s") from None
    print(text[-20000:], flush=True)
    return process.returncode, text


def end(pid: int) -> None:
    """The process, its session, and descendants in sessions of their own (inductor's)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    family = [pid]
    for member in family:  # grows as it goes
        family += children.get(member, [])
    for kill, member in [(os.killpg, pid), *((os.kill, member) for member in family)]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(member, signal.SIGKILL)


def tool(name: str) -> str:
    """Where one of NVIDIA's tools is.

    Raises:
        Skip: nowhere.
    """
    places = [
        *Path("/usr/local").glob(f"cuda*/bin/{name}"),
        *Path("/usr/local").glob(f"cuda*/{name}/{name}"),
        *Path("/opt/nvidia").glob(f"*/*/{name}"),
    ]
    if where := shutil.which(name) or next(map(str, places), None):
        return where
    raise Skip(f"{name} is not there")
