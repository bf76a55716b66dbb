"""Do the objectives across two tokenizers help? A teacher with a BPE of 4,000 tokens and a student
with one of 1,000, and the other way round, on the demo's text: held-out bits per byte.

``python -m fusedkd.benchmarks.across [--seeds 3] [--teacher-steps 900] [--steps 450] [--output F]``

Each student starts from the same weights and is trained on the same little text: on the labels
alone (plain), for as many steps and for as long as the objective took; with cross-entropy and alm,
shared_kl, both, alm at T = 1, or ULD (the sorted probabilities of TRL's GOLD, spans merged as it
does); and with a teacher that has the student's own tokenizer, which says how large the gap is.
Results are noted in the file as they come, and those that are there, of as many steps, are not
computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from fusedkd import LMHead, token_log_probs
from fusedkd.alignment.likelihood import span_sums
from fusedkd.demo.corpus import Corpus, corpus
from fusedkd.demo.experiment import QUIET
from fusedkd.demo.run import SMOKE, Setting
from fusedkd.files import write_json
from fusedkd.teachers.aligned import Aligned
from fusedkd.train import DistillationArguments, DistillationTrainer
from fusedkd.train.meter import Measured
from fusedkd.train.targets import Targets

SIZES = (4_000, 1_000)
MINI = Setting(
    teacher_bytes=1_500_000,
    transfer_tokens=30_000,
    held_out_blocks=48,
    block=64,
    teacher=(96, 2),
    student=(64, 2),
)
MINI_SIZES = (2_000, 600)
ACROSS: dict[str, dict[str, Any]] = {
    "alm": {"cross_tokenizer": "alm", "ce_weight": 1.0},
    "shared_kl": {"cross_tokenizer": "shared_kl", "ce_weight": 1.0},
    "both": {"cross_tokenizer": "both", "ce_weight": 1.0},
    "alm at T = 1": {"cross_tokenizer": "alm", "ce_weight": 1.0, "alm_temperature": 1.0},
    "uld": {"cross_tokenizer": "alm", "ce_weight": 1.0},
}
OWN = {"kd_weight": 1.0, "ce_weight": 1.0}


class Uld(DistillationTrainer):
    """Cross-entropy and the L1 distance of sorted probabilities, where spans begin (Boizard et al.
    2024, arXiv 2402.12030; TRL 1.16, ``ULDLoss`` with ``token_merge_strategy="observed"``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        exact: Any = self._objective

        def objective(student: Any, teacher: Any, targets: Targets) -> tuple[Tensor, Measured]:
            if not targets.training:
                return exact(student, teacher, targets)
            ce = token_log_probs(student, targets.labels).log_probs.sum() / -_count(targets)
            return ce + uld(student, teacher, targets), {}

        objective.numbers = exact.numbers  # type: ignore[attr-defined]
        self._objective = objective  # type: ignore[assignment]


def uld(student: Any, teacher: Aligned, targets: Targets) -> Tensor:
    """The distances of the step's spans by the number of its labels, as the other objectives."""
    there = teacher.student_spans[..., 0] >= 0
    ours = merged(student, teacher.student_spans, targets.labels)
    assert isinstance(teacher.side, LMHead)
    with torch.no_grad():
        theirs = merged(teacher.side, teacher.teacher_spans, teacher.labels)
    width = max(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (
        F.pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (ours, theirs)
    )
    return (ours - theirs).abs().sum(-1).where(there, 0.0).sum() / _count(targets)


def merged(side: LMHead, spans: Tensor, labels: Tensor) -> Tensor:
    """(B, M, V) probabilities where spans begin, times those of the tokens that end them."""
    logs = (side.hidden @ side.weight.T).float().log_softmax(-1)
    said = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    rest = torch.where(spans[..., :1] >= 0, spans + torch.tensor([1, 0]), spans)
    first = spans[..., 0].clamp(min=0)[..., None].expand(*spans.shape[:2], logs.shape[-1])
    return (logs.gather(1, first) + span_sums(said, rest)[..., None]).exp()


def _count(targets: Targets) -> Any:
    if targets.num_items is not None:
        return targets.num_items
    return (targets.labels != -100).sum().clamp(min=1)


class Direction:
    """A teacher of one vocabulary, students of another."""

    def __init__(self, setting: Setting, teacher: int, student: int, work: Path) -> None:
        self.setting, self.work = setting, work
        self.texts: dict[int, Corpus] = {
            size: corpus(Setting(**{**vars(setting), "vocabulary": size}))
            for size in (teacher, student)
        }
        self.teacher_size, self.student_size = teacher, student
        self.teachers: dict[int, Any] = {}

    def model(self, vocabulary: int, shape: tuple[int, int]) -> Any:
        width, layers = shape
        config = LlamaConfig(
            vocab_size=len(self.texts[vocabulary].tokenizer), hidden_size=width,
            intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=8 * self.setting.block,
            tie_word_embeddings=True,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def teacher(self, vocabulary: int, steps: int) -> Any:
        """Trained on the large text, once."""
        if vocabulary not in self.teachers:
            set_seed(0)
            model = self.model(vocabulary, self.setting.teacher)
            rows = self.texts[vocabulary].teacher
            self.train(model, None, vocabulary, vocabulary, rows, steps, None)
            self.teachers[vocabulary] = model
        return self.teachers[vocabulary]

    def student(self, name: str, seed: int, steps: int, teacher_steps: int) -> dict[str, float]:
        """Bits per byte, and the processor seconds of a step."""
        set_seed(seed)
        pupil = self.model(self.student_size, self.setting.student)
        across = name in ACROSS
        vocabulary = self.teacher_size if across else self.student_size
        plain = name.startswith("plain")
        teacher = None if plain else self.teacher(vocabulary, teacher_steps)
        loss = None if plain else ACROSS.get(name, OWN)
        kind = Uld if name == "uld" else DistillationTrainer
        rows = self.texts[self.student_size].transfer
        return self.train(
            pupil, teacher, self.student_size, vocabulary, rows, steps, loss, kind, seed
        )

    def train(
        self, model: Any, teacher: Any, ours: int, theirs: int, rows: Any, steps: int, loss: Any,
        kind: Any = DistillationTrainer, seed: int = 0,
    ) -> dict[str, float]:  # fmt: skip
        """A plain student is transformers' Trainer's, and pays for nothing that it does not use."""
        options: dict[str, Any] = {
            "output_dir": str(self.work),
            "per_device_train_batch_size": self.setting.batch,
            "max_steps": steps,
            "seed": seed,
            "learning_rate": self.setting.learning_rate,
            **QUIET,
        }
        given = {"train_dataset": rows, "data_collator": default_data_collator}
        trainer: Any
        if loss is None:
            trainer = Trainer(model, TrainingArguments(**options), **given)
        else:
            arguments = DistillationArguments(**options, metrics="none", **loss)
            given["processing_class"] = self.texts[ours].tokenizer
            given["teacher_processing_class"] = self.texts[theirs].tokenizer
            trainer = kind(model, teacher, arguments, **given)
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()  # of this process: others may share the cores
        trainer.train()
        seconds = (time.process_time() - began) / steps
        return {"bits": self.bits(model, ours), "seconds": seconds}

    @torch.no_grad()
    def bits(self, model: Any, vocabulary: int) -> float:
        """Held-out bits per byte."""
        text, device = self.texts[vocabulary], next(model.parameters()).device
        model.eval()
        nats = []
        for rows in text.held_out.with_format("torch").iter(self.setting.batch):
            ids = rows["input_ids"].to(device)
            nats += [float(model(input_ids=ids, labels=ids).loss)] * len(ids)
        return statistics.mean(nats) / math.log(2) / text.bytes_per_token


def jobs(seeds: int) -> Iterator[tuple[int, str]]:
    """Plain students come last, for as long as the others took."""
    for seed in range(seeds):
        for name in ("plain", *ACROSS, "own tokenizer"):
            yield seed, name
        for name in ACROSS:
            yield seed, f"plain, as long as {name}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--output", type=Path, default=Path("across.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny models: that it works")
    parser.add_argument("--mini", action="store_true", help="ten minutes, one seed")
    flags = parser.parse_args()
    setting = SMOKE if flags.smoke else MINI if flags.mini else Setting()
    sizes = (320, 280) if flags.smoke else MINI_SIZES if flags.mini else SIZES
    if flags.mini:
        flags.seeds, flags.teacher_steps, flags.steps = 1, 400, 250
    results = json.loads(flags.output.read_text()) if flags.output.is_file() else {}
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        for teacher, student in (sizes, sizes[::-1]):
            pair = f"{teacher} to {student}"
            found = results.setdefault(pair, {})
            direction = Direction(setting, teacher, student, Path(work))
            for seed, name in jobs(flags.seeds):
                key = f"{name}/{seed}"
                settings = {"steps": flags.steps, "teacher_steps": flags.teacher_steps}
                if settings.items() <= found.get(key, {}).items():
                    continue
                steps = flags.steps
                if name.startswith("plain,"):
                    other = found[f"{name.removeprefix('plain, as long as ')}/{seed}"]["seconds"]
                    steps = max(1, round(steps * other / found[f"plain/{seed}"]["seconds"]))
                told = direction.student(name, seed, steps, flags.teacher_steps)
                found[key] = settings | told
                write_json(flags.output, results)
    show(results, flags.seeds)


def show(results: dict[str, Any], seeds: int) -> None:
    """A table for each direction: mean and spread over seeds, and the share of the gap closed."""
    for pair, found in results.items():
        table = Table("student", "bits per byte", "gap closed", "time of a step", title=pair)

        def mean(name: str, what: str = "bits", found: Any = found) -> float:
            return statistics.mean(found[f"{name}/{seed}"][what] for seed in range(seeds))

        gap = mean("plain") - mean("own tokenizer")
        for name in dict.fromkeys(name for _, name in jobs(seeds)):
            bits = [found[f"{name}/{seed}"]["bits"] for seed in range(seeds)]
            spread = max(bits) - min(bits)
            closed = (mean("plain") - mean(name)) / gap if gap else math.nan
            slower = mean(name, "seconds") / mean("plain", "seconds")
            table.add_row(
                name, f"{mean(name):.4f} ({spread:.4f})", f"{closed:.0%}", f"{slower:.2f}x"
            )
        Console().print(table)


if __name__ == "__main__":
    main()
