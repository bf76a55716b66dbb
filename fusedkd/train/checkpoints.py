"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusedkd.errors import UserError
from fusedkd.files import read_json

LAST = ("last", "true")  # --resume_from_checkpoint
WEIGHTS = r"(model|adapter_model)\.safetensors(\.index\.json)?|pytorch_model_fsdp.*|global_step\d+"
OPTIMIZER = r"optimizer.*|global_step\d+"


def checkpoint_of(folder: Path, asked: str | None, optimizer: bool = True) -> str | None:
    """The checkpoint to go on from; None: begin. One that nobody mentions is not trained over.

    Args:
        folder: the run's.
        asked: a checkpoint, or "last": the newest that is whole. A run that is killed while it
            saves one leaves a part of it.
        optimizer: whether the run saves the optimizer's state.

    Raises:
        UserError: there are checkpoints, and nothing was asked for; or it is none.
    """
    found = _checkpoints(folder)
    if asked is None:
        if found:
            raise UserError(
                f"--output_dir {folder} has {found[0].name} of an earlier run: go on from it with "
                "--resume_from_checkpoint last, or choose another folder."
            )
        return None
    if asked.lower() in LAST:
        return _newest(found, optimizer)
    if not Path(asked).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {asked}: expected a checkpoint folder or 'last'."
        )
    if lacking := _lacking(Path(asked), optimizer=False):
        raise UserError(f"--resume_from_checkpoint {asked}: {lacking}: expected a whole one.")
    return asked


def newest(folder: Path, before: int) -> Path | None:
    """The newest whole checkpoint of fewer steps than ``before``."""
    older = (path for path in _checkpoints(folder) if _step(path) < before)
    return next((path for path in older if not _lacking(path, optimizer=False)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step, reverse=True)


@contextmanager
def staged(trainer: Any, asked: str | None) -> Iterator[str | None]:
    """Where to write a model for ``asked``: a run's own folder may hold an older one, which stays
    until all files of the new one are there. Killed in between, it leaves a folder that ends in
    .tmp."""
    final = Path(trainer.args.output_dir)
    if asked is not None and Path(asked) != final:
        yield asked
        return
    stage = final / "model.tmp"  # one name, as every process may write its part
    if trainer.args.should_save:
        shutil.rmtree(stage, ignore_errors=True)
    try:
        yield str(stage)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            for file in sorted(stage.iterdir(), key=_last):
                if file.is_dir():  # DeepSpeed's
                    shutil.rmtree(final / file.name, ignore_errors=True)
                os.replace(file, final / file.name)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(stage, ignore_errors=True)


def _last(file: Path) -> bool:
    """The config comes last: without one there is no model."""
    return file.name in ("config.json", "adapter_config.json")


def _step(checkpoint: Path) -> int:
    digits = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(digits[1]) if digits else -1


def _newest(checkpoints: list[Path], optimizer: bool) -> str | None:
    for path in checkpoints:
        if not (lacking := _lacking(path, optimizer)):
            return str(path)
        print(f"{path}: {lacking}: passed over, it was not saved to its end.", file=sys.stderr)
    return None


def _lacking(checkpoint: Path, optimizer: bool) -> str:
    """What a checkpoint lacks; nothing if it is whole. The state is what is written last."""
    names = [path.name for path in checkpoint.iterdir() if path.is_dir() or path.stat().st_size]
    if read_json(checkpoint / "trainer_state.json") is None:
        return "no trainer_state.json that can be read"
    if not any(re.fullmatch(WEIGHTS, name) for name in names):
        return "no weights of the model"
    index = checkpoint / "model.safetensors.index.json"
    named = (read_json(index) or {}).get("weight_map", {}) if index.exists() else {}
    shards = set(named.values())
    if missing := sorted(shards - set(names)):
        return f"no {missing[0]}"
    if optimizer and not any(re.fullmatch(OPTIMIZER, name) for name in names):
        return "no state of the optimizer"
    return ""
