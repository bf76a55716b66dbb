"""A run of two processes, one of which may be killed. Run by test_hosts.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import families as tiny
import processes
import transformers as tf

from fusedkd.train import DistillationArguments, DistillationTrainer

STEPS, SAVE = 8, 2


class Kill(tf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, *args_left: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(out: Path, killed_at: int | None = None, resume: bool = False) -> list[float]:
    args = DistillationArguments(
        str(out),
        max_steps=STEPS,
        save_steps=SAVE,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        divergence="jsd",
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    kill = [] if killed_at is None else [Kill(killed_at)]
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    trainer = DistillationTrainer(
        student, teacher, args, train_dataset=tiny.rows(24), callbacks=kill
    )
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def killed(rank: int, out: Path) -> None:
    train(out, killed_at=5 if rank == 1 else None)


def resumed(rank: int, out: Path) -> tuple[list[float], list[float]]:
    """The curve after the kill, and one that nobody disturbed."""
    return train(out, resume=True), train(out.with_name("undisturbed"))


if __name__ == "__main__":
    processes.main({"killed": killed, "resumed": resumed})
