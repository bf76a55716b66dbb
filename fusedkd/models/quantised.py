"""Students that compute with rounded weights while they are trained, and what becomes of them:
weights that are quantised. torchao does the work (``pip install torchao``).

Every forward pass rounds the weights as the finished model will have them; the gradient passes
through the rounding as if it were not there (straight-through), to weights that stay in full
precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig

from fusedkd.errors import UserError, as_user_error
from fusedkd.files import replacing_folder
from fusedkd.models.adapters import installed
from fusedkd.models.loading import read_model
from fusedkd.models.proof import is_plain

QUANTISED = "quantised"  # the folder in a run's own
# what is tried: trained, saved, loaded, compared. A second number: that of the activations.
SCHEMES = ("int2", "int3", "int4", "int8", "int4-int8")


def fake_quantise(model: Any, scheme: str, group: int) -> list[str]:
    """Have each linear layer of the model's body round its weight (out, in) in the forward pass.
    Embeddings and heads stay as they are.

    Args:
        model: of transformers, changed in place; its state dict keeps its names.
        scheme: one of ``SCHEMES``.
        group: of how many weights, along ``in``, each has a scale of its own.

    Returns:
        The names of those layers.

    Raises:
        UserError: there are none, ``group`` does not divide their width, or torchao is missing.
    """
    config = _torchao(scheme, group)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    chosen = _linear_layers(model)
    if not chosen:
        raise UserError(
            f"--quantise {scheme}: {type(model).__name__} has no linear layers (torch.nn.Linear) "
            "that could be quantised."
        )
    for name, layer in chosen.items():
        if layer.in_features % group:
            raise UserError(
                f"--quantise_group {group}: {name} has {layer.in_features} weights a row: expected "
                "a divisor."
            )
    layers = set(map(id, chosen.values()))
    quantize_(model, QATConfig(config, step="prepare"), lambda layer, _: id(layer) in layers)
    return list(chosen)


def export(model: Any, folder: Path, scheme: str, group: int, tokenizer: Any = None) -> Path:
    """Write the quantised form of a model into ``quantised/`` in ``folder``: ``from_pretrained``
    loads it where torchao is installed, and it computes what the model did in training.

    Args:
        model: that :func:`fake_quantise` has changed, of these numbers.
        folder: where its weights are saved in full precision.
        tokenizer: saved beside it.

    Raises:
        UserError: it cannot be loaded or written, or other layers would be quantised.
    """
    chosen = _linear_layers(model)
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in chosen]
    config = TorchAoConfig(_torchao(scheme, group), modules_to_not_convert=others)
    how: dict[str, Any] = {"dtype": "auto", "quantization_config": config}
    read, _ = read_model("student", str(folder), type(model), **how)
    became = [
        n for n, m in read.named_modules() if isinstance(m, nn.Linear) and not is_plain(m.weight)
    ]
    if became != list(chosen):
        raise UserError(
            f"--quantise {scheme}: {type(model).__name__} would be quantised in other layers than "
            f"it was trained with: {', '.join(sorted({*became} ^ {*chosen})[:3])}."
        )
    with replacing_folder(folder / QUANTISED) as stage:
        read.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
    return folder / QUANTISED


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Those of the model's body, by name."""
    head = model.get_output_embeddings()
    body = {id(module) for module in model.base_model.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in body and module is not head
    }


def _torchao(scheme: str, group: int) -> Any:
    installed(f"--quantise {scheme} needs", "torchao")
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    weights, _, activations = scheme.partition("-")
    with as_user_error(f"--quantise {scheme}"):
        bits = getattr(torch, weights)
        if activations:
            return Int8DynamicActivationIntxWeightConfig(bits, PerGroup(group))
        return IntxWeightOnlyConfig(bits, PerGroup(group))
