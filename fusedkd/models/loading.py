"""Models and tokenizers from disk, for every command that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from transformers import AutoConfig, AutoTokenizer

from fusedkd.errors import UserError, as_user_error
from fusedkd.models.tokenizers import check_same

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


def read_config(role: str, name: str, trust_remote_code: bool = False, **changes: Any) -> Any:
    """Of a saved model. No program that comes with a model is run, unless it is trusted.

    Raises:
        UserError: there is none, or none that can be read.
    """
    with as_user_error(f"--{role} {name} has no model that can be loaded", Exception):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **changes)


def architectures(config: Any) -> list[str]:
    """The classes that a model was saved from, as its config says; it may say anything."""
    found = config.architectures
    return [str(name) for name in found] if isinstance(found, list | tuple) else []


def read_model(
    role: str, name: str, kind: Any, trust_remote_code: bool = False, **how: Any
) -> tuple[Any, list[str]]:
    """A saved model as a ``kind``, from safetensors alone; and the names of those of its weights
    that were not saved.

    Raises:
        UserError: it cannot be loaded; its weights may be damaged, or be pickles.
    """

    with without_pickles(role, name, kind.__name__) as refuse:
        if _only_pickles(Path(name)):
            refuse()
        try:
            model, found = kind.from_pretrained(
                name,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **how,
            )
            return model, sorted(found["missing_keys"])
        except OSError as error:  # on the hub there are only pickles
            if "use_safetensors" in str(error):
                refuse()
            raise


@contextmanager
def without_pickles(role: str, name: str, kind: str) -> Iterator[Callable[..., NoReturn]]:
    """While open, nothing is unpickled: an index, a config or an adapter may lead to a pickle, too.
    Gives what refuses.

    Raises:
        UserError: there was a pickle, or something else could not be loaded.
    """

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(PICKLED.format(kind=kind, name=name))

    with (
        as_user_error(f"--{role} {name} cannot be loaded", Exception),
        mock.patch.object(torch, "load", refuse),
    ):
        yield refuse


def _only_pickles(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pickles = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
    return not any(n.endswith(".safetensors") for n in names) and any(
        n.endswith(pickles) and not n.startswith("training_args") for n in names
    )


def load_both_tokenizers(
    given: str | None, given_teacher: str | None, student: Any, teacher: Any
) -> tuple[Any, Any]:
    """The student's and the teacher's, which may be another, or those asked for.

    Args:
        teacher: None where it does not run here.

    Raises:
        UserError: one of them cannot be loaded.
    """
    if given_teacher is not None:
        theirs = tokenizer_at("teacher_tokenizer", given_teacher)
    elif teacher is None:
        raise UserError(
            "--cross_tokenizer with a teacher that is served or cached: expected "
            "--teacher_tokenizer, the folder or hub name of its tokenizer."
        )
    else:
        with as_user_error(f"--teacher {teacher.name}: its tokenizer cannot be loaded", Exception):
            theirs = teacher.tokenizer()
    return load_tokenizer(given, student=student), theirs


def tokenizer_at(flag: str, place: str) -> Any:
    """The one in a folder, or of that name on the hub, that a flag says.

    Raises:
        UserError: it cannot be loaded.
    """
    folder = required(flag, place)
    with as_user_error(f"--{flag} {place} cannot be loaded", Exception):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(given: str | None, **models: Any) -> Any:
    """The one asked for, or the first that one of the saved models (by role) has; all that have one
    must agree.

    Raises:
        UserError: it cannot be loaded, there is none, or they differ.
    """
    if given:
        return tokenizer_at("tokenizer", given)
    found = {}
    for role, model in models.items():
        try:
            found[role] = model.tokenizer()
        except Exception:  # a model without a tokenizer raises one of many things
            continue
    if not found:
        roles = " nor ".join(models)
        raise UserError(f"no tokenizer with the {roles}: pass --tokenizer.")
    if len(found) == 2:
        names = {role: model.name for role, model in models.items()}
        check_same(found["student"], found["teacher"], names)
    return next(iter(found.values()))
