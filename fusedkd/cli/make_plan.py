"""``fusedkd plan``: its table, its plot."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fusedkd.files import write_figure
from fusedkd.plan.gpus import gpu_of
from fusedkd.plan.losses import HEADS
from fusedkd.plan.report import gib, report

PARTS = {  # of a peak, and their colours
    "weights": "#30638e",
    "state": "#00798c",
    "gradients": "#66a182",
    "teacher": "#6d597a",
    "activations": "#edae49",
    "loss": "#d1495b",
}


def make_plan(args: argparse.Namespace) -> None:
    """Print the plan, and draw it where --output says.

    Raises:
        UserError: a GPU or an amount that is none, or a model that cannot be planned.
    """
    gpu = gpu_of(args.gpu, args.memory)
    logging.set_verbosity_error()
    made = report(args, gpu)
    if args.output is not None:
        write_figure(args.output, _figure(made))
    if args.json:
        print(json.dumps(made, indent=2))
        return
    _show(made)


def _show(made: dict[str, Any]) -> None:
    console = Console(markup=False, emoji=False, highlight=False)
    for role in ("student", "teacher"):
        model = made[role]
        print(
            f"{role}: {model['kind']}, {model['parameters'] / 1e6:,.1f} M parameters, "
            f"{gib(model['weights'])}, vocabulary {model['vocabulary']:,}, H {model['hidden']:,}"
        )
    counted = "" if made["counted"] == 1 else f", {made['counted']:.0%} of the tokens count"
    where = f"{made['batch']} x {made['seq']:,} tokens, {made['dtype']}, AdamW{counted}"
    console.print(_parts(made, where))
    console.print(_losses(made))
    if "computed_seconds" in made:
        _say_seconds(made)
    table = Table(title="A cache of the teacher's answers, at most")
    table.add_column("kept")
    for name in ("bytes per token", "of --tokens"):
        table.add_column(name, justify="right")
    for row in made["caches"]:
        table.add_row(row["kind"], f"{row['bytes_per_token']:,.1f}", gib(row["bytes"]))
    console.print(table)
    print("What to change first:")
    for number, line in enumerate(made["advice"], 1):
        print(f"  {number}. {line}")


def _parts(made: dict[str, Any], where: str) -> Table:
    table = Table(title=f"A step when it holds most, {HEADS}: {where}")
    table.add_column("")
    for name in ("plain", "gradient checkpointing"):
        table.add_column(name, justify="right")
    both = [made["losses"][HEADS][name] for name in ("plain", "checkpointing")]
    names = {"state": "optimizer state", "weights": "student's weights"}
    names |= {"teacher": "teacher's weights, hidden states", "loss": "loss, beside its gradients"}
    for part in PARTS:
        table.add_row(names.get(part, part), *(gib(peak[part]) for peak in both))
    table.add_row("together", *(gib(peak["total"]) for peak in both), style="bold")
    table.add_row("in its", *(peak["when"] for peak in both))
    return table


def _losses(made: dict[str, Any]) -> Table:
    gpu = made["gpu"]
    table = Table(title="The same step with each loss" + (f", {gpu['name']}" if gpu else ""))
    table.add_column("loss")
    heads = ["the loss alone", "step", "checkpointing"]
    for name in heads + (["largest batch", "checkpointing"] if gpu else []):
        table.add_column(name, justify="right")
    for name, way in made["losses"].items():
        if "unavailable" in way:
            table.add_row(name, way["unavailable"])
            continue
        both = [way[name] for name in ("plain", "checkpointing")]
        cells = [gib(way["loss"]), *(gib(peak["total"]) for peak in both)]
        cells += [f"{peak['largest_batch']:,}" for peak in both] if gpu else []
        table.add_row(name, *cells, style="bold" if name == HEADS else "")
    return table


def _say_seconds(made: dict[str, Any]) -> None:
    found = dict(made["computed_seconds"])
    models = found.pop("models")
    print("Computed, not measured: the least that products and bytes allow on the data sheet.")
    for name, part in found.items():
        print(
            f"  {name}: the loss {part['loss']:.3f} s, {part['share']:.0%} of a step of "
            f"{part['loss'] + models:.3f} s"
        )


def _figure(made: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    bars = [
        (f"{name}{'' if kind == 'plain' else ', checkpointing'}", way[kind])
        for name, way in made["losses"].items()
        if "plain" in way
        for kind in ("plain", "checkpointing")
    ]
    left = [0.0] * len(bars)
    for part, colour in PARTS.items():
        sizes = [peak[part] / 2**30 for _, peak in bars]
        axes.barh([name for name, _ in bars], sizes, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if made["gpu"] is not None:
        axes.axvline(made["gpu"]["memory"] / 2**30, color="#333333", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(f"GiB when a step of {made['batch']} x {made['seq']:,} tokens holds most")
    axes.legend(frameon=False, fontsize=8)
    return figure
