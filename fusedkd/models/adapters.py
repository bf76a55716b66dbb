"""Adapters (peft's) and quantised weights (bitsandbytes'): transformers and peft do the work."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils.peft_utils import find_adapter_config_file

from fusedkd.errors import UserError, as_user_error


def adapter_config(role: str, name: str, revision: str | None = None) -> Any:
    """The peft config in a folder or on the hub; None where there is no adapter.

    Raises:
        UserError: it cannot be read, or names no model that it belongs to.
    """
    with as_user_error(f"--{role} {name}", Exception):
        if find_adapter_config_file(name, revision=revision) is None:
            return None
    peft = installed(f"--{role} {name} is an adapter, which needs", "peft")
    with as_user_error(f"--{role} {name} has no adapter that can be loaded", Exception):
        found = peft.PeftConfig.from_pretrained(name, revision=revision)
    if not found.base_model_name_or_path:
        raise UserError(
            f"--{role} {name} is an adapter whose adapter_config.json names no "
            "base_model_name_or_path: expected the folder or hub name of the model it belongs to."
        )
    return found


def load_adapter(model: Any, name: str, revision: str | None, trainable: bool) -> Any:
    """``model`` with a saved adapter in it, to be trained on or not."""
    import peft

    return peft.PeftModel.from_pretrained(
        model, name, revision=revision, is_trainable=trainable, use_safetensors=True
    )


def add_lora(model: Any, task_type: str | None, targets: list[str], **options: Any) -> Any:
    """``model`` with low-rank matrices to train, and everything else frozen.

    Args:
        task_type: peft's, which keeps a classifier's head trained, too.
        targets: names of linear layers; one that is no layer's, such as "all-linear", is peft's.
        **options: of ``peft.LoraConfig``.

    Raises:
        UserError: peft is missing, or does not take these.
    """
    peft = installed("--use_peft needs", "peft")
    with as_user_error("--use_peft", Exception):
        chosen = targets[0] if len(targets) == 1 and targets[0] == "all-linear" else targets
        if chosen == "all-linear" and task_type == "TOKEN_CLS":  # peft spares other heads itself
            options["exclude_modules"] = ["classifier", "score"]
        config = peft.LoraConfig(task_type=task_type, target_modules=chosen, **options)
        return peft.get_peft_model(model, config)


def quantisation(role: str, bits: int) -> BitsAndBytesConfig:
    """bitsandbytes' 8-bit weights, or QLoRA's 4-bit NormalFloats (arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes is missing.
    """
    flag = f"--{role}_load_in_{bits}bit"
    installed(f"{flag} needs", "bitsandbytes")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def installed(why: str, name: str) -> Any:
    if find_spec(name) is None:
        raise UserError(f"{why} {name}, which is not installed: pip install {name}")
    return __import__(name)
