"""What a group costs: two processes, each with half of a vocabulary, against one of them alone.

``python -m fusedkd.benchmarks.parallel``. One thread a process, gloo, in turns; the best of several
rounds. Alone, a process takes the loss over the columns that it has, as if they were all: while the
other one waits, and while it does the same. Between these two lies what the cores take from each
other; the rest is what the group costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from fusedkd import SparseTeacher, kd_loss
from fusedkd.files import replace_file

VOCABULARY, ENTRIES, BAR = 151_936, 64, 1.3
CASES = ("forward_kl", "jsd", "bucket")  # the last: forward KL to a sparse teacher
Sides = tuple[Tensor, Tensor | SparseTeacher]


def measure(rows: int = 256, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward in bf16, by case: alone, while the other process is at
    the same (``side_by_side``), in the group; the group's ratio to the first."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, rows, rounds)
        multiprocessing.spawn(_rank, arguments, nprocs=2)
        times = json.loads((Path(folder) / "times").read_text())
    return {case: {**x, "ratio": x["group"] / x["alone"]} for case, x in times.items()}


def _rank(rank: int, folder: str, rows: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    times = {case: _times(case, rank, rows, rounds) for case in CASES}
    if rank == 0:
        (Path(folder) / "times").write_text(json.dumps(times))
    dist.destroy_process_group()


def _times(case: str, rank: int, rows: int, rounds: int) -> dict[str, float]:
    draw, half = torch.Generator().manual_seed(0), VOCABULARY // 2
    student, teacher = (
        (torch.randn(rows, VOCABULARY, generator=draw) * 3).bfloat16() for _ in range(2)
    )
    student = student[:, rank * half : (rank + 1) * half].clone().requires_grad_()
    there = teacher[:, rank * half : (rank + 1) * half].clone()
    alone: Sides = (student, there)
    group: Sides = alone
    if case == "bucket":
        alone, group = ((student, _top(t)) for t in (there, teacher))
    labels = torch.randint(half, (rows,), generator=draw)
    ways = {
        "alone": (alone, None) if rank == 0 else None,
        "side_by_side": (alone, None),
        "group": (group, dist.group.WORLD),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            dist.barrier()
            if way is not None:
                best[name] = min(best[name], _lap(case, way[0], labels, way[1]))
    return best


def _top(logits: Tensor) -> SparseTeacher:
    log_probs, ids = logits.float().log_softmax(-1).topk(ENTRIES)
    return SparseTeacher(ids, log_probs)


def _lap(case: str, sides: Sides, labels: Tensor, group: Any) -> float:
    name = "jsd" if case == "jsd" else "forward_kl"
    sides[0].grad = None
    start = time.perf_counter()
    loss = kd_loss(*sides, labels, divergence=name, temperature=2.0, ce_weight=0.5, group=group)
    loss.backward()
    return 1e3 * (time.perf_counter() - start)


def main(write: Callable[[str], None] = print) -> None:
    """Print the ratios; with ``--save FILE`` also as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    results = measure(options.rows, options.rounds)
    for case, x in results.items():
        times = f"{x['alone']:7.1f} ms alone {x['side_by_side']:7.1f} side by side"
        write(f"{case:12s}{times} {x['group']:7.1f} in the group: {x['ratio']:.2f} (bar {BAR})")
    if options.save:
        replace_file(options.save, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
