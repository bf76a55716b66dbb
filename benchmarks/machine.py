"""Everything that a time depends on and a reader cannot guess."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "triton", "transformers", "fusedkd"),
    *("liger-kernel", "trl", "cut-cross-entropy"),
)


def machine(device: str) -> dict[str, Any]:
    """Of this one, with its versions and its commit."""
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _proc(path: str, field: str) -> str | None:
    try:
        line = re.search(rf"^{field}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return line.group(1).strip() if line else None


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
