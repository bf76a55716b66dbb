"""Memory of the loss against tokens, as a picture: eager, Liger, TRL, fusedkd.

``python -m fusedkd.benchmarks.memory --output docs/memory.png``

Each point is one step, forward and backward, of bf16 hidden states and heads, in a process of its
own: the most that is in use beyond the inputs. It does not depend on what else the machine does. A
line ends where its next point would take more than ``--most`` GiB, or ``--seconds``. What was found
is kept beside the picture, in a .json file: the same command goes on from there, or draws it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from fusedkd import backends
from fusedkd.files import write_figure, write_json

from .child import ChildFailed, in_child
from .machine import machine
from .race.case import Case
from .race.memory import measure
from .race.plots import COLOURS
from .race.provider import OURS

NAMES = {"eager": "eager PyTorch", "liger": "Liger", "trl": "TRL", OURS: "fusedkd"}


Found = dict[str, dict[str, float]]  # MiB by the number of tokens, by provider
Kept = dict[str, Found]  # by the entries of the vocabulary


def measure_line(provider: str, case: Case, options: argparse.Namespace, kept: Kept) -> None:
    """Into ``kept``, as far as it goes."""
    sizes = kept[str(case.vocab)].setdefault(provider, {})
    for n in options.tokens:
        last = list(sizes.values())[-2:]
        if len(last) == 2 and 3 * last[1] - 2 * last[0] > options.most * 1024:
            break
        if str(n) in sizes:
            continue
        job = dataclasses.asdict(case.but(n=n))
        try:
            size, reason = in_child(measure, job, provider, timeout=options.seconds)
        except ChildFailed as error:
            size, reason = None, str(error)
        print(f"{provider:8} {n:6,} tokens ", f"{size / 2**20:,.0f} MiB" if size else reason)
        if not size:
            break
        sizes[str(n)] = round(size / 2**20)
        write_json(options.output.with_suffix(".json"), kept)


def draw(lines: Found, case: Case, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    tokens = sorted({int(n) for sizes in lines.values() for n in sizes})
    for name in filter(lines.get, NAMES):
        sizes, width = lines[name], 3 if name == OURS else 1.8
        xs, ys = [int(n) for n in sizes], [mib / 1024 for mib in sizes.values()]
        style = {"color": COLOURS[name], "zorder": 2 + (name == OURS)}
        axes.plot(xs, ys, "o-", label=NAMES[name], linewidth=width, **style)
    axes.set(xlabel="tokens", ylabel="peak beyond the inputs, GiB", ylim=0)
    axes.set_xticks(tokens, [f"{n:,}" if n >= max(tokens) / 8 else "" for n in tokens])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(
        f"A {case.divergence.upper()} loss and its gradients, {case.vocab:,} entries, "
        f"H = {case.hidden_student} / {case.hidden_teacher}, {case.dtype}",
        fontsize=10,
    )
    about = machine(case.device)
    versions = ", ".join(
        f"{name} {about['versions'][name]}" for name in ("torch", "liger-kernel", "trl", "fusedkd")
    )
    text = f"measured on {about['cpu']}; {versions}; {about['date'][:10]}"
    figure.supxlabel(text, fontsize=7, color="#666666", x=0.99, ha="right")
    write_figure(path, figure, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    add("--vocab", type=int, default=151936)
    add("--providers", nargs="+", choices=NAMES, default=list(NAMES))
    add("--most", type=float, default=9.0, metavar="GIB")
    add("--seconds", type=float, default=300.0)
    options = parser.parse_args(arguments)
    # TRL's has no cross-entropy
    case = Case("head", "jsd", vocab=options.vocab, ce_weight=0.0)
    if reason := backends.load("cpu").unavailable():
        parser.error(f"fusedkd would run its reference here, for {reason}")
    path = options.output.with_suffix(".json")
    kept: Kept = json.loads(path.read_text()) if path.exists() else {}
    lines = kept.setdefault(str(case.vocab), {})
    for name in options.providers:
        measure_line(name, case, options, kept)
    draw(lines, case, options.output)


if __name__ == "__main__":
    main()
