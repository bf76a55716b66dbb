"""``fusedkd doctor``: what runs here, what does not and why, and whether it is right."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fusedkd import __version__, backends, divergences, kd_loss

PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "datasets", "pyarrow", "trl",
            "liger-kernel", "peft", "deepspeed")  # fmt: skip
# Of the environment's variables, those that change what runs, and that hold no paths or secrets.
VARIABLES = ("FUSEDKD_CPU_ISA", "FUSEDKD_DEBUG", "TRITON_INTERPRET", "OMP_NUM_THREADS",
             "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")  # fmt: skip
TOLERANCE = 1e-4  # of the gradient's largest entry; a wrong kernel is off by far more


def report() -> int:
    """Print the report; 1 when a backend that runs is wrong, or none but the reference runs."""
    print(*_machine(), sep="\n")
    print("\nbackends, and their largest error against fp64:")
    wrong = False
    for name in backends.NAMES:
        backend = backends.load(name)
        if reason := backend.unavailable():
            print(f"  {name:<10} does not run here: {reason}")
            continue
        error, seconds = _error(name)
        wrong |= not error < TOLERANCE
        verdict = "right" if error < TOLERANCE else "WRONG"
        print(f"  {name:<10} {_runs(backend)}; {verdict}: {error:.1e}, in {seconds:.1f} s")
    return int(wrong)


def environment() -> int:
    """Print what a bug report needs: versions, devices and backends, without folders."""
    for line in _machine():
        print(line)
    for name in backends.NAMES:
        backend = backends.load(name)
        reason = backend.unavailable()
        state = f"does not run here: {_without_folders(reason)}" if reason else _runs(backend)
        print(f"backend {name}: {state}")
    for name in VARIABLES:
        if name in os.environ:
            print(f"{name}={os.environ[name]}")
    return 0


def _machine() -> Iterator[str]:
    yield f"fusedkd {__version__}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield f"GPU {index}: {gpu.name}, {size}, sm_{gpu.major}{gpu.minor}, {toolkit}"


def _runs(backend: Any) -> str:
    isa = getattr(backend, "instruction_set", lambda: "")()
    return f"runs ({isa})" if isa else "runs"


def _without_folders(text: str) -> str:
    """A path may hold a user's name: what is left is the file's."""
    text = text.replace(str(Path.home()), "~")
    return re.sub(r"(?<!\w)(?:~|\w:|\.{1,2})?[\\/](?=\w)(?:[^\s'\":;,]+[\\/])*", ".../", text)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _error(backend: str) -> tuple[float, float]:
    """The largest relative error of gradients over all divergences, and the time it took."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 1031, generator=generator).to(device) * 3 for _ in range(2)]
    labels = torch.randint(0, 1031, (4,), generator=generator).to(device)
    start, worst = time.perf_counter(), 0.0
    for name in divergences.names():
        grads: list[torch.Tensor] = []
        for which in (backend, "reference"):
            student = logits[0].clone().requires_grad_()
            loss = kd_loss(
                *(student, logits[1], labels),
                divergence=name,
                temperature=2.0,
                ce_weight=0.5,
                backend=which,
            )
            grads += torch.autograd.grad(loss, student)
        worst = max(worst, float((grads[0] - grads[1]).abs().max() / grads[1].abs().max()))
    return worst, time.perf_counter() - start
