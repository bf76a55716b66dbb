"""Training on what the student itself writes (GKD, Agarwal et al. 2024, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fusedkd.errors import UserError
from fusedkd.models.columns import columns, spans
from fusedkd.models.positions import most_positions


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
        prompts, mask = self.prompts(batch, _pad(model))
        most = None if model.config.is_encoder_decoder else most_positions(model.config)
        if most is not None and prompts.shape[1] + self.new_tokens > most:
            raise UserError(
                f"on_policy_new_tokens={self.new_tokens} after a prompt of {prompts.shape[1]}: the "
                f"student has {most} positions: expected fewer, or shorter prompts (--max_length)."
            )
        of_tokens, others = _beside(batch)
        places = self._places(batch)
        of_prompts = {name: _left(column, places, 0) for name, column in of_tokens.items()}
        law = _law(model, self.temperature, self.new_tokens)
        training = model.training
        model.eval()
        try:
            written = write(model, prompts, mask, law, of_prompts | others)
        finally:
            model.train(training)
        return _batch(written, mask, _ends(model), of_prompts) | others

    def _places(self, batch: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """The row and the positions of each prompt."""
        found = _sequences(batch)
        return [(row, where[: self._end(labelled)]) for row, where, labelled in found]

    def prompts(self, batch: dict[str, Any], pad: int) -> tuple[Tensor, Tensor]:
        """(B, P) ids and mask, padded on the left."""
        ids, places = batch["input_ids"], self._places(batch)
        return _left(ids, places, pad), _left(torch.ones_like(ids), places, 0)

    def _end(self, labelled: list[bool]) -> int:
        """Where a sequence's prompt ends."""
        length = len(labelled)
        last = next((n for n in range(length, 0, -1) if labelled[n - 1]), 0)
        if not last:
            return length
        end = next((n for n in range(last, 0, -1) if not labelled[n - 1]), 0)
        return end or max(1, min(length // 2, self.prompt))


@torch.no_grad()
def write(
    model: Any, prompts: Tensor, mask: Tensor, law: GenerationConfig, beside: dict[str, Any]
) -> Tensor:
    """Prompts (B, P), padded on the left, continued by ``law`` and by nothing that the model's own
    generation config adds: (B, P + new). It gets those of the columns ``beside`` that it reads."""
    named = columns(model)
    inputs = {"attention_mask": mask} | {n: x for n, x in beside.items() if n in named}
    inputs = {n: x.to(model.device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    with _generates_by(model, law):
        return model.generate(prompts.to(model.device), generation_config=law, **inputs)


def greedy(model: Any, new_tokens: int) -> GenerationConfig:
    """The most probable token, each time."""
    return GenerationConfig(do_sample=False, max_new_tokens=new_tokens, **_special(model))


def _law(model: Any, temperature: float, new_tokens: int) -> GenerationConfig:
    """Draws from the model's own distribution: of what may be configured, only which tokens are
    special is the model's."""
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        **_special(model),
    )


def _special(model: Any) -> dict[str, Any]:
    own = getattr(model, "generation_config", None)
    names = ("bos_token_id", "decoder_start_token_id")
    ends = {"pad_token_id": _pad(model), "eos_token_id": _ends(model) or None}
    return {name: getattr(own, name, None) for name in names} | ends


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


_KNOWN = {"input_ids", "attention_mask", "labels", "shift_labels", "position_ids"}


def _beside(batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What else a batch has: for each token (``token_type_ids``), and apart from them (images),
    which rows that were packed have no more."""
    rest = {name: column for name, column in batch.items() if name not in _KNOWN}
    shape = batch["input_ids"].shape
    of_tokens = {n: x for n, x in rest.items() if isinstance(x, Tensor) and x.shape == shape}
    others = {} if "position_ids" in batch else rest.keys() - of_tokens.keys()
    return of_tokens, {name: rest[name] for name in others}


def _left(column: Tensor, places: list[tuple[int, Tensor]], fill: int) -> Tensor:
    """(N, P) what a column (B, L) has at these places, (row, positions), padded on the left."""
    found = column.new_full((len(places), max(len(where) for _, where in places)), fill)
    for n, (row, where) in enumerate(places):
        found[n, found.shape[1] - len(where) :] = column[row, where]
    return found


def _sequences(batch: dict[str, Any]) -> Iterator[tuple[int, Tensor, list[bool]]]:
    """The row and the positions of each sequence without padding, and which of them have a label.
    The first token of one that was packed with others has lost its label, as nothing comes before
    it."""
    labelled, packed = batch["labels"] != -100, batch.get("position_ids") is not None
    for row in range(len(labelled)):
        for places in spans(batch, row):
            told = labelled[row, places].tolist()
            yield row, places, [told[1], *told[1:]] if packed and len(told) > 1 else told


def _batch(
    written: Tensor, mask: Tensor, ends: list[int], of_prompts: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Ids, mask and labels, padded on the right, as in every other batch; and what the prompts have
    for each token, whose last value goes on, as in ``generate``."""
    mask = mask.to(written.device)
    new = written[:, mask.shape[1] :]
    end = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    kept = end.cumsum(1) - end.int() == 0  # up to and with the first end of text
    real = torch.cat([mask.bool(), kept], 1)
    labels = torch.cat([torch.full_like(mask, -100), new.masked_fill(~kept, -100)], 1)
    order = (~real).int().argsort(dim=1, stable=True)
    more = {
        name: torch.cat([x.to(mask.device), x[:, -1:].to(mask.device).expand_as(new)], 1)
        for name, x in (of_prompts or {}).items()
    }
    return {name: column.gather(1, order) for name, column in more.items()} | {
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
