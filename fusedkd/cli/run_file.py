"""``run.yaml``: every flag of a run as it was resolved, which ``--config`` runs again."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from fusedkd.cli.recipe import flags_of, read_recipe
from fusedkd.errors import UserError
from fusedkd.files import replace_file

NAME = "run.yaml"
HEAD = "# Every flag of this run. Again: fusedkd distill --config run.yaml --output_dir again\n"
# Of transformers' flags, those that a loss depends on; others are there if they were given.
RESOLVED = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "seed", "bf16", "fp16",
)  # fmt: skip
LEFT_OUT = ("config", "resume_from_checkpoint")


class RunFile:
    """The flags of one run.

    Args:
        parser: that read them.
        words: from the recipe and the command line.
        resolved: dataclasses of which every field is kept.
        training: the trainer's arguments.
        names: of those, which are kept beside ``RESOLVED``.
    """

    def __init__(
        self,
        parser: Any,
        words: Sequence[str],
        resolved: Sequence[Any],
        training: Any,
        names: Iterable[str],
    ) -> None:
        self._parser = parser
        own = {f.name: getattr(part, f.name) for part in resolved for f in fields(part)}
        names = [name for name in (*RESOLVED, *names) if hasattr(training, name)]
        told = {name: getattr(training, name) for name in names}
        flags = own | told | self._given(words)
        self.flags = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in flags.items()
            if value not in (None, []) and name not in LEFT_OUT
        }

    def _given(self, words: Sequence[str]) -> dict[str, Any]:
        nothing = object()
        names = [action.dest for action in self._parser._actions]
        found = argparse.Namespace(**dict.fromkeys(names, nothing))
        self._parser.parse_known_args(list(words), found)
        return {name: value for name, value in vars(found).items() if value is not nothing}

    def write(self, folder: Path) -> None:
        """Into a run's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        body = yaml.safe_dump(self.flags, allow_unicode=True, width=1000)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        more = f"# By {processes} processes.\n" if processes > 1 else ""
        replace_file(folder / NAME, HEAD + more + body)

    def changes(self, folder: Path) -> list[str]:
        """What the run in ``folder`` was told otherwise, one flag a line."""
        path = folder / NAME
        if not path.is_file():
            return []
        try:
            known = [flag[2:] for flag in self._parser._option_string_actions]
            old = self._given(flags_of(path, read_recipe(path), known))
            new = self._given(self._words())
        except UserError as error:
            return [f"{path} cannot be compared: {error}"]
        return [
            f"--{name} {old.get(name, '(not given)')} -> {new.get(name, '(not given)')}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]

    def _words(self) -> list[str]:
        words = []
        for name, value in self.flags.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)] if isinstance(value, list) else [
                f"--{name}={value}"
            ]  # fmt: skip
        return words
