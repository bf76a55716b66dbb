"""The trainings of the evidence: teachers, then students, as many steps as there is time for."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fusedkd.cache.reader import TeacherCache
from fusedkd.demo.corpus import Corpus
from fusedkd.demo.experiment import Experiment
from fusedkd.files import write_json
from fusedkd.train.term_set import own_parameters

from .plan import (
    ACROSS,
    BASE,
    STUDENTS,
    TOP_K,
    Row,
    Setting,
    Student,
    Text,
    make_teacher,
    other_text,
    rows,
)

PROBE_STEPS = 8
TEACHERS_SHARE = 0.3  # of the time; evaluations and loading take about a tenth
WORK_SHARE = 0.9
TEXTS = ("unlimited", "limited")


class Job(NamedTuple):
    """One student to train, or (``init``) not to."""

    student: str
    text: str
    variant: str  # kd, plain, plain_time, init, "without" and a part of the loss, or of a Row
    seed: int

    @property
    def key(self) -> str:
        return "/".join(map(str, self))


class Evidence:
    """Teachers, then students, each result noted in the folder when it is there."""

    def __init__(self, size: Setting, text: Text, folder: Path, seconds: float) -> None:
        self.size, self.text, self.folder, self.seconds = size, text, folder, seconds
        self.console = Console()
        path = folder / "results.json"
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.teachers: dict[str, Any] = {}
        self.rows = rows(size)

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
                self.note(job.key, self.result(job, steps))
                self.console.print(f"{number} of {len(jobs)}: {job.key}")

    def note(self, key: str, value: Any) -> None:
        self.results[key] = value
        write_json(self.folder / "results.json", self.results)

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
            for key, row in self.rows.items() if BASE in self.students() else ():
                for variant in (row.control, row.variant):
                    yield Job(key.split("/")[0], "limited", variant, seed)

    def result(self, job: Job, steps: dict[str, int]) -> dict[str, Any]:
        for key, row in self.rows.items():
            if key.startswith(f"{job.student}/") and job.variant in (row.variant, row.control):
                return self.beside(job, row, max(2, round(row.share * steps[BASE])))
        return self.student(job, steps[job.student])

    # ---- teachers ----

    def teacher(self, kind: str) -> Any:
        """Trained, or read from the folder."""
        path = self.folder / f"teacher_{kind}"
        model = make_teacher(kind, self.size, self.text.tokenizer)
        if path.is_dir():
            return type(model).from_pretrained(path).eval()
        seconds = TEACHERS_SHARE * self.seconds / 2
        train, data = self.experiment(kind).train, self.text.train[kind]["unlimited"]
        probe = train(f"{kind}, measuring", model, data, PROBE_STEPS)
        steps = max(PROBE_STEPS, int(seconds / probe.seconds_per_step))
        model = make_teacher(kind, self.size, self.text.tokenizer)
        watch = train(f"{kind} teacher", model, data, steps, evaluations=8)
        judged = self.judge(kind, model, model)
        self.note(f"teacher/{kind}", {**judged, "steps": steps, "curve": watch.curve})
        model.save_pretrained(path)
        return type(model).from_pretrained(path).eval()  # by the name that a cache knows it by

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
        teacher, data = self.teachers[student.kind], self.text.train[student.kind]["limited"]
        model = student.build(teacher, self.size, 0)
        name = f"{student.kind}, measuring"
        return (
            self.experiment(student.kind)
            .train(name, model, data, PROBE_STEPS, teacher=teacher, loss=loss)
            .seconds_per_step
        )

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
        seconds, card = 0.0, None
        if job.variant != "init":
            name, data = f"{student.kind}, {job.text}", self.text.train[student.kind][job.text]
            experiment = self.experiment(student.kind, job.seed)
            evaluations = 0 if loss is None else 1
            watch = experiment.train(
                name, model, data, steps, teacher=teacher, loss=loss, evaluations=evaluations
            )
            seconds, card = watch.seconds, watch.card
        judged = self.judge(student.kind, model, teacher, card)
        if job.variant == "init":  # training changes no speed
            judged |= self.speed(self.size.block_of(student.kind), model=model, teacher=teacher)
        return {**judged, "steps": steps if seconds else 0, "seconds": seconds}

    # ---- rows beside ----

    @cached_property
    def other(self) -> Corpus:
        """Text of the other tokenizer."""
        return other_text(self.size)

    @cached_property
    def cache(self) -> TeacherCache:
        """The causal teacher's answers to the limited text."""
        return TeacherCache.build(
            self.folder / "cache",
            self.teachers["causal"],
            self.text.tokenizer,
            self.text.train["causal"]["limited"],
            top_k=TOP_K,
            temperatures=(self.rows[f"{BASE}/cached"].loss.get("temperature", 1.0),),
        )

    def beside(self, job: Job, row: Row, steps: int) -> dict[str, Any]:
        """One training of a row or of its control, from the same start on the same text."""
        loss = row.loss if job.variant == row.variant else row.control_loss
        live, size = self.teachers["causal"], self.size
        experiment = self.experiment("causal", job.seed)
        data, text = self.text.train["causal"]["limited"], self.other
        teacher: Any = self.cache if job.variant == "cached" else live
        if job.student == ACROSS:
            half = replace(size, layers=size.layers // 2)
            model, data = make_teacher("causal", half, text.tokenizer, job.seed), text.transfer
            both = {"processing_class": text.tokenizer}
            both["teacher_processing_class"] = self.text.tokenizer
            experiment = replace(experiment, held_out=text.held_out, tokenizers=both)
        else:
            model = STUDENTS[BASE].build(live, size, job.seed)
        name = f"{job.student}, {job.variant}"
        watch = experiment.train(name, model, data, steps, teacher=teacher, loss=loss)
        judged = experiment.judge(model, model if job.student == ACROSS else live)
        bytes_per_token = (text if job.student == ACROSS else self.text).bytes_per_token
        ce = judged["eval_loss"]
        return {
            "ce": ce,
            "bits": ce / math.log(2) / bytes_per_token,
            "kd": judged["eval_kd"],
            "steps": steps,
            "seconds": watch.seconds,
        }

    # ---- both ----

    def judge(self, kind: str, model: Any, teacher: Any, card: Any = None) -> dict[str, Any]:
        """Held-out cross-entropy, agreement and accuracies; size. A distillation's are those of
        its report card."""
        metrics = card or self.experiment(kind).judge(model, teacher)
        return {
            "ce": metrics["eval_loss"],
            "agreement": metrics["eval_top1_agreement"],
            "accuracy": metrics["eval_student_accuracy"],
            "parameters": own_parameters(model),
        }

    def experiment(self, kind: str, seed: int = 0) -> Experiment:
        """Trainings of one kind of model; ``seed`` is of the data's order and the masks."""
        size = self.size
        options = {"learning_rate": size.learning_rate, "weight_decay": 0.01, "seed": seed}
        return Experiment(
            self.folder / "work",
            self.console,
            self.text.held_out[kind],
            size.batch_of(kind),
            options,
            self.text.collate,
        )

    def speed(self, block: int, **models: Any) -> dict[str, float]:
        """Of one block at batch 1, both models in turn: medians of 40 forwards after 3."""
        ids, times = torch.zeros(1, block, dtype=torch.long), {name: [] for name in models}
        with torch.inference_mode():
            for _ in range(43):
                for name, model in models.items():
                    began = time.perf_counter()
                    model.eval()(ids)
                    times[name].append(1e3 * (time.perf_counter() - began))
        ms = {name: statistics.median(forwards[3:]) for name, forwards in times.items()}
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
