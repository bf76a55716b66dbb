"""Models, tokenizers and text from disk, for every command that needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from fusedkd.data.text import load_documents, pack, split
from fusedkd.errors import UserError, as_user_error

__all__ = [
    "DTYPES",
    "architectures",
    "load_blocks",
    "load_model",
    "load_tokenizer",
    "read_config",
    "read_model",
    "required",
]

DTYPES = ("float32", "bfloat16", "float16", "auto")
PICKLED = """\
its weights are pickles, which can run any program as they are opened, so they are not opened: \
expected .safetensors files. Where you trust whoever made them, convert them: python -c "from \
transformers import {kind} as A; A.from_pretrained('{name}').save_pretrained('converted')\"."""


def required(name: str, value: str | None) -> str:
    """The folder or hub name given for a flag.

    Raises:
        UserError: none was given, or there is no such folder.
    """
    if not value:
        raise UserError(f"--{name} is missing: expected a folder with a saved model or a hub name.")
    if value.startswith((".", "/", "~")) and not Path(value).expanduser().is_dir():
        raise UserError(f"--{name} {value}: no such folder; expected one with a saved model.")
    return str(Path(value).expanduser()) if value.startswith("~") else value


def read_config(role: str, name: str, **changes: Any) -> Any:
    """Of a saved model. No program that comes with a model is run.

    Raises:
        UserError: there is none, or none that can be read.
    """
    with as_user_error(f"--{role} {name} has no model that can be loaded", Exception):
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **changes)


def architectures(config: Any) -> list[str]:
    """The classes that a model was saved from, as its config says; it may say anything."""
    found = config.architectures
    return [str(name) for name in found] if isinstance(found, list | tuple) else []


def load_model(
    role: str, name: str, auto: str, dtype: str, random: bool = False, **config: Any
) -> Any:
    """A saved model as transformers' ``auto`` class makes it, or one of its config with random
    weights; ``config`` overrides its own."""
    if dtype not in DTYPES:
        raise UserError(f"--{role}_dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    loader = getattr(transformers, auto)
    if not random:
        return read_model(role, name, loader, dtype=kind, **config)
    changed = read_config(role, name, **config)
    with as_user_error(f"--{role} {name} cannot be made", Exception):
        return loader.from_config(changed, dtype=torch.float32 if dtype == "auto" else kind)


def read_model(role: str, name: str, kind: Any, **how: Any) -> Any:
    """A saved model as a ``kind``, from safetensors alone.

    Raises:
        UserError: it cannot be loaded; its weights may be damaged, or be pickles.
    """

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(PICKLED.format(kind=kind.__name__, name=name))

    # an index, a config or an adapter may lead to a pickle, too
    with (
        as_user_error(f"--{role} {name} cannot be loaded", Exception),
        mock.patch.object(torch, "load", refuse),
    ):
        if _only_pickles(Path(name)):
            refuse()
        try:
            return kind.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **how)
        except OSError as error:  # on the hub there are only pickles
            if "use_safetensors" in str(error):
                refuse()
            raise


def _only_pickles(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pickles = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
    return not any(n.endswith(".safetensors") for n in names) and any(
        n.endswith(pickles) and not n.startswith("training_args") for n in names
    )


def load_tokenizer(given: str | None, **models: str | None) -> Any:
    """The one asked for, or the first that one of the models (by role) has; all that have one must
    agree.

    Raises:
        UserError: it cannot be loaded, there is none, or they differ.
    """
    if given:
        folder = required("tokenizer", given)
        with as_user_error(f"--tokenizer {given} cannot be loaded", Exception):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = {}
    for role, name in models.items():
        try:
            found[role] = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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
    with as_user_error("--data", Exception):
        documents = load_documents(data)
    with as_user_error("--eval_data", Exception):
        held_out = load_documents(eval_data) if eval_data else None
    if held_out is None:
        documents, held_out = split(documents, eval_share)
    with as_user_error("--data", Exception):
        train = pack(documents, tokenizer, block_size)
    with as_user_error("--eval_data", Exception):
        return train, None if held_out is None else pack(held_out, tokenizer, block_size)
