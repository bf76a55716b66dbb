"""``fusedkd demo``: a whole distillation on real text, small enough for two cores.

The setting is the one in which distillation pays in practice: the teacher has read much text, the
student gets a small transfer set and passes over it several times. The same student, from the same
initialisation, is trained for as many steps without distillation, with Hinton's mix and with one
more divergence; and once more without distillation for as long as Hinton's mix took.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars, enable_progress_bars
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fusedkd.demo.corpus import Corpus, Sizes, corpus
from fusedkd.demo.experiment import Experiment
from fusedkd.demo.report import Run, save_student, write_report
from fusedkd.train.report.card import write_card


@dataclass(frozen=True)
class Setting(Sizes):
    """The steps are an upper bound: a slow or busy machine does as many as fit its time."""

    batch: int = 8
    teacher: tuple[int, int] = (128, 4)  # width, layers
    student: tuple[int, int] = (96, 3)
    teacher_steps: int = 900
    student_steps: int = 450
    teacher_share: float = 0.42  # of the time
    evaluations: int = 5  # per run
    learning_rate: float = 3e-3


SMOKE = Setting(
    teacher_bytes=100_000,
    transfer_tokens=2_000,
    held_out_blocks=8,
    vocabulary=300,
    block=32,
    batch=4,
    teacher=(32, 1),
    student=(32, 1),
    teacher_steps=12,
    student_steps=6,
    evaluations=2,
)

# Hinton et al. 2015 with "a considerably lower weight" on the labels; DistiLLM, section 3.1.
LOSSES: dict[str, dict[str, Any]] = {
    "kd": {"divergence": "forward_kl", "temperature": 2.0, "kd_weight": 0.8, "ce_weight": 0.2},
    "skew": {"divergence": "skew_forward_kl(lam=0.1)"},
}
ABOUT = {
    "student": "the demo's student",
    "teacher": "the demo's teacher",
    "data": "the Python standard library's sources",
    "loss": "{kd_weight:g} x {divergence} at T = {temperature:g} + {ce_weight:g} x CE".format(
        **LOSSES["kd"]
    ),
    "again": "`fusedkd demo`",
}
PROBE_STEPS = 6


def run_demo(output: Path, *, seed: int = 0, minutes: float = 5.0, smoke: bool = False) -> None:
    """Train teacher and students; write ``student/`` (with the report card that ``fusedkd distill``
    writes), ``report.json`` and ``.md``, ``curves.png``.

    Args:
        output: the folder to write to; files there are replaced, each at once.
        minutes: about how long it may take. With enough of it, and on any one machine, the numbers
            depend on ``seed`` alone; with less, there are fewer steps, and the report says so.
        smoke: a tiny run that shows that everything works, and nothing else.
    """
    began = time.monotonic()
    deadline = began + 60 * minutes
    setting, console = SMOKE if smoke else Setting(), Console()
    output.mkdir(parents=True, exist_ok=True)
    console.print("[bold]Text[/]: the Python standard library's sources, split by file")
    disable_progress_bars()
    try:
        text = corpus(setting)
    finally:
        enable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        demo = Demo(setting, text, Path(work), console, seed)
        results, student = demo.run(deadline)
    save_student(output / "student", student, text.tokenizer)
    write_card(output / "student", demo.cards["kd"], demo.histories["kd"], ABOUT)
    facts = {
        "seed": seed,
        "bytes_per_token": text.bytes_per_token,
        "vocabulary": len(text.tokenizer),
        "transfer_tokens": len(text.transfer) * setting.block,
        "held_out_tokens": len(text.held_out) * setting.block,
        "shortened": results["plain"].steps < setting.student_steps
        or results["teacher"].steps < setting.teacher_steps,
        "total_seconds": round(time.monotonic() - began, 1),
    }
    write_report(output, results, facts, console)


class Demo:
    """The demo's models, and how they are trained on its text."""

    def __init__(
        self, setting: Setting, text: Corpus, work: Path, console: Console, seed: int = 0
    ) -> None:
        self.setting, self.text, self.console, self.seed = setting, text, console, seed
        self.cards: dict[str, Any] = {}  # of the distilled ones, and their logs
        self.histories: dict[str, list[Any]] = {}
        options = {
            "learning_rate": setting.learning_rate,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "seed": seed,
        }
        self.experiment = Experiment(work, console, text.held_out, setting.batch, options)

    def run(self, deadline: float) -> tuple[dict[str, Run], LlamaForCausalLM]:
        """All trainings by name, and the student of Hinton's mix. ``deadline``: of
        ``time.monotonic()``."""
        size = self.setting
        self.say("Teacher", self.text.teacher, "each at most once")
        teacher = self.model(*size.teacher)
        budget = size.teacher_share * (deadline - time.monotonic())
        steps = self.fitting(size.teacher_steps, budget, [(size.teacher, None, 1)])
        results = {"teacher": self.train("teacher", teacher, steps)}
        teacher.eval()
        self.say("Students", self.text.transfer, "over and over")
        # plain; both losses; and plain once more, for as long as a distilled one
        plan = [(size.student, None, 1), (size.student, teacher, 3)]
        steps = self.fitting(size.student_steps, deadline - time.monotonic(), plan)
        for name in ("plain", *LOSSES):
            student = self.model(*size.student)
            results[name] = self.train(name, student, steps, teacher)
            if name == "kd":
                kept = student
        longer = max(1.0, results["kd"].train_seconds / results["plain"].train_seconds)
        student = self.model(*size.student)
        name = "plain_equal_time"
        results[name] = self.train(name, student, round(longer * steps), teacher)
        return results, kept

    def say(self, who: str, blocks: Any, how: str) -> None:
        tokens = len(blocks) * self.setting.block
        self.console.print(f"[bold]{who}[/]: {tokens:,} tokens to learn from, {how}")

    def model(self, width: int, layers: int) -> LlamaForCausalLM:
        """The same weights on every call with the same sizes."""
        set_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.text.tokenizer),
                hidden_size=width,
                intermediate_size=8 * width // 3,
                num_hidden_layers=layers,
                num_attention_heads=width // 32,
                num_key_value_heads=width // 32,
                max_position_embeddings=self.setting.block,
                bos_token_id=self.text.tokenizer.bos_token_id,
                eos_token_id=self.text.tokenizer.eos_token_id,
            )
        )

    def fitting(self, steps: int, seconds: float, runs: list[tuple[Any, Any, int]]) -> int:
        """``steps``, or as many as ``runs`` (sizes, teacher, how many of them) can do in time."""
        cost = 0.0
        for sizes, teacher, times in runs:
            loss = None if teacher is None else LOSSES["kd"]
            watch = self.experiment.train(
                *("measuring", self.model(*sizes), self.text.transfer, PROBE_STEPS),
                teacher=teacher,
                loss=loss,
            )
            cost += times * watch.seconds_per_step
        # a tenth for evaluating, and for a machine that gets busier
        return max(self.setting.evaluations, min(steps, int(0.9 * seconds / cost)))

    def train(self, name: str, model: Any, steps: int, teacher: Any = None) -> Run:
        """One of the runs, by its name."""
        size = self.setting
        data = self.text.teacher if name == "teacher" else self.text.transfer
        watch = self.experiment.train(
            *(name, model, data, steps),
            teacher=teacher,
            loss=LOSSES.get(name),
            evaluations=size.evaluations,
        )
        judged: Any = watch.card
        if judged is not None:
            self.cards[name], self.histories[name] = judged, watch.history
        elif teacher is not None:
            judged = self.experiment.judge(model, teacher)
        return Run(
            eval_loss=watch.curve[-1][2],
            agreement=None if judged is None else judged["eval_top1_agreement"],
            parameters=model.num_parameters(),
            train_seconds=watch.seconds,
            steps=steps,
            tokens=steps * size.batch * size.block,
            curve=watch.curve,
        )
