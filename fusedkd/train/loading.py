"""Models, tokenizers and text from disk, for every command that needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fusedkd.errors import UserError, as_user_error
from fusedkd.train.data import load_documents, pack, split

__all__ = [
    "DTYPES",
    "load_blocks",
    "load_model",
    "load_tokenizer",
    "refuse_cache",
    "required",
    "task_of",
]

AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
}
DTYPES = ("float32", "bfloat16", "float16", "auto")


def required(name: str, value: str | None) -> str:
    """The folder or hub name given for a flag.

    Raises:
        UserError: none was given, or there is no such folder.
    """
    if value is None:
        raise UserError(f"--{name} is missing: expected a folder with a saved model or a hub name.")
    if value.startswith((".", "/", "~")) and not Path(value).expanduser().is_dir():
        raise UserError(f"--{name} {value}: no such folder; expected one with a saved model.")
    return str(Path(value).expanduser()) if value.startswith("~") else value


def task_of(role: str, name: str) -> str:
    """What a saved model does: "causal", "masked" or "classification"."""
    with as_user_error(f"--{role} {name} has no model that can be loaded"):
        config = AutoConfig.from_pretrained(name)
    for ending, task in (("MaskedLM", "masked"), ("SequenceClassification", "classification")):
        if any(ending in architecture for architecture in config.architectures or []):
            return task
    return "causal"


def refuse_cache(task: str) -> None:
    """A cache finds sequences by their ids, and holds what comes next.

    Raises:
        UserError: a masked model, which sees other ids in every epoch, or a classifier.
    """
    if task == "masked":
        raise UserError(
            "a masked language model cannot have a teacher cache: masks are drawn anew in every "
            "epoch, so the teacher never sees the same sequence twice. Use --teacher."
        )
    if task == "classification":
        raise UserError("a classifier cannot have a teacher cache: use --teacher.")


def load_model(
    role: str, name: str, task: str, dtype: str, random: bool = False, **config: Any
) -> Any:
    """A saved model, or one of its config with random weights; ``config`` overrides its own."""
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    with as_user_error(f"--{role} {name} cannot be loaded"):
        if random:
            changed = AutoConfig.from_pretrained(name, **config)
            return AUTO[task].from_config(changed, dtype=torch.float32 if dtype == "auto" else kind)
        return AUTO[task].from_pretrained(name, dtype=kind, **config)


def load_tokenizer(given: str | None, **models: str | None) -> Any:
    """The one asked for, or the first that one of the models (by role) has; all that have one must
    agree.

    Raises:
        UserError: it cannot be loaded, there is none, or they differ.
    """
    if given:
        with as_user_error(f"--tokenizer {given} cannot be loaded"):
            return AutoTokenizer.from_pretrained(given)
    found = {}
    for role, name in models.items():
        try:
            found[role] = AutoTokenizer.from_pretrained(name)
        except Exception:  # a model without a tokenizer raises one of many things
            continue
    if not found:
        roles = " nor ".join(models)
        raise UserError(f"no tokenizer with the {roles}: pass --tokenizer.")
    if len(found) == 2:
        theirs, ours = found["teacher"].get_vocab(), found["student"].get_vocab()
        for token, number in ours.items():
            if theirs.get(token) != number:
                raise UserError(
                    f"the tokenizers differ: {token!r} is {number} for the student and "
                    f"{theirs.get(token)} for the teacher. Distillation by token needs one "
                    "vocabulary; if you know better, say which with --tokenizer."
                )
    return next(iter(found.values()))


def load_blocks(
    data: Sequence[str],
    eval_data: Sequence[str],
    eval_share: float,
    tokenizer: Any,
    block_size: int,
) -> tuple[Dataset, Dataset | None]:
    """Blocks of tokens to train and to evaluate on, the latter from ``eval_data`` or from a share
    of the documents. The same arguments give the same blocks, which a teacher's cache counts on.

    Raises:
        UserError: missing, unreadable or empty data.
    """
    if not data:
        raise UserError("--data is missing: expected files or folders of text.")
    with as_user_error("--data"):
        documents = load_documents(data)
    with as_user_error("--eval_data"):
        held_out = load_documents(eval_data) if eval_data else None
    if held_out is None:
        documents, held_out = split(documents, eval_share)
    with as_user_error("--data"):
        train = pack(documents, tokenizer, block_size)
    with as_user_error("--eval_data"):
        return train, None if held_out is None else pack(held_out, tokenizer, block_size)
