"""Which checkpoint a run goes on from."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fusedkd.errors import UserError

__all__ = ["checkpoint_of"]

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
    found = sorted(filter(Path.is_dir, folder.glob("checkpoint-*")), key=_step, reverse=True)
    if asked is None:
        if found and _step(found[0]) >= 0:
            raise UserError(
                f"--output_dir {folder} has {found[0].name} of an earlier run: go on from it with "
                "--resume_from_checkpoint last, or choose another folder."
            )
        return None
    if asked.lower() in LAST:
        return _newest([path for path in found if _step(path) >= 0], optimizer)
    if not Path(asked).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {asked}: expected a checkpoint folder or 'last'."
        )
    if lacking := _lacking(Path(asked), optimizer=False):
        raise UserError(f"--resume_from_checkpoint {asked}: {lacking}: expected a whole one.")
    return asked


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
    if _reads(checkpoint / "trainer_state.json") is None:
        return "no trainer_state.json that can be read"
    if not any(re.fullmatch(WEIGHTS, name) for name in names):
        return "no weights of the model"
    index = checkpoint / "model.safetensors.index.json"
    shards = set((_reads(index) or {}).get("weight_map", {}).values()) if index.exists() else set()
    if missing := sorted(shards - set(names)):
        return f"no {missing[0]}"
    if optimizer and not any(re.fullmatch(OPTIMIZER, name) for name in names):
        return "no state of the optimizer"
    return ""


def _reads(path: Path) -> dict | None:
    """A JSON object; None if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
