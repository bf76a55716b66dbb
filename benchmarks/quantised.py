"""Does quantisation-aware distillation give back what rounding costs? The demo's student, rounded,
before and after: held-out cross-entropy, and the divergence from what it was.

``python -m fusedkd.benchmarks.quantised [--scheme int2] [--seeds 0 1 2] [--steps 200]``

The demo's teacher is trained once, its student (Hinton's mix) for each seed. Then, at equal steps
on the same text and from the same weights, both rounded in each forward pass: qad learns the
student's own answers before it was rounded (forward KL, T = 1), qat the labels (cross-entropy,
which is also more training on them). ``longer`` says how much that is: as qat, not rounded.
Recovered is (rounded - trained) / (rounded - not rounded). Models and results are kept in --output,
and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from fusedkd.demo.corpus import Corpus, corpus
from fusedkd.demo.report import save_student
from fusedkd.demo.run import LOSSES, SMOKE, Demo, Setting
from fusedkd.files import write_json
from fusedkd.models.quantised import SCHEMES, fake_quantise

TRAINED: dict[str, dict[str, Any]] = {
    "qad": {"divergence": "forward_kl", "temperature": 1.0},
    "qat": {"kd_weight": 0.0, "ce_weight": 1.0},
    "longer": {"kd_weight": 0.0, "ce_weight": 1.0},
}
MEASURES = {"eval_loss": "CE", "eval_kd": "KL from not rounded", "eval_top1_agreement": "agreement"}


class Rounding:
    """One scheme, over the demo's students."""

    def __init__(self, setting: Setting, flags: Any, text: Corpus, work: Path) -> None:
        self.setting, self.flags, self.text, self.work = setting, flags, text, work
        self.console = Console()
        self.steps = flags.student_steps or setting.student_steps  # of the student

    def demo(self, seed: int, **options: Any) -> Demo:
        demo = Demo(self.setting, self.text, self.work, self.console, seed)
        demo.experiment.options.update(options)
        return demo

    def kept(self, name: str, demo: Demo, size: tuple[int, int], *how: Any, **loss: Any) -> Any:
        """A model that was trained before, or is now."""
        folder = self.flags.output / name
        if not folder.is_dir():
            model = demo.model(*size)
            demo.experiment.train(name, model, *how, **loss)
            save_student(folder, model, self.text.tokenizer)
        return LlamaForCausalLM.from_pretrained(folder)

    def student(self, seed: int) -> Any:
        size = self.setting
        data, steps = self.text.teacher, size.teacher_steps
        teacher = self.kept("teacher", self.demo(0), size.teacher, data, steps)
        distilled = {"teacher": teacher, "loss": LOSSES["kd"]}
        given = self.text.transfer, self.steps
        name = f"student-{self.steps}-{seed}"
        return self.kept(name, self.demo(seed), size.student, *given, **distilled)

    def measure(self, name: str, seed: int) -> dict[str, float]:
        """Held-out numbers, and processor seconds of a step of training."""
        flags, whole = self.flags, self.student(seed)
        model = copy.deepcopy(whole)
        if name not in ("not rounded", "longer"):
            fake_quantise(model, flags.scheme, flags.group)
        demo = self.demo(seed, learning_rate=flags.learning_rate, weight_decay=0.0)
        began = time.process_time()  # of this process: others may share the cores
        if name in TRAINED:
            how = {"teacher": whole, "loss": TRAINED[name]}
            demo.experiment.train(name, model, self.text.transfer, flags.steps, **how)
        seconds = (time.process_time() - began) / flags.steps
        judged = demo.experiment.judge(model, whole)
        return {key: judged[key] for key in MEASURES} | {"seconds": seconds}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scheme", choices=SCHEMES, default="int2")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--student-steps", type=int, help="of the student (default: the demo's)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("outputs/quantised"))
    parser.add_argument("--only", nargs="+", choices=tuple(TRAINED), default=list(TRAINED))
    parser.add_argument("--smoke", action="store_true", help="tiny models: that it works")
    flags = parser.parse_args()
    # widths that groups of 32 divide
    setting = replace(SMOKE, student=(96, 1)) if flags.smoke else Setting()
    flags.output /= "smoke" if flags.smoke else "demo"  # models of one size are not the other's
    flags.output.mkdir(parents=True, exist_ok=True)
    file = flags.output / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        rounding = Rounding(setting, flags, corpus(setting), Path(work))
        key = (
            f"{flags.scheme}, {flags.group} a scale, {flags.steps} steps of "
            f"{flags.learning_rate:g} after {rounding.steps}"
        )
        found = results.setdefault(key, {})
        names = ["not rounded", "rounded", *flags.only]
        for seed in flags.seeds:
            for name in names:
                if f"{name}/{seed}" not in found:
                    found[f"{name}/{seed}"] = rounding.measure(name, seed)
                    write_json(file, results)
    show(key, found, names, flags.seeds)


def show(title: str, found: dict[str, Any], names: list[str], seeds: list[int]) -> None:
    """A table: mean and range over seeds."""
    table = Table("", *MEASURES.values(), "recovered", "processor s a step", title=title)

    def loss(name: str, seed: int) -> float:
        return float(found[f"{name}/{seed}"]["eval_loss"])

    for name in names:
        cells = []
        for key in MEASURES:
            numbers = [found[f"{name}/{seed}"][key] for seed in seeds]
            cells.append(f"{statistics.mean(numbers):.4f} ({max(numbers) - min(numbers):.4f})")
        back = []
        for seed in seeds:
            cost = loss("rounded", seed) - loss("not rounded", seed)
            back.append(f"{(loss('rounded', seed) - loss(name, seed)) / cost:.0%}")
        seconds = statistics.mean(found[f"{name}/{seed}"]["seconds"] for seed in seeds)
        trained = name in TRAINED
        table.add_row(
            name, *cells, ", ".join(back) if trained else "", f"{seconds:.3f}" if trained else ""
        )
    Console().print(table)


if __name__ == "__main__":
    main()
