"""TRL's SFTTrainer, distilling. The five lines are in ``main``.

python examples/sft_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fusedkd.integrations.transformers import DistillationMixin


def main(tokenizer: Any = None, **arguments: Any) -> list[float]:
    student, teacher = tiny.models()
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in tiny.rows()])
    defaults: dict[str, Any] = {"output_dir": tempfile.mkdtemp(), "report_to": "none"}
    defaults |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 3e-3}
    args = SFTConfig(**(defaults | arguments))

    class DistillingSFTTrainer(DistillationMixin, SFTTrainer):
        pass

    trainer = DistillingSFTTrainer(student, args, train_dataset=data, processing_class=tokenizer)
    trainer.distil_from(teacher, divergence="forward_kl", ce_weight=0.1)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    from transformers import AutoTokenizer

    losses = main(AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B"))
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
