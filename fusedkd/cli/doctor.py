"""``fusedkd doctor``: what runs here, what does not and why, and whether it is right."""

from __future__ import annotations

import importlib.metadata
import platform
import time

import torch

from fusedkd import backends, divergences, kd_loss

PACKAGES = ("fusedkd", "torch", "triton", "transformers", "accelerate", "datasets")
TOLERANCE = 1e-4  # of the gradient's largest entry; a wrong kernel is off by far more


def report() -> int:
    """Print the report; 1 when a backend that runs is wrong, or none but the reference runs."""
    print(f"Python {platform.python_version()} on {platform.platform()}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    print(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}: {torch.cuda.get_device_name(index)}")
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
        isa = getattr(backend, "instruction_set", lambda: "")()
        state = f"runs ({isa})" if isa else "runs"
        print(f"  {name:<10} {state}; {verdict}: {error:.1e}, in {seconds:.1f} s")
    return int(wrong)


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
