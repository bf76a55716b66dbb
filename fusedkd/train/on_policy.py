"""Training on what the student itself writes (GKD, Agarwal et al. 2024, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

__all__ = ["OnPolicy"]


@dataclass(frozen=True)
class OnPolicy:
    """Replaces a batch, with probability ``share``, by prompts that the student has continued.

    A sequence's prompt is what comes before its last answer, which is its last run of labels; all
    of it, where there is no label; or, where every token has one, as in plain text, its first
    ``prompt`` tokens (at most half of it). Sequences that were packed into one row
    (``position_ids``) are written one by one; their prompts have two tokens or more. Labels are the
    tokens that were written, up to and with the end of text: the loss is a mean over these.

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
        found = [ids[: self._end(labelled)] for ids, labelled in _sequences(batch)]
        prompts = batch["input_ids"].new_full((len(found), max(map(len, found))), pad)
        there = torch.zeros_like(prompts)
        for row, ids in enumerate(found):
            prompts[row, -len(ids) :], there[row, -len(ids) :] = ids, 1
        return prompts, there

    def _end(self, labelled: list[bool]) -> int:
        """Where a sequence's prompt ends."""
        length = len(labelled)
        last = next((n for n in range(length, 0, -1) if labelled[n - 1]), 0)
        if not last:
            return length
        end = next((n for n in range(last, 0, -1) if not labelled[n - 1]), 0)
        return end or max(1, min(length // 2, self.prompt))

    @torch.no_grad()
    def _generate(self, model: Any, prompts: Tensor, mask: Tensor) -> Tensor:
        law = _law(model, self.temperature, self.new_tokens)
        device = model.device
        with _generates_by(model, law):
            return model.generate(
                prompts.to(device), attention_mask=mask.to(device), generation_config=law
            )


def _law(model: Any, temperature: float, new_tokens: int) -> GenerationConfig:
    """Draws from the model's own distribution: of what may be configured, only which tokens are
    special is the model's."""
    own = getattr(model, "generation_config", None)
    special = {
        name: getattr(own, name, None) for name in ("bos_token_id", "decoder_start_token_id")
    }
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        pad_token_id=_pad(model),
        eos_token_id=_ends(model) or None,
        **special,
    )


@contextmanager
def _generates_by(model: Any, law: GenerationConfig) -> Iterator[None]:
    """While open, the model has no generation config of its own: ``generate`` fills from it what
    ``law`` leaves unset (repetition penalty, min_p, suppressed tokens, beams, anything custom)."""
    own = getattr(model, "generation_config", None)
    model.generation_config = law
    try:
        yield
    finally:
        model.generation_config = own


def _sequences(batch: dict[str, Any]) -> Iterator[tuple[Tensor, list[bool]]]:
    """Ids of each sequence without padding, and which of them have a label. The first token of one
    that was packed with others has lost its label, as nothing comes before it."""
    ids, labelled = batch["input_ids"], batch["labels"] != -100
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    positions = batch.get("position_ids")
    for row in range(len(ids)):
        here = real[row].nonzero()[:, 0]
        starts = [] if positions is None else (positions[row, here] == 0).nonzero()[:, 0].tolist()
        bounds = sorted({0, *starts, len(here)})
        for places in (here[a:b] for a, b in pairwise(bounds)):
            told = labelled[row, places].tolist()
            yield ids[row, places], [told[1], *told[1:]] if starts and len(told) > 1 else told


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
    """Ids that end a text: the generation config's, which may be several, else the config's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = model.config.get_text_config().eos_token_id if own is None else own
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _pad(model: Any) -> int:
    """What fills rows up; none counts, so any id will do."""
    own = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    pad = model.config.get_text_config().pad_token_id if own is None else own
    return pad if pad is not None and pad >= 0 else next(iter(_ends(model)), 0)
