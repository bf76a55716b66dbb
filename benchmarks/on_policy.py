"""k2 beside the exact reverse KL, on what the student writes, at the demo's size.

``python -m fusedkd.benchmarks.on_policy [--teacher-steps 900] [--student-steps 300] [--steps 300]``

The demo's teacher and student; the student first learns from the text, then from the teacher on
what it writes, once with each objective, from the same weights and by the same seeds. The time of a
step is that of short runs by turns, after it: what else the machine does then meets both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from rich.console import Console

from fusedkd.demo.corpus import corpus
from fusedkd.demo.run import SMOKE, Demo, Setting

OBJECTIVES = {"exact": "exact", "k2": "sampled"}
TURNS, TURN_STEPS = 3, 12
WRITES = {"divergence": "reverse_kl", "on_policy_share": 1.0, "on_policy_prompt": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--student-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="tiny models: that it works")
    options = parser.parse_args()
    setting, console = SMOKE if options.smoke else Setting(), Console(stderr=True)
    disable_progress_bars()
    text = corpus(setting)
    with tempfile.TemporaryDirectory() as work:
        demo = Demo(setting, text, Path(work), console)
        teacher = demo.model(*setting.teacher)
        demo.experiment.train("teacher", teacher, text.teacher, options.teacher_steps)
        student = demo.model(*setting.student)
        demo.experiment.train("student", student, text.transfer, options.student_steps)
        print(f"{'before':8s} {_judged(demo, student, teacher)}")
        demo.experiment.options["learning_rate"] = setting.learning_rate / 10

        def learn(name: str, objective: str, steps: int) -> tuple[Any, list[float]]:
            pupil = copy.deepcopy(student)
            loss = WRITES | {"objective": objective, "on_policy_new_tokens": options.new_tokens}
            watch = demo.experiment.train(
                name, pupil, text.transfer, steps, teacher=teacher, loss=loss
            )
            return pupil, watch._times

        for name, objective in OBJECTIVES.items():
            pupil, _ = learn(name, objective, options.steps)
            print(f"{name:8s} {_judged(demo, pupil, teacher)}", flush=True)
        times: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
        for _ in range(TURNS):
            for name, objective in OBJECTIVES.items():
                times[name] += learn(name, objective, TURN_STEPS)[1]
        for name, found in times.items():
            print(f"{name:8s} {statistics.median(found) * 1e3:.1f} ms a step")


def _judged(demo: Demo, student: object, teacher: object) -> str:
    found = demo.experiment.judge(student, teacher)
    return f"held-out loss {found['eval_loss']:.4f}, forward KL {found['eval_kd']:.4f}"


if __name__ == "__main__":
    main()
