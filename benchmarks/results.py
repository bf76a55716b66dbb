"""What was measured and on what: rows that are plain data, files that are never half written."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .cases import Case

__all__ = ["BarResult", "GroupResult", "Report", "Row", "load", "machine", "write_atomically"]


@dataclass
class Row:
    """One provider on one case. Times in milliseconds, memory in bytes."""

    case: dict[str, Any]
    label: str
    provider: str
    forward_ms: float | None = None
    total_ms: float | None = None  # forward + backward; evaluation: forward
    p10_ms: float | None = None
    p90_ms: float | None = None
    host_ms: float | None = None  # until the call returns, without waiting for a GPU
    samples: int = 0
    floor_ms: float | None = None
    loss_error: float | None = None
    grad_error: float | None = None
    verdict: str | None = None
    peak_bytes: int | None = None
    reason: str | None = None  # why it has no time
    memory_reason: str | None = None

    def is_of(self, case: Case, provider: str) -> bool:
        return self.provider == provider and self.case == dataclasses.asdict(case)


@dataclass
class BarResult:
    """A bar of the project and what was measured against it."""

    label: str
    value: float | None
    limit: float
    at_most: bool
    unit: str = "x"

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass
class GroupResult:
    title: str
    rows: list[Row] = field(default_factory=list)
    bars: list[BarResult] = field(default_factory=list)


@dataclass
class Report:
    machine: dict[str, Any]
    command: str
    groups: list[GroupResult] = field(default_factory=list)
    end_to_end: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group.rows]

    def save_json(self, path: Path) -> None:
        data = dataclasses.asdict(self)
        for group, result in zip(data["groups"], self.groups, strict=True):
            for bar, measured in zip(group["bars"], result.bars, strict=True):
                bar["passed"] = measured.passed
        write_atomically(path, json.dumps(data, indent=1).encode())

    def save_csv(self, path: Path) -> None:
        rows = [_flat(group.title, row) for group in self.groups for row in group.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, _flat("", Row(dataclasses.asdict(Case()), "", "")).keys())
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())


def _flat(group: str, row: Row) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    return {"group": group, **fields.pop("case"), **fields}


def load(path: Path) -> Report:
    """A report that ``save_json`` wrote; ValueError says what is wrong with the file."""
    try:
        data = json.loads(path.read_text())
        groups = [
            GroupResult(
                group["title"],
                [Row(**row) for row in group["rows"]],
                [BarResult(**{k: v for k, v in b.items() if k != "passed"}) for b in group["bars"]],
            )
            for group in data["groups"]
        ]
        return Report(data["machine"], data["command"], groups, data["end_to_end"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--replot {path}: not a result of this benchmark ({type(error).__name__}: {error}). "
            "Expected the results.json of an earlier run."
        ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """A reader, or a run that is interrupted, sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


# ----------------------------------------------------------------------------------------------


def machine(device: str, threads: int | None) -> dict[str, Any]:
    """Everything that a time depends on and a reader cannot guess."""
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": _cpu_flags(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = properties.name
        info["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        info["cuda"] = torch.version.cuda or torch.version.hip
    return info


PACKAGES = (
    *("torch", "triton", "transformers", "fusedkd"),
    *("liger-kernel", "trl", "cut-cross-entropy"),
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _proc(path: str, field: str) -> str | None:
    try:
        found = re.search(rf"^{field}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found.group(1).strip() if found else None


def _cpu_model() -> str:
    return _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    """Those that decide which kernels run."""
    flags = (_proc("/proc/cpuinfo", "flags") or "").split()
    return [f for f in flags if f.startswith(("avx2", "avx512f", "avx512_bf16", "amx"))]


def _memory_gib() -> float | None:
    total = _proc("/proc/meminfo", "MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None


def _commit() -> str | None:
    """The checkout's commit, "+changes" where that is not what ran; None: installed package."""
    where = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(where), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git(
            "status", "--porcelain", "--untracked-files=no", "--", "../fusedkd", "../kernels"
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def file_name(info: dict[str, Any], end_to_end: bool = False) -> str:
    """e.g. amd-epyc-avx512-2-threads.json: one file per machine, overwritten by the next run there.
    The other suite has its own.
    """
    name = info.get("gpu") or f"{info['cpu']} {info['instruction_set']} {info['threads']} threads"
    name += " end to end" * end_to_end
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"
