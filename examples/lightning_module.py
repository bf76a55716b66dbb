"""A Lightning module that trains.

python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import tiny
import torch

from fusedkd import hf


class Distillation(lightning.LightningModule):
    """``teacher`` stays out of the checkpoint: it is not a submodule. Several processes call
    ``training_step`` within the forward of what wraps this module, so the loss is safe there."""

    def __init__(self, student: Any, teacher: Any, **loss: Any) -> None:
        super().__init__()
        self.student, self.keywords = student, loss
        self._teacher = (teacher,)

    def on_fit_start(self) -> None:
        self._teacher[0].to(self.device)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        count = hf.normalizer(self.student, [batch])  # over all processes
        loss, _ = hf.distill(
            self.student, self._teacher[0], batch, normalizer=count, **self.keywords
        )
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=3e-3)


def main(epochs: int = 3) -> list[float]:
    student, teacher = tiny.models()
    module = Distillation(student, teacher, divergence="jsd", temperature=2.0, ce_weight=0.1)
    data = torch.utils.data.DataLoader(tiny.rows(), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    losses = []
    for epoch in range(epochs):
        trainer.fit_loop.max_epochs = epoch + 1
        trainer.fit(module, data)
        losses.append(float(trainer.callback_metrics["loss"]))
    print(f"loss: {losses[0]:.4f} after the first epoch, {losses[-1]:.4f} after the last")
    return losses


if __name__ == "__main__":
    main()
