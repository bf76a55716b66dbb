"""A model in a folder or on the hub, and how a run reads it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from fusedkd.errors import UserError, as_user_error
from fusedkd.models.adapters import adapter_config, load_adapter, quantisation
from fusedkd.models.loading import DTYPES, read_config, read_model, without_pickles


@dataclass(frozen=True)
class SavedModel:
    """One side of a distillation, on disk.

    Args:
        role: "teacher" or "student", for messages and flags.
        name: folder or hub name, of a model or of an adapter of one.
        dtype: of the weights; "auto": as saved.
        bits: 4 or 8: the weights are quantised as they are loaded.
        device_map: as of ``from_pretrained``; JSON or a word.
    """

    role: str
    name: str
    dtype: str = "auto"
    revision: str | None = None
    bits: int | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    spread: bool = False  # over torchrun's processes, tensor-parallel

    @cached_property
    def adapter(self) -> Any:
        """The peft config, where an adapter was saved and not a model."""
        return adapter_config(self.role, self.name, self.revision)

    @property
    def _base(self) -> dict[str, Any]:
        """Where the model itself is."""
        named = {"name": self.name, "revision": self.revision}
        if self.adapter is not None:
            named = {
                "name": self.adapter.base_model_name_or_path,
                "revision": self.adapter.revision,
            }
        return {"role": self.role, **named, "trust_remote_code": self.trust_remote_code}

    def config(self, **changes: Any) -> Any:
        """The model's, with ``changes``.

        Raises:
            UserError: there is none that can be read.
        """
        return read_config(**self._base, **changes)

    def tokenizer(self) -> Any:
        """The one beside the model, or beside what an adapter belongs to.

        Raises:
            Exception: one of many things, where there is none.
        """
        how = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return AutoTokenizer.from_pretrained(self.name, **how)
        except Exception:
            if self.adapter is None:
                raise
            return AutoTokenizer.from_pretrained(self.adapter.base_model_name_or_path)

    def make(self, auto: str, **config: Any) -> Any:
        """A model of this config with random weights, by transformers' ``auto`` class; ``config``
        overrides.

        Raises:
            UserError: it cannot be made.
        """
        kind = torch.float32 if self.dtype == "auto" else self._dtype
        how = self._attention | {"trust_remote_code": self.trust_remote_code}
        changed = self.config(**config)
        with as_user_error(f"--{self.role} {self.name} cannot be made", Exception):
            return getattr(transformers, auto).from_config(changed, dtype=kind, **how)

    def load(self, auto: str, new_head: bool = False, train: bool = False, **config: Any) -> Any:
        """The model, by transformers' ``auto`` class; ``config`` overrides its own.

        Args:
            new_head: weights that were not saved may be made up.
            train: its adapter, if it is one, is to be trained further.

        Raises:
            UserError: it cannot be loaded, or has other weights than such a model.
        """
        how = self._attention | {"dtype": self._dtype} | config
        if self.bits is not None:
            how["quantization_config"] = quantisation(self.role, self.bits)
        if self.device_map is not None:
            how["device_map"] = _device_map(self.role, self.device_map)
        if self.spread:
            how["distributed_config"] = _tensor_parallel(self.role, self.device_map)
        model, missing = read_model(kind=getattr(transformers, auto), **self._base, **how)
        if self.adapter is not None:
            with without_pickles(self.role, self.name, "PeftModel"):
                model = load_adapter(model, self.name, self.revision, train)
            saved = tuple(getattr(self.adapter, "modules_to_save", None) or ())
            missing = [name for name in missing if not name.startswith(saved)] if saved else missing
        if missing and not new_head:
            raise UserError(
                f"--{self.role} {self.name} has no weights for {', '.join(missing[:3])}"
                f"{' and others' * (len(missing) > 3)}, so they would be random: expected a model "
                f"that was saved as one for {auto}."
            )
        return model

    @property
    def _dtype(self) -> Any:
        if self.dtype not in DTYPES:
            raise UserError(
                f"--{self.role}_dtype {self.dtype}: expected one of {', '.join(DTYPES)}."
            )
        return self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def _attention(self) -> dict[str, Any]:
        given = self.attn_implementation
        return {} if given is None else {"attn_implementation": given}


def _tensor_parallel(role: str, device_map: str | None) -> Any:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError(f"--{role}_tp: expected several processes, as torchrun starts them.")
    if device_map is not None:
        raise UserError(f"--{role}_tp and --{role}_device_map: expected one of them.")
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_plan="auto")


def _device_map(role: str, text: str) -> Any:
    if not text.startswith("{"):
        return text
    with as_user_error(f"--{role}_device_map {text}"):
        return json.loads(text)
