"""Does it help? Students of the recipes on real text, each with three controls, over seeds.

    python -m fusedkd.benchmarks.evidence --output outputs/evidence --minutes 60

A BERT-style and a GPT-style teacher are trained on the standard library's sources, then students of
four kinds, with all of the text and with little of it: with distillation; without it for as many
steps; without it for as long; and not trained at all. Every result is written as soon as it is
there, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from fusedkd.demo.watch import Watch
from fusedkd.train import DistillationArguments, DistillationTrainer
from fusedkd.train.term_set import own_parameters

from .evidence_plan import SMOKE, STUDENTS, Setting, Student, Text, make_teacher, make_text
from .evidence_report import write_report
from .results import write_atomically

PROBE_STEPS = 8
TEACHERS_SHARE = 0.3  # of the time; evaluations and loading take about a tenth
WORK_SHARE = 0.9
TEXTS = ("unlimited", "limited")


class Job(NamedTuple):
    """One student to train, or (``init``) not to."""

    student: str
    text: str
    variant: str  # kd, plain, plain_time, init, or "without" and a part of the loss
    seed: int

    @property
    def key(self) -> str:
        return "/".join(map(str, self))


def main() -> None:
    """Run everything that is not there yet; write ``results.json``, ``report.md`` and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/evidence"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, help="default: 3")
    parser.add_argument("--smoke", action="store_true", help="tiny: only shows that it works")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    size = SMOKE if args.smoke else Setting()
    size = size if args.seeds is None else replace(size, seeds=args.seeds)
    evidence = _Evidence(size, make_text(size), args.output, 60 * args.minutes)
    evidence.run()
    write_report(args.output, evidence.results, size.__dict__)


class _Evidence:
    def __init__(self, size: Setting, text: Text, folder: Path, seconds: float) -> None:
        self.size, self.text, self.folder, self.seconds = size, text, folder, seconds
        self.console = Console()
        path = folder / "results.json"
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.teachers: dict[str, Any] = {}

    def run(self) -> None:
        for kind in ("causal", "masked"):
            self.teachers[kind] = self.teacher(kind)
            if not self.learnt(kind):
                self.console.print(
                    f"[bold]The {kind} teacher has learnt next to nothing: no students."
                )
        steps = self.results.get("steps") or self.affordable()
        self.note("steps", steps)
        self.note("facts", self.facts())
        jobs = list(self.jobs())
        for number, job in enumerate(jobs, 1):
            if job.key not in self.results:
                self.note(job.key, self.student(job, steps[job.student]))
                self.console.print(f"{number} of {len(jobs)}: {job.key}")

    def note(self, key: str, value: Any) -> None:
        self.results[key] = value
        content = json.dumps(self.results, indent=1) + "\n"
        write_atomically(self.folder / "results.json", content.encode())

    def learnt(self, kind: str) -> bool:
        """Whether the teacher knows more than how frequent tokens are."""
        ce = self.results[f"teacher/{kind}"]["ce"]
        return bool(ce < self.size.learnt * self.text.unigram(kind))

    def students(self) -> dict[str, Student]:
        """Those with a teacher."""
        return {name: s for name, s in STUDENTS.items() if self.learnt(s.kind)}

    def jobs(self) -> Iterator[Job]:
        """Every seed of everything before the next: what is there when time runs out is whole."""
        for seed in range(self.size.seeds):
            for name, student in self.students().items():
                for text in TEXTS:
                    for variant in ("init", "kd", "plain", "plain_time"):
                        yield Job(name, text, variant, seed)
                for part in student.without:
                    yield Job(name, "limited", f"without {part}", seed)

    # ---- teachers ----

    def teacher(self, kind: str) -> Any:
        """Trained, or read from the folder."""
        path = self.folder / f"teacher_{kind}"
        model = make_teacher(kind, self.size, self.text.tokenizer)
        if path.is_dir():
            return type(model).from_pretrained(path).eval()
        seconds = TEACHERS_SHARE * self.seconds / 2
        cost = self.train(kind, model, None, None, "unlimited", PROBE_STEPS, 0).seconds_per_step
        steps = max(PROBE_STEPS, int(seconds / cost))
        model = make_teacher(kind, self.size, self.text.tokenizer)
        watch = self.train(kind, model, None, None, "unlimited", steps, 0, evaluations=8)
        found = self.judge(kind, model, model)
        self.note(f"teacher/{kind}", {**found, "steps": steps, "curve": watch.curve})
        model.save_pretrained(path)
        return model.eval()

    # ---- students ----

    def affordable(self) -> dict[str, int]:
        """How many steps every student can have: the time goes by the number of its trainings."""
        seconds = (WORK_SHARE - TEACHERS_SHARE) * self.seconds
        jobs = [job for job in self.jobs() if job.variant != "init"]
        steps = {}
        for name, student in self.students().items():
            plain, kd = self.probe(student, None), self.probe(student, student.loss)
            mine = [job for job in jobs if job.student == name]
            cost = sum(plain if job.variant == "plain" else kd for job in mine)
            steps[name] = max(2, int(seconds * len(mine) / len(jobs) / cost))
        return steps

    def probe(self, student: Student, loss: Any) -> float:
        teacher = self.teachers[student.kind]
        model = student.build(teacher, self.size, 0)
        watch = self.train(student.kind, model, teacher, loss, "limited", PROBE_STEPS, 0)
        return watch.seconds_per_step

    def student(self, job: Job, steps: int) -> dict[str, Any]:
        student = STUDENTS[job.student]
        teacher = self.teachers[student.kind]
        part = job.variant.removeprefix("without ")
        random = part == "initialisation"
        model = student.build(teacher, self.size, job.seed, random)
        loss = {"kd": student.loss}.get(job.variant, student.without.get(part))
        if job.variant == "plain_time":
            kd, plain = (self.results[job._replace(variant=v).key] for v in ("kd", "plain"))
            steps = max(steps, round(steps * kd["seconds"] / plain["seconds"]))
        seconds = 0.0
        if job.variant != "init":
            watch = self.train(student.kind, model, teacher, loss, job.text, steps, job.seed)
            seconds = watch.seconds
        found = self.judge(student.kind, model, teacher)
        if job.variant == "init":  # training changes no speed
            found |= self.speed(self.size.block_of(student.kind), model=model, teacher=teacher)
        return {**found, "steps": steps if seconds else 0, "seconds": seconds}

    # ---- both ----

    def train(
        self, kind: str, model: Any, teacher: Any, loss: Any, text: str, steps: int, seed: int,
        evaluations: int = 0,
    ) -> Watch:  # fmt: skip
        """With a loss: distilled from ``teacher``; without: what its own forward calls loss."""
        watch = Watch(f"{kind}, {text}", self.console)
        common: dict[str, Any] = self.common(kind, steps, seed) | {
            "eval_strategy": "steps" if evaluations else "no",
            "eval_steps": max(1, steps // max(evaluations, 1)),
        }
        data = {
            "train_dataset": self.text.train[kind][text],
            "eval_dataset": self.text.held_out[kind],
            "data_collator": _Collator(self.text.masking()),
            "callbacks": [watch],
        }
        if loss is None:
            trainer: Trainer = Trainer(model, TrainingArguments(**common), **data)
        else:
            trainer = DistillationTrainer(
                model, teacher, DistillationArguments(**common, **loss), **data
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watch

    def common(self, kind: str, steps: int, seed: int) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "work"),
            "max_steps": steps,
            "per_device_train_batch_size": self.size.batch_of(kind),
            "per_device_eval_batch_size": 4 * self.size.batch_of(kind),
            "learning_rate": self.size.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "weight_decay": 0.01,
            "seed": seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

    def judge(self, kind: str, model: Any, teacher: Any) -> dict[str, Any]:
        """Held-out cross-entropy, agreement and accuracies; size."""
        copy = type(teacher)(teacher.config)  # a teacher may judge itself: nothing is shared
        copy.load_state_dict(teacher.state_dict())
        args = DistillationArguments(**self.common(kind, 1, 0))
        judge = DistillationTrainer(
            model, copy, args, eval_dataset=self.text.held_out[kind],
            data_collator=default_data_collator,
        )  # fmt: skip
        judge.remove_callback(PrinterCallback)
        found = judge.evaluate()
        return {
            "ce": found["eval_loss"],
            "agreement": found["eval_top1_agreement"],
            "accuracy": found["eval_student_accuracy"],
            "parameters": own_parameters(model),
        }

    def speed(self, block: int, **models: Any) -> dict[str, float]:
        """Of one block at batch 1, both models in turn: medians of 40 forwards after 3."""
        ids, times = torch.zeros(1, block, dtype=torch.long), {name: [] for name in models}
        with torch.inference_mode():
            for _ in range(43):
                for name, model in models.items():
                    began = time.perf_counter()
                    model.eval()(ids)
                    times[name].append(1e3 * (time.perf_counter() - began))
        ms = {name: statistics.median(seen[3:]) for name, seen in times.items()}
        return {"inference_ms": ms["model"], "speedup": ms["teacher"] / ms["model"]}

    def facts(self) -> dict[str, Any]:
        return {
            "bytes_per_token": self.text.bytes_per_token,
            "chance": {kind: self.text.chance(kind) for kind in self.text.held_out},
            "unigram": {kind: self.text.unigram(kind) for kind in self.text.held_out},
            "tokens": {
                name: len(blocks) * self.size.block
                for name, blocks in self.text.train["causal"].items()
            },
        }


class _Collator:
    """Masks what has no labels; causal rows have theirs, held-out ones were masked once."""

    def __init__(self, masking: Any) -> None:
        self.masking = masking

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return default_data_collator(rows) if "labels" in rows[0] else self.masking(rows)


if __name__ == "__main__":
    main()
