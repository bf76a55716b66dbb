"""Step: hardware counters of the two kernels that matter most, by ncu."""

from __future__ import annotations

import contextlib
import csv
from typing import Any

from .journal import Item, Journal, Skip
from .orders import Orders, output_of, tool

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "lts__t_bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "launch__registers_per_thread",
    "launch__grid_size",
)


def run(journal: Journal, orders: Orders) -> None:
    for name in ("forward_kl", "jsd")[: 1 if orders.device == "cpu" else 2]:
        journal.item(name, _counters, name, orders)


def _counters(name: str, orders: Orders) -> Item:
    inner = orders.but(what="watched", part=name).command
    if orders.device == "cpu":
        code, _ = output_of(inner, orders.left)
        return {"ok": True} if code == 0 else {"ok": False, "wrong": f"code {code}"}
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv"]
    options += ["--metrics", ",".join(METRICS), "--target-processes", "all"]
    _, text = output_of([tool("ncu"), *options, *inner], min(55, orders.left))
    kernels = kernels_of(text)
    if "ERR_NVGPUCTRPERM" in text:
        raise Skip("this machine lets nobody read its counters")
    if not kernels:
        said = [line for line in text.splitlines() if line.startswith("==")] or text.splitlines()
        return {"error": (said or ["no output"])[-1][:160]}
    longest = max(kernels.values(), key=lambda k: k.get("gpu__time_duration.sum", 0.0))
    return {"kernels": len(kernels), **longest}


def kernels_of(text: str) -> dict[str, Item]:
    """Of ncu's CSV, by launch: the metrics, in the units that it chose."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, Item] = {}
    for row in csv.DictReader(lines[start:]):
        with contextlib.suppress(KeyError, ValueError, AttributeError, TypeError):
            kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"][:60]})
            kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
            kernel[f"{row['Metric Name']} unit"] = row["Metric Unit"]
    return kernels


def watched(orders: Orders, card: Any) -> None:
    """In the process that ncu looks at: one call, behind a warm one."""
    import torch

    from . import plans
    from .calls import Call, problem_of, step_of

    sizes = plans.sizes(orders.device)
    call = Call(rows=sizes.watched, vocab=sizes.vocab, divergence=orders.part)
    step = step_of(call, problem_of(call, card))
    step()
    card.wait()
    if card.cuda:
        torch.cuda.profiler.start()
    step()
    card.wait()
    if card.cuda:
        torch.cuda.profiler.stop()
