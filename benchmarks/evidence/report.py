"""Tables and plots of the evidence, from its results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusedkd.demo.report import markdown_table
from fusedkd.files import replace_file, write_figure
from fusedkd.train.report.card import gap_closed

from ..machine import machine
from .plan import BASE, STUDENTS, Setting, rows

VARIANTS = {
    "init": "initialisation alone",
    "plain": "no KD, equal steps",
    "plain_time": "no KD, equal time",
    "kd": "KD",
}
HEADINGS = (
    "student", "steps", "teacher CE", *(f"CE: {label}" for label in VARIANTS.values()),
    "gap closed", "bits/byte, KD", "agreement", "parameters", "inference, ms", "accuracy kept",
    "above chance",
)  # fmt: skip
ABLATION = ("student, limited text", "without", "CE lost", "the paper lost, GLUE points")
# parameters and speed on a CPU at batch 1, beside the teacher; what was kept of its quality
PAPERS = {
    "GPT-style": ("DistilGPT2", "66%", "not given", "perplexity 21.1 after 16.3"),
    "DistilBERT-style": ("DistilBERT", "61%", "1.63x", "96.9% of GLUE (77.0 of 79.5)"),
    "TinyBERT-style": ("TinyBERT4", "13%", "9.4x", "96.8% of GLUE (77.0 of 79.5)"),
    "ALBERT-style": ("ALBERT-base, not distilled", "11%", "not given", "98.2% (80.1 of 81.6)"),
}
BESIDE = (
    "student", "parameters: paper", "here", "speed: paper", "here", "kept: paper",
    "here: accuracy", "above chance", "gap closed", "with little text",
)  # fmt: skip
OTHERS = (
    "student", "with", "control", "steps", "teacher, bits/byte", "control, bits/byte",
    "with, bits/byte", "better by", "control, KL", "with, KL",
)  # fmt: skip
BESIDES = """\
Limited text, equal steps; each row and its control have the same start, and differ in one thing:
where the teacher's answers come from, who wrote the text, or whether there is a teacher (of another
tokenizer) at all. KL is from the teacher, in nats per token of held-out text."""
READING = """\
What this can show: whether each recipe works end to end, and which way its parts push, beside the
controls that papers often leave out. What it cannot: how much you will gain. Models of a million
parameters on some megabytes of source code, cross-entropy in the place of GLUE, a few hundred
steps. "Gap closed" is (CE without - CE with) / (CE without - CE teacher), at equal steps; it has no
meaning where the student without distillation has passed the teacher. "Above chance" is
(accuracy - chance) / (teacher's accuracy - chance), chance being the most frequent token. Masks
are drawn uniformly, also for DistilBERT, whose release prefers rare tokens."""


class _Seeds:
    """What every seed of one student came to."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results

    def values(self, student: str, text: str, variant: str, name: str) -> list[float]:
        """By seed, whatever the order in which they came."""
        start = f"{student}/{text}/{variant}/"
        keys = [key for key in self.results if key.startswith(start)]
        return [self.results[key][name] for key in sorted(keys, key=lambda x: int(x[len(start) :]))]

    def paired(
        self,
        student: str,
        text: str,
        variants: tuple[str, str],
        of: Callable[[float, float], float],
    ) -> list[float]:
        first, second = (self.values(student, text, v, "ce") for v in variants)
        return [of(a, b) for a, b in zip(first, second, strict=False)]


def write_report(folder: Path, results: Mapping[str, Any], size: Mapping[str, Any]) -> None:
    """``report.md`` and ``evidence.png``."""
    seeds = _Seeds(results)
    parts = ["# Does it help?", "", READING, "", "## Beside the papers", ""]
    parts += [markdown_table(BESIDE, [row for name in PAPERS if (row := _beside(seeds, name))]), ""]
    for text in ("unlimited", "limited"):
        tokens = results["facts"]["tokens"][text]
        parts += [f"## {text.capitalize()} text: {tokens:,} tokens", ""]
        students = [cells for name in STUDENTS if (cells := _cells(seeds, name, text))]
        parts += [markdown_table(HEADINGS, [[c[h] for h in HEADINGS] for c in students]), ""]
    parts += ["## What each part is worth", "", markdown_table(ABLATION, _ablations(seeds)), ""]
    parts += ["## Beside the recipes", "", BESIDES, "", markdown_table(OTHERS, _others(seeds)), ""]
    parts += ["![cross-entropy of every seed](evidence.png)", "", "## How", "", _how(results, size)]
    replace_file(folder / "report.md", "\n".join(parts) + "\n")
    _plot(folder / "evidence.png", seeds)


def _beside(seeds: _Seeds, name: str) -> list[str] | None:
    unlimited, limited = (_cells(seeds, name, text) for text in ("unlimited", "limited"))
    if unlimited is None or limited is None:
        return None
    paper, size, speed, kept = PAPERS[name]
    return [
        f"{name} ({paper})",
        *(size, unlimited["share"], speed, unlimited["speedup"]),
        *(kept, unlimited["accuracy kept"], unlimited["above chance"]),
        *(unlimited["gap closed"], limited["gap closed"]),
    ]


def _cells(seeds: _Seeds, name: str, text: str) -> dict[str, str] | None:
    """What the tables say of one student, by heading; None: it was not trained."""
    kind = STUDENTS[name].kind
    teacher, facts = seeds.results[f"teacher/{kind}"], seeds.results["facts"]
    ce = {v: seeds.values(name, text, v, "ce") for v in VARIANTS}
    if not all(ce.values()):
        return None
    passed = min(ce["plain"]) <= teacher["ce"]
    gaps = seeds.paired(
        name, text, ("plain", "kd"), lambda a, b: gap_closed(a, b, teacher["ce"]) or 0.0
    )
    to_bits = 1 / math.log(2) / facts["bytes_per_token"]
    bits = [x * to_bits for x in ce["kd"]] if kind == "causal" else []
    accuracy = statistics.mean(seeds.values(name, text, "kd", "accuracy"))
    chance = facts["chance"][kind]
    size = seeds.values(name, text, "kd", "parameters")[0]
    ms, speedup = (
        statistics.median(seeds.values(name, text, "init", what))
        for what in ("inference_ms", "speedup")
    )
    share, faster = f"{size / teacher['parameters']:.0%}", f"{speedup:.2f}x"
    return {
        "student": name,
        "steps": str(seeds.results["steps"][name]),
        "teacher CE": f"{teacher['ce']:.3f}",
        **{f"CE: {label}": _spread(ce[variant]) for variant, label in VARIANTS.items()},
        "gap closed": "passed it" if passed else _spread(gaps, ".0%"),
        "bits/byte, KD": _spread(bits) if bits else "masked",
        "agreement": _spread(seeds.values(name, text, "kd", "agreement"), ".1%"),
        "parameters": f"{size:,} ({share})",
        "share": share,
        "inference, ms": f"{ms:.1f} ({faster})",
        "speedup": faster,
        "accuracy kept": _share(accuracy, teacher["accuracy"]),
        "above chance": _share(accuracy - chance, teacher["accuracy"] - chance),
    }


def _ablations(seeds: _Seeds) -> list[list[str]]:
    rows = []
    for name, student in STUDENTS.items():
        for part in student.without:
            lost = seeds.paired(name, "limited", ("kd", f"without {part}"), lambda a, b: b - a)
            if lost:
                rows.append([name, part, _spread(lost, "+.3f"), student.papers[part]])
    return rows


def _others(seeds: _Seeds) -> list[list[str]]:
    lines, facts = [], seeds.results["facts"]
    to_bits = 1 / math.log(2) / facts["bytes_per_token"]
    teacher = seeds.results["teacher/causal"]["ce"] * to_bits
    for key, row in rows(Setting()).items():
        student, pair = key.split("/")[0], (row.control, row.variant)
        if not all(seeds.values(student, "limited", variant, "ce") for variant in pair):
            continue
        bits, kd = (
            [seeds.values(student, "limited", variant, what) for variant in pair]
            for what in ("bits", "kd")
        )
        gains = [a - b for a, b in zip(*bits, strict=False)]
        far = [_spread(x) for x in kd] if student == BASE else ["another vocabulary"] * 2
        way, control = row.says.split(" | ")
        steps = f"{seeds.values(student, 'limited', row.variant, 'steps')[0]:,}"
        lines.append(
            [student, way, control, steps, f"{teacher:.3f}", *map(_spread, bits),
             _spread(gains, "+.3f"), *far]
        )  # fmt: skip
    return lines


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole > 0 else "no more than chance"


def _spread(values: list[float], form: str = ".3f") -> str:
    mean = format(statistics.mean(values), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def _how(results: Mapping[str, Any], size: Mapping[str, Any]) -> str:
    curves, info = [], machine("cpu")
    for kind in ("causal", "masked"):
        teacher = results[f"teacher/{kind}"]
        points = [point[2] for point in teacher["curve"]]
        last = f", of which {points[-3] - points[-1]:.3f} in the last quarter" if points[2:] else ""
        fall = points[0] - points[-1] if points else 0.0
        curves.append(
            f"The {kind} teacher: {teacher['parameters']:,} parameters, {teacher['steps']:,} "
            f"steps; its held-out cross-entropy fell by {fall:.3f} after the first "
            f"evaluation{last}, to {teacher['ce']:.3f}; token frequencies alone give "
            f"{results['facts']['unigram'][kind]:.3f}. {_missing(results, kind)}"
        )
    return "\n".join(
        [
            "Python's standard library, split by file, the tokenizer trained on training files "
            f"only. {size}. Mean ± standard deviation over seeds, which change the order of the "
            "data, the masks and what is random at the start; a single seed has no spread.",
            *curves,
            ", ".join(
                f"{name} {info[name]}" for name in ("cpu", "cores", "threads", "date", "commit")
            ),
        ]
    )


def _missing(results: Mapping[str, Any], kind: str) -> str:
    names = [name for name, student in STUDENTS.items() if student.kind == kind]
    if any(key.startswith(f"{name}/") for key in results for name in names):
        return ""
    return f"It has nothing to teach, so {', '.join(names)} were not trained."


def _plot(path: Path, seeds: _Seeds) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(2, len(STUDENTS), squeeze=False)
    for row, text in zip(grid, ("unlimited", "limited"), strict=True):
        for axes, name in zip(row, STUDENTS, strict=True):
            shown = [v for v in VARIANTS if v != "init"]
            for place, variant in enumerate(shown):
                values = seeds.values(name, text, variant, "ce")
                axes.plot([place] * len(values), values, "o", alpha=0.7)
            teacher = seeds.results[f"teacher/{STUDENTS[name].kind}"]["ce"]
            axes.axhline(teacher, color="grey", linestyle=":")
            axes.set_xticks(range(len(shown)), ["no KD,\nsteps", "no KD,\ntime", "KD"])
            axes.set_title(f"{name}, {text}", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("held-out CE, nats per token")
    write_figure(path, figure)
