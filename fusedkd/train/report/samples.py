"""What teacher and student write after the same prompts, before and after the training."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from fusedkd.files import read_json, write_json
from fusedkd.train.on_policy import OnPolicy, greedy, write

logger = logging.getLogger(__name__)

_PROMPT = 32  # tokens of a text, where labels do not tell where a prompt ends


class Samples(TrainerCallback):
    """Continuations of held-out prompts, in ``samples.json``: the teacher's and the untrained
    student's are written when the training begins, and kept by a run that is resumed."""

    def __init__(self, trainer: Any, count: int, new_tokens: int) -> None:
        self.trainer, self.count, self.new_tokens = trainer, count, new_tokens
        self.path = Path(trainer.args.output_dir) / "samples.json"
        self.texts: dict[str, list[str]] = {}

    @property
    def possible(self) -> bool:
        """Only a whole decoder with a tokenizer writes; FSDP and ZeRO have it in parts."""
        trainer = self.trainer
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        can = trainer.writes and hasattr(trainer.processing_class, "decode")
        return bool(self.count and can and not sharded and trainer.is_world_process_zero())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's hook."""
        if not self.possible:
            return
        if state.global_step:  # resumed
            self.texts = read_json(self.path) or {}
            return
        self._continue("before", self.trainer.accelerator.unwrap_model(self.trainer.model))
        # one with another tokenizer cannot read the student's prompts
        same = self.trainer.args.cross_tokenizer is None
        teacher = self.trainer.teacher
        if same and isinstance(teacher, nn.Module) and hasattr(teacher, "generate"):
            self._continue("teacher", teacher)
        self._save()

    def finish(self) -> dict[str, list[str]]:
        """The trained student's; all of them."""
        if self.possible:
            self._continue("after", self.trainer.accelerator.unwrap_model(self.trainer.model))
            self._save()
        return self.texts

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.texts)

    def _continue(self, who: str, model: Any) -> None:
        """A model that cannot write is no reason to end a run."""
        try:
            self._write(who, model)
        except Exception as error:  # of a model's own generate, which may be anybody's
            logger.warning("no samples of %s: %s: %s", who, type(error).__name__, error)
            self.count = 0

    def _write(self, who: str, model: Any) -> None:
        rows = self.trainer.eval_dataset
        rows = self.trainer.train_dataset if rows is None else rows
        rows = list(islice(rows, self.count))
        batch = self.trainer.data_collator(rows)
        prompts, mask = OnPolicy(0.0, _PROMPT, 1, 1.0).prompts(batch, pad=0)
        trained = model.training
        model.eval()
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            written = write(model, prompts, mask, greedy(model, self.new_tokens), {})
        model.train(trained)
        begin = mask.shape[1]
        decode = self.trainer.processing_class.decode
        if "prompt" not in self.texts:
            self.texts["prompt"] = [
                decode(ids[kept.bool()].tolist()) for ids, kept in zip(prompts, mask, strict=True)
            ]
        self.texts[who] = [
            decode(ids[begin:].tolist(), skip_special_tokens=True) for ids in written.cpu()
        ]
