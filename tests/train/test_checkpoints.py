"""Killed at any moment of a save, a run goes on from the checkpoint before; several processes are
one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, rows, trainer
from safetensors.torch import load_file
from transformers import Trainer, TrainerState
from words import WORDS, llama, tokenizer

from fusedkd.cli import main
from fusedkd.train.checkpoints import checkpoint_of, newest


class Killed(BaseException):
    pass


def dies(method: Any, after: bool) -> Callable[..., Any]:
    """The method of the second checkpoint, before or behind which the process dies."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder = next((str(arg) for arg in args if "checkpoint-4" in str(arg)), "")
        if not folder:
            return method(self, *args, **kwargs)
        if after:
            method(self, *args, **kwargs)
        elif folder.endswith("checkpoint-4"):
            Path(folder).mkdir(exist_ok=True)
        raise Killed

    return call


def half(method: Any) -> Callable[..., Any]:
    """Writes half of the state."""

    def call(self: Any, path: str) -> None:
        method(self, path)
        if "checkpoint-4" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            raise Killed

    return call


STAGES: dict[str, tuple[type, str, Callable[[Any], Any]]] = {
    "an empty folder": (Trainer, "_save", lambda m: dies(m, after=False)),
    "weights": (Trainer, "_save", lambda m: dies(m, after=True)),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler", lambda m: dies(m, after=True)),
    "random numbers": (Trainer, "_save_rng_state", lambda m: dies(m, after=True)),
    "half a state": (TrainerState, "save_to_json", half),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_saving(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(**more: Any) -> Any:
        return trainer(
            build("llama", 1), build("llama", 2), tmp_path, rows(8), max_steps=6, save_steps=2,
            save_strategy="steps", per_device_train_batch_size=2, **more,
        )  # fmt: skip

    kind, name, wrap = STAGES[stage]
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, wrap(getattr(kind, name)))
        with pytest.raises(Killed):
            make().train()
    assert (tmp_path / "checkpoint-4").is_dir()
    last = checkpoint_of(tmp_path, "last")
    assert last == str(tmp_path / "checkpoint-2") and newest(tmp_path, 4) == Path(last)
    assert "passed over" in capsys.readouterr().err
    resumed = make()
    resumed.train(resume_from_checkpoint=last)
    assert resumed.state.global_step == 6
    assert checkpoint_of(tmp_path, "last") == str(tmp_path / "checkpoint-6")


def test_processes_of_torchrun_are_one_run(tmp_path: Path) -> None:
    """The batches, steps and student of one process that has twice the batch; one report."""
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        llama().save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    texts = [" ".join(WORDS[n % 7 :: 1 + n % 5]) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def words(out: str, batch: int) -> list[str]:  # --use_cpu is not needed
        return [
            "distill", "--teacher", str(tmp_path / "teacher"),
            "--student", str(tmp_path / "student"), "--data", str(tmp_path / "a.jsonl"),
            "--eval_share", "0.2", "--max_length", "16", "--max_steps", "3", "--optim", "sgd",
            "--learning_rate", "0.1", "--per_device_train_batch_size", str(batch),
            "--logging_steps", "1", "--save_strategy", "no", "--report_samples", "1",
            "--per_device_eval_batch_size", "3",
            "--report_new_tokens", "2", "--report_to", "none",
            "--disable_tqdm", "true", "--output_dir", str(tmp_path / out),
        ]  # fmt: skip

    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             "--no-python", sys.executable, "-c",
             "import sys; from fusedkd.cli import main; sys.exit(main(sys.argv[1:]))"]  # fmt: skip
    done = subprocess.run([*start, *words("two", 2)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Distilled") == 1 and done.stdout.count("The student") == 1
    assert main(words("one", 4)) == 0
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    before = load_file(tmp_path / "student" / "model.safetensors")
    assert any(not torch.equal(one[name], before[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    logs = [
        json.loads((tmp_path / out / "trainer_state.json").read_text()) for out in ("two", "one")
    ]
    losses = [[log["loss"] for log in state["log_history"] if "loss" in log] for state in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
    # also of a set that does not divide into their batches
    ends = [
        json.loads((tmp_path / out / "distillation.json").read_text()) for out in ("two", "one")
    ]
    for name in ("eval_loss", "eval_kd", "eval_student_accuracy"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-4), name
    assert "# By 2 processes." in (tmp_path / "two" / "run.yaml").read_text()
    assert not list((tmp_path / "two").glob("*.tmp"))
