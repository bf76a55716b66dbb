"""What a run leaves behind: whether it worked, and how to do it again."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from families import build
from families import trainer as make_trainer
from huggingface_hub import ModelCard
from words import WORDS, llama, tokenizer

from fusedkd.cli import main
from fusedkd.train.report.card import gap_closed, verdict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        llama().save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    draw = random.Random(0)
    rows = [json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) for _ in range(30)]
    (root / "text.jsonl").write_text("\n".join(rows))
    return root


def distil(disk: Path, out: Path, *more: str) -> int:
    return main([
        "distill", "--teacher", str(disk / "teacher"), "--student", str(disk / "student"),
        "--data", str(disk / "text.jsonl"), "--eval_share", "0.2", "--max_length", "16",
        "--max_steps", "6", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4",
        "--logging_steps", "2", "--save_strategy", "no", "--report_new_tokens", "4",
        "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true",
        "--output_dir", str(out), *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def done(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    assert distil(disk, out) == 0
    return out


def card_of(out: Path) -> Any:
    return json.loads((out / "distillation.json").read_text())


def test_the_report_tells_what_was_learned(done: Path) -> None:
    card = card_of(done)
    assert card["eval_kd"] < card["before"]["eval_kd"] and card["verdict"].startswith("The student")
    assert card["before"]["step"] == 0 and card["eval_teacher_loss"] > 0 and card["steps"] == 6
    speed = card["speed"]
    shares = [speed[f"{name}_share"] for name in ("teacher", "student", "loss")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert speed["labels_per_second"] > 0 and speed["peak_bytes"] > 2**20
    assert {len(texts) for texts in card["samples"].values()} == {5}
    assert card["samples"].keys() == {"prompt", "teacher", "before", "after"}
    text = (done / "report.md").read_text()
    assert card["verdict"] in text and "| cross-entropy, nats per token |" in text
    assert (done / "curves.png").read_bytes().startswith(b"\x89PNG")
    model_card = ModelCard.load(done / "README.md")
    assert model_card.data.tags == ["distillation", "fusedkd"]
    assert not list(done.glob("*.tmp"))


def test_the_teachers_loss_is_its_own(disk: Path, tmp_path: Path) -> None:
    """And is measured once."""
    student, teacher = build("llama", 1), build("llama", 2)
    tested = make_trainer(student, teacher, tmp_path)
    first, second = tested.evaluate(), tested.evaluate()
    itself = make_trainer(teacher, student, tmp_path).evaluate()
    assert first["eval_teacher_loss"] == pytest.approx(itself["eval_loss"], rel=1e-5)
    assert "eval_teacher_loss" not in second


def test_a_run_is_repeated_from_its_file(done: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["distill", "--config", str(done / "run.yaml"), "--output_dir", str(again)]) == 0
    for name in ("model.safetensors", "samples.json"):
        assert (done / name).read_bytes() == (again / name).read_bytes()
    assert card_of(done)["eval_loss"] == card_of(again)["eval_loss"]


def test_changed_flags_are_shown_when_a_run_goes_on(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saving = tmp_path / "out", ("--save_strategy", "steps", "--save_steps", "3")
    assert distil(disk, out, *saving, "--max_steps", "3") == 0
    before = card_of(out)["before"], card_of(out)["samples"]["before"]
    capsys.readouterr()
    more = ("--learning_rate", "1e-3", "--resume_from_checkpoint", "last")
    assert distil(disk, out, *saving, *more, "--per_device_train_batch_size", "2") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed")]
    assert [line.split("--")[1].split()[0] for line in said] == [
        "learning_rate", "max_steps", "per_device_train_batch_size"
    ]  # fmt: skip
    assert "0.01 -> 0.001" in said[0]
    assert (card_of(out)["before"], card_of(out)["samples"]["before"]) == before
    assert card_of(out)["steps"] == 6


def test_nothing_learned_is_said(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distil(disk, tmp_path / "out", "--learning_rate", "0") == 0
    assert "Nothing was learned" in capsys.readouterr().out
    assert "Nothing was learned" in (tmp_path / "out" / "report.md").read_text()


def test_what_costs_time_can_be_left_out(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "README.md").write_text("mine")
    assert distil(disk, tmp_path / "short", "--report", "short") == 0
    assert distil(disk, tmp_path / "none", "--report", "none", "--eval_share", "0") == 0
    short, none = card_of(tmp_path / "short"), card_of(tmp_path / "none")
    assert not short["before"] and not short["samples"] and short["eval_teacher_loss"]
    assert (tmp_path / "short" / "README.md").read_text() == "mine"
    assert not (tmp_path / "none" / "report.md").exists() and "eval_loss" not in none
    assert "training loss" in none["verdict"]


def test_lm_eval_is_asked_for_scores(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "lm_eval" not in sys.modules:
        assert distil(disk, tmp_path / "out", "--eval_tasks", "hellaswag") == 2
        assert "pip install lm-eval" in capsys.readouterr().err
    module: Any = ModuleType("lm_eval")
    module.__spec__ = SimpleNamespace()
    module.simple_evaluate = lambda model, tasks: {
        "results": {task: {"acc,none": 0.25, "acc_stderr,none": 0.1} for task in tasks}
    }
    hosts: Any = ModuleType("lm_eval.models.huggingface")
    hosts.HFLM = lambda pretrained, tokenizer: pretrained
    names = {"lm_eval": module, "lm_eval.models": ModuleType("m"), hosts.__name__: hosts}
    for name, found in names.items():
        monkeypatch.setitem(sys.modules, name, found)
    assert distil(disk, tmp_path / "out", "--eval_tasks", "hellaswag", "--max_steps", "1") == 0
    assert "lm-eval, hellaswag: acc 0.2500" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("before", "after", "teacher", "said"),
    [
        ((4.0, 1.0), (3.0, 0.5), 2.0, "50% of the way"),
        ((4.0, 1.0), (3.0, 0.5), 5.0, "The student learned"),
        ((4.0, 1.0), (4.5, 0.5), 2.0, "predicts no better"),
        ((4.0, 1.0), (4.0, 1.0), 2.0, "Nothing was learned"),
        ((4.0, 1.0), (4.1, 1.1), None, "Nothing was learned"),
        ((4.0, 1.0), (float("nan"), 0.5), 2.0, "not a finite number"),
    ],
)
def test_verdicts(before: Any, after: Any, teacher: float | None, said: str) -> None:
    first, last = (
        dict(zip(("eval_loss", "eval_kd"), pair, strict=True)) for pair in (before, after)
    )
    assert said in verdict([], first, last, teacher)


def test_without_a_gap_none_is_closed() -> None:
    assert gap_closed(2.0, 1.0, 3.0) is None and gap_closed(None, 1.0, 3.0) is None
    assert gap_closed(4.0, 3.0, 2.0) == pytest.approx(0.5)


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    done: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = Path(shutil.copytree(done, tmp_path / "out"))
    before = (out / "report.md").read_text()
    import os

    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "report.md":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert distil(disk, out, "--max_steps", "1") == 2
    assert "report.md cannot be written" in capsys.readouterr().err
    assert (out / "report.md").read_text() == before and not list(out.glob("*.tmp"))


def test_a_run_that_is_stopped_leaves_its_log_and_no_student(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    teacher = llama()
    with torch.no_grad():
        teacher.model.norm.weight.fill_(float("nan"))
    teacher.save_pretrained(tmp_path / "broken")
    tokenizer().save_pretrained(tmp_path / "broken")
    out = tmp_path / "out"
    assert distil(disk, out, "--teacher", str(tmp_path / "broken")) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "the teacher's answers" in said.lower()
    assert not list(out.glob("*.safetensors")) and not (out / "distillation.json").exists()
    assert main(["doctor", "--run", str(out)]) == 1
    assert "stopped at evaluation at step 0" in capsys.readouterr().out
