"""Which layer of a teacher belongs to which layer of a student."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def depth(config: Any) -> int:
    """How many layers a model with this config applies; a shared one counts at each application."""
    config = config.get_text_config()
    return config.num_hidden_layers * getattr(config, "inner_group_num", 1)


def pick_layers(layer_map: str, student: int, teacher: int) -> list[int]:
    """The teacher's layers, from 0, that ``student`` layers start from.

    Args:
        layer_map: ``"spaced"`` (as far apart as can be, the first and the last included: of 12
            layers 0 2 4 7 9 11, DistilBERT's), ``"first"``, ``"last"``, or numbers: ``"0,2,4"``.

    Raises:
        ValueError: not one of these, more layers than the teacher has, numbers outside the teacher
            or not as many as the student has layers.
    """
    if not 1 <= student <= teacher:
        raise ValueError(f"layers={student}: expected 1 to {teacher}, the teacher's layers.")
    named = {
        "spaced": [round(i * (teacher - 1) / max(student - 1, 1)) for i in range(student)],
        "first": list(range(student)),
        "last": list(range(teacher - student, teacher)),
    }
    if layer_map in named:
        return named[layer_map]
    chosen = [_whole("map", layer_map, part) for part in layer_map.split(",")]
    if len(chosen) != student or not all(0 <= layer < teacher for layer in chosen):
        raise ValueError(
            f"map={layer_map!r}: expected {', '.join(named)}, or {student} numbers from 0 to "
            f"{teacher - 1} with commas between them."
        )
    return chosen


def layer_pairs(layers: str, student: int, teacher: int, first: int = 1) -> list[tuple[int, int]]:
    """Pairs (student's layer, teacher's layer), counted from 1, that a loss compares.

    Args:
        layers: ``"uniform"`` (TinyBERT's g(m) = m T / S, rounded), ``"last"``, one teacher layer
            per student layer (``"3 6 9 12"``), or pairs (``"2-6 4-12"``).
        student, teacher: how many layers they have.
        first: the lowest number that exists; 0 where the embeddings' output counts as a layer.

    Raises:
        ValueError: not one of these, or layers that do not exist.
    """
    if layers == "uniform":
        return [(m, (2 * m * teacher + student) // (2 * student)) for m in range(1, student + 1)]
    if layers == "last":
        return [(student, teacher)]
    words = layers.split()
    if words and all("-" in word for word in words):
        halves = [word.split("-", 1) for word in words]
        pairs = [(_whole("layers", layers, a), _whole("layers", layers, b)) for a, b in halves]
    else:
        pairs = list(enumerate((_whole("layers", layers, word) for word in words), start=1))
        if len(pairs) != student:
            pairs = []
    if not pairs or not all(first <= s <= student and first <= t <= teacher for s, t in pairs):
        raise ValueError(
            f"layers={layers!r}: expected uniform, last, {student} numbers from {first} to "
            f"{teacher} (one layer of the teacher for each of the student's), or pairs such as "
            f"'{student}-{teacher}' of layers from {first} to {student} and from {first} to "
            f"{teacher}."
        )
    return pairs


def _whole(name: str, text: str, part: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise ValueError(f"{name}={text!r}: {part.strip()!r} is not a whole number.") from None


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers and its name in the model.

    Raises:
        ValueError: there is none with as many entries as the config has layers, or several.
    """
    config: Any = model.config
    lengths = {config.num_hidden_layers, getattr(config, "num_hidden_groups", 0)}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in lengths
    }
    of_layers = {n: m for n, m in found.items() if isinstance(m[0], GradientCheckpointingLayer)}
    found = of_layers or found
    level = min((name.count(".") for name in found), default=0)
    outermost = [(name, m) for name, m in found.items() if name.count(".") == level]
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected one list of {config.num_hidden_layers} layers, "
            f"found {', '.join(name for name, _ in outermost) or 'none'}."
        )
    return outermost[0]
