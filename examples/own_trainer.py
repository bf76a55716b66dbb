"""Your own subclass of ``transformers.Trainer`` (or TRL's ``SFTTrainer``), with two lines more.

python examples/own_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import tiny
from transformers import Trainer, TrainingArguments

from fusedkd.integrations.transformers import DistillationMixin


class MyTrainer(DistillationMixin, Trainer):
    """Whatever you have here stays."""


def main(**arguments: Any) -> list[float]:
    student, teacher = tiny.models()
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    trainer = MyTrainer(
        student, TrainingArguments(**(defaults | arguments)), train_dataset=tiny.rows()
    )
    trainer.distil_from(teacher, divergence="reverse_kl", temperature=2.0)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    losses = main()
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
