"""What may be wrong with a run that was asked for, and transformers finds late, or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from fusedkd.cache.errors import short
from fusedkd.errors import UserError, as_user_error, of_the_machine


def check_flags(args: TrainingArguments) -> None:
    """What transformers looks at late, or not at all: it trains with NaN and infinity, to NaN.

    Raises:
        UserError: a number out of range, or text that is not what a flag takes.
    """
    for flag in fields(args):
        value = getattr(args, flag.name)
        endless = flag.name == "max_grad_norm" and value == math.inf  # which clips nothing
        if isinstance(value, float) and not (math.isfinite(value) or endless):
            raise UserError(f"--{flag.name} {value}: expected a finite number.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"--{flag.name} {short(value)}: expected a number of 64 bits.")
    for name, least in (("eval_accumulation_steps", 1), ("neftune_noise_alpha", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: expected at least {least}.")
    if isinstance(args.lr_scheduler_kwargs, str):
        raise UserError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: expected JSON, {{...}}."
        )
    for part in (args.optim_args or "=").split(","):
        if "=" not in part:
            raise UserError(f"--optim_args {args.optim_args}: expected name=value,name=value.")


def check_output(folder: Path, **models: str | None) -> None:
    """Whether the student could be written there, before it is trained.

    Args:
        models: folders (or hub names) by role, which are read.

    Raises:
        UserError: it could not, or over one of the models, or over what a link points to.
    """
    for role, name in models.items():
        if name and folder.is_dir() and Path(name).is_dir() and folder.samefile(name):
            raise UserError(
                f"--output_dir {folder} is --{role}, which would be overwritten: choose another "
                "folder."
            )
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"--output_dir {folder}: {nearest} is no folder that can be written to: expected one."
        )
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and not path.is_dir():
            raise UserError(
                f"--output_dir {folder}: {path.name} is a link, and what it points to would be "
                "overwritten: remove it, or choose another folder."
            )


class _Steps(TrainerCallback):
    """Whether there was one."""

    begun = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = True


@contextmanager
def what_is_asked(trainer: Trainer) -> Iterator[None]:
    """Some flags are only looked at when training begins: what is wrong before the first step is
    the user's. So is the disk."""
    steps = _Steps()
    trainer.add_callback(steps)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        if (said := of_the_machine(error)) is not None:
            where = f"while training into --output_dir {trainer.args.output_dir}"
            raise UserError(f"{where}: {said}.") from error
        if steps.begun:
            raise
        with as_user_error("training cannot begin"):
            raise
