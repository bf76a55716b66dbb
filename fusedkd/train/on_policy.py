"""Training on what the student itself writes (GKD, Agarwal et al. 2024, arXiv 2306.13649)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

__all__ = ["OnPolicy"]


@dataclass(frozen=True)
class OnPolicy:
    """Replaces a batch, with probability ``share``, by prompts that the student has continued.

    A row's prompt is what comes before its first label, or, where every token has a label, its
    first ``prompt`` tokens (at most half of it). Labels are the tokens that were written, up to and
    with the end of text: the loss is a mean over these.

    Args:
        share: GKD's lambda, 0 to 1.
        prompt: tokens.
        new_tokens: written at most.
        temperature: to sample at.

    Raises:
        ValueError: a number out of range.
    """

    share: float
    prompt: int
    new_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"on_policy_share={self.share}: expected a share from 0 to 1.")
        for name in ("prompt", "new_tokens", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"on_policy_{name}={getattr(self, name)}: expected more than 0.")

    def __call__(self, model: Any, batch: dict[str, Any], seed: int) -> dict[str, Any]:
        """The batch, or one that ``model`` has written: which, and what, depends on ``seed`` alone,
        so that a run that is resumed goes on as it would have."""
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            if torch.rand(()).item() >= self.share:
                return batch
            return self._write(model, batch)

    def _write(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        prompts, mask = self._prompts(batch, _pad(model))
        training = model.training
        model.eval()
        try:
            written = self._generate(model, prompts, mask)
        finally:
            model.train(training)
        return _batch(written, mask, _ends(model))

    def _prompts(self, batch: dict[str, Any], pad: int) -> tuple[Tensor, Tensor]:
        """(B, P) ids and mask, padded on the left."""
        ids, labelled = batch["input_ids"], batch["labels"] != -100
        real = batch.get("attention_mask", torch.ones_like(ids)).int()
        begin, first = real.argmax(1), labelled.int().argmax(1)
        half = (real.sum(1) // 2).clamp(min=1, max=self.prompt)
        end = torch.where(labelled.any(1) & (first > begin), first, begin + half)
        spans = list(zip(begin.tolist(), end.tolist(), strict=True))
        prompts = ids.new_full((len(ids), max(e - b for b, e in spans)), pad)
        there = torch.zeros_like(prompts)
        for row, (b, e) in enumerate(spans):
            prompts[row, b - e :], there[row, b - e :] = ids[row, b:e], 1
        return prompts, there

    @torch.no_grad()
    def _generate(self, model: Any, prompts: Tensor, mask: Tensor) -> Tensor:
        config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.new_tokens,
            pad_token_id=_pad(model),
            eos_token_id=_ends(model) or None,
        )
        device = model.device
        return model.generate(
            prompts.to(device), attention_mask=mask.to(device), generation_config=config
        )


def _batch(written: Tensor, mask: Tensor, ends: list[int]) -> dict[str, Tensor]:
    """Ids, mask and labels, padded on the right, as in every other batch."""
    mask = mask.to(written.device)
    new = written[:, mask.shape[1] :]
    end = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    kept = end.cumsum(1) - end.int() == 0  # up to and with the first end of text
    real = torch.cat([mask.bool(), kept], 1)
    labels = torch.cat([torch.full_like(mask, -100), new.masked_fill(~kept, -100)], 1)
    order = (~real).int().argsort(dim=1, stable=True)
    return {
        "input_ids": written.gather(1, order),
        "attention_mask": real.long().gather(1, order),
        "labels": labels.gather(1, order),
    }


def _ends(model: Any) -> list[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = model.config.get_text_config().eos_token_id if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _pad(model: Any) -> int:
    pad = model.config.get_text_config().pad_token_id
    return pad if pad is not None else next(iter(_ends(model)), 0)
