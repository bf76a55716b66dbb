"""A visit's report into the repository: results, tables of the performance page, a plot.

    python -m benchmarks.device.publish outputs/gpu

Writes benchmarks/results/GPU.json, docs/speed-gpu.png and what lies between the "gpu" marks of
docs/performance.md. Good numbers and bad ones: every bar is shown with what was reached.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

# by absolute names, so that it runs as `python -m benchmarks.device.publish` too
from fusedkd.benchmarks import machine, page
from fusedkd.benchmarks.device import place
from fusedkd.benchmarks.device.journal import Item
from fusedkd.benchmarks.device.table import Items
from fusedkd.files import write_figure, write_json

PLOT = "docs/speed-gpu.png"


class Bar(NamedTuple):
    """What the project promises on a GPU, and what was reached; None: not measured."""

    label: str
    value: float | None
    limit: float
    at_least: bool = True
    unit: str = " %"

    @property
    def row(self) -> list[str]:
        met = self.value is not None and (
            self.value >= self.limit if self.at_least else self.value <= self.limit
        )
        value = "not measured" if self.value is None else f"{self.value:.3g}{self.unit}"
        limit = f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}"
        return [self.label, limit, value, "met" if met else "**missed**"]


def bars(report: dict[str, Any]) -> list[Bar]:
    def value(step: str, pattern: str, field: str) -> float | None:
        matches = (x for n, x in items_of(report, step).items() if re.fullmatch(pattern, n))
        return next((float(item[field]) for item in matches if field in item), None)

    def share(divergence: str, columns: str = "8192x151936") -> float | None:
        return value("shares", f"{divergence} dense bf16 {columns} T=2", "share")

    def ratio(divergence: str) -> float | None:
        return value("heads", rf"{divergence} head bf16 8192x151936 H=4096\+4096 T=2", "ratio")

    def times(peer: str, divergence: str) -> float | None:
        case = rf": head, bf16, .* x 151,936, {divergence}, T=2, H=4096/4096"
        ours = value("peers", f"fusedkd{case}", "ms")
        theirs = value("peers", f"{peer}{case}", "ms")
        return theirs / ours if ours and theirs else None

    odd, even = share("forward_kl", r"\d+x50257"), share("forward_kl", r"\d+x50304")
    odd_share = 100 * odd / even if odd and even else None
    copied, products = "of the copy bandwidth", "times its bare products"
    trl, liger = times("trl", "forward_kl"), times("liger-triton", "jsd")
    return [
        Bar(f"forward KL, {copied}", share("forward_kl"), 90),
        Bar(f"reverse KL, {copied}", share("reverse_kl"), 90),
        Bar(f"JSD, {copied}", share("jsd"), 75 if "H100" in report["key"]["gpu"] else 65),
        Bar("50,257 entries, of the speed at 50,304", odd_share, 80),
        Bar(f"head, forward KL, {products}", ratio("forward_kl"), 1.15, False, ""),
        Bar(f"head, JSD, {products}", ratio("jsd"), 1.15, False, ""),
        Bar(
            "a call of 8 × 1,000 on the host", value("host", "call dense", "us"), 100, False, " µs"
        ),
        Bar("TRL's ChunkedDivergence, forward KL, times ours", trl, 1.5, unit=""),
        Bar("Liger's fused linear JSD, times ours", liger, 2, unit=""),
    ]


def items_of(report: dict[str, Any], step: str) -> Items:
    items = report["steps"].get(step, {}).get("items", [])
    return {item["name"]: item for item in items}


# --------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    parts = [_introduction(report), _shares(report), _heads(report), _peers(report), _bars(report)]
    parts.append(f"![share of the copy bandwidth, measured and by the model]({Path(PLOT).name})")
    return "\n\n".join(filter(None, parts))


def _introduction(report: dict[str, Any]) -> str:
    facts = items_of(report, "facts").get("machine", {})
    versions = facts.get("versions", {})
    smoke = [item for item in items_of(report, "smoke").values() if "ok" in item]
    right = sum(item["ok"] for item in smoke)
    copy = items_of(report, "shares").get("copy before", {}).get("gb_s", math.nan)
    return (
        f"**Measured** on one {report['key']['gpu']}, torch {versions.get('torch')}, triton "
        f"{versions.get('triton')}, {facts.get('date', '')[:10]}, commit {report['commit']}: "
        f"`make gpu` in {report['seconds']:.0f} s, `benchmarks/device/publish.py`.\n"
        f"{right} of {len(smoke)} calls are within the budgets of the tests. A copy moves "
        f"{copy / 1000:.2f} TB/s. Dense bf16 rows, 8,192 × 151,936, with cross-entropy, T = 2:"
    )


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _plain(report: dict[str, Any], launch: str = "") -> Items:
    """By divergence; ``launch``: " joint", those whose programs wait for one another."""
    pattern = re.compile(rf"(\w+) dense bf16 8192x151936 T=2{launch}")
    timed = {n: item for n, item in items_of(report, "shares").items() if "share" in item}
    return {match[1]: timed[n] for n in timed if (match := pattern.fullmatch(n))}


def _shares(report: dict[str, Any]) -> str:
    def percent(item: Item, field: str) -> str:
        return f"{item[field]:.0f} %" if field in item else "-"

    joint = _plain(report, " joint")
    rows = [
        [f"`{name}`", f"{x['ms']:.2f}", percent(x, "share"), percent(x, "modelled")]
        + [percent(joint.get(name, {}), field) for field in ("share", "modelled")]
        for name, x in _plain(report).items()
    ]
    titles = ["divergence", "ms, loss and gradient", "of the copy bandwidth", "by the model"]
    return _table([*titles, "joint launch", "by the model"], rows)


def _heads(report: dict[str, Any]) -> str:
    rows = []
    for name, item in items_of(report, "heads").items():
        if "ratio" in item and "chunk_bytes" not in name:
            call = re.sub(r" head bf16| T=2", "", name)
            gib = f"{(item['bytes'] or 0) / 2**30:.2f}"
            rows.append([call, f"{item['ms']:.1f}", f"{item['ratio']:.2f}×", gib])
    return _table(["through heads", "ms", "times the bare products", "GiB beyond the inputs"], rows)


def _peers(report: dict[str, Any]) -> str:
    raced = [x for x in items_of(report, "peers").values() if "peer" in x]
    rows = []
    for case in dict.fromkeys(x["case"] for x in raced):
        times = {x["peer"]: x["ms"] for x in raced if x["case"] == case}
        if ours := times.pop("fusedkd", None):
            others = ", ".join(f"{peer} {ms / ours:.1f}×" for peer, ms in times.items())
            rows.append([case, f"{ours:.2f}", others])
    return _table(["against peers", "fusedkd, ms", "times that"], rows)


def _bars(report: dict[str, Any]) -> str:
    return _table(["promised", "bar", "reached", ""], [bar.row for bar in bars(report)])


def plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    items = _plain(report)
    figure = Figure(figsize=(8, 1 + 0.4 * len(items)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    places = range(len(items))
    axes.barh(places, [x["share"] for x in items.values()], color="#d1495b", label="measured")
    modelled = [x.get("modelled", math.nan) for x in items.values()]
    axes.plot(modelled, places, "|", color="#30638e", markersize=18, label="by the model")
    axes.set_yticks(places, list(items), fontsize=8)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel(f"% of the copy bandwidth, {report['key']['gpu']}")
    axes.legend(frameon=False, fontsize=8)
    write_figure(path, figure)


def publish(folder: Path, root: Path) -> list[Path]:
    """What is written.

    Raises:
        ValueError: the report is of a dry run, or there is nothing to show in it.
    """
    report = json.loads((folder / "report.json").read_text())
    if report["key"]["device"] != "cuda" or not _plain(report):
        raise ValueError(
            f"{folder / 'report.json'}: a dry run, or no dense rows were timed. Expected the "
            "report of `make gpu` on a machine with a GPU, its step `shares` among it."
        )
    same = report["key"]["source"] == place.source_hash(place.checkout())
    there = items_of(report, "facts").get("machine", {}).get("commit")
    report["commit"] = there or (machine.machine("cpu")["commit"] if same else "of another source")
    name = re.sub(r"[^a-z0-9]+", "-", report["key"]["gpu"].lower()).strip("-")
    results = root / "benchmarks/results" / f"{name}.json"
    write_json(results, report)
    plot(report, root / PLOT)
    page.replace(markdown(report), root)
    return [results, root / PLOT, root / page.PAGE]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the visit's --out")
    arguments = parser.parse_args()
    print(*publish(arguments.folder, page.ROOT), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
