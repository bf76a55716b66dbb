"""Students made out of their teacher: some of its layers, or its widths changed.

In DistilBERT's ablation the initialisation is worth more than any term of the loss (3.7 points of
GLUE against 3.0 for the divergence; Sanh et al. 2019, arXiv 1910.01108, table 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fusedkd.models.layers import depth, layer_list, pick_layers
from fusedkd.students.albert import albert_of
from fusedkd.students.distilbert import distilbert_of

ARCHITECTURES = ("same", "distilbert", "albert")
_INNER = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")


@dataclass(frozen=True)
class StudentPlan:
    """What student to make.

    Args:
        layers: how many; with ``to="albert"`` how many times a layer is applied.
        layer_map: ``"spaced"``, ``"first"``, ``"last"`` or numbers, see
            :func:`fusedkd.models.layers.pick_layers`; for ALBERT also ``"average"``.
        to: ``"same"`` architecture as the teacher, or ``"distilbert"`` or ``"albert"`` of a BERT.
        hidden, intermediate, heads: other widths than the teacher's. A changed ``hidden`` leaves
            nothing to copy: the student is random.
        groups, embedding: of an ALBERT, how many layers have weights of their own, and the width of
            its table of words (default: 128, or the teacher's own if that is less).
    """

    layers: int
    layer_map: str = "spaced"
    to: str = "same"
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    groups: int = 1
    embedding: int | None = None

    @property
    def copies(self) -> bool:
        """Whether the student starts from the teacher's weights."""
        return (self.hidden, self.intermediate, self.heads) == (None, None, None)


def build_student(teacher: Any, plan: StudentPlan) -> Any:
    """A student of the teacher's class (or its DistilBERT or ALBERT sibling), on its device.

    A layer-copied student of full depth computes what the teacher does. An ALBERT is an
    approximation: see :mod:`fusedkd.students.albert`.

    Raises:
        ValueError: an architecture without a single list of layers, a plan that does not fit it, or
            layers that differ in kind from those they would replace.
    """
    if plan.to not in ARCHITECTURES:
        raise ValueError(f"to={plan.to!r}: expected one of {', '.join(ARCHITECTURES)}.")
    if plan.to == "same":
        return _same(teacher, plan)
    if not plan.copies:
        raise ValueError(
            f"to={plan.to!r} with another hidden, intermediate or heads: expected the teacher's "
            f"widths. Make a narrower BERT first, or start from {plan.to}'s own config."
        )
    if plan.to == "distilbert":
        chosen = pick_layers(plan.layer_map, plan.layers, depth(teacher.config))
        return distilbert_of(teacher, chosen)
    return albert_of(teacher, plan.layers, plan.groups, plan.embedding, plan.layer_map)


def _same(teacher: Any, plan: StudentPlan) -> Any:
    config = teacher.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ValueError(
            f"{type(teacher).__name__} has more than one stack of layers: expected an encoder or a "
            "decoder alone."
        )
    if not plan.copies:
        return type(teacher)._from_config(_resized(config, plan), dtype=teacher.dtype)
    chosen = pick_layers(plan.layer_map, plan.layers, config.num_hidden_layers)
    student = type(teacher)._from_config(_cut(config, chosen), dtype=teacher.dtype)
    _copy(student, teacher, chosen)
    return student


def _cut(config: Any, chosen: list[int]) -> Any:
    """The config with these layers only."""
    return _from(config, config.to_dict() | _layers(config, chosen))


def _layers(config: Any, chosen: list[int]) -> dict[str, Any]:
    """What a config says about layers, for these: whatever lists one thing per layer is cut with
    them."""
    values, total = config.to_dict(), config.num_hidden_layers
    per_layer = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == total}
    changed: dict[str, Any] = {k: [v[layer] for layer in chosen] for k, v in per_layer.items()}
    groups = values.get("num_hidden_groups", 1)
    if groups not in (1, total):
        raise ValueError(
            f"an ALBERT of {total} layers in {groups} groups: expected 1 group, or one per layer."
        )
    if groups > 1:
        changed["num_hidden_groups"] = len(chosen)
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return changed | {name: len(chosen)}


def _resized(config: Any, plan: StudentPlan) -> Any:
    """The config with other widths. What is not given keeps its proportion to ``hidden``; the
    number of heads stays."""
    total, names = config.num_hidden_layers, config.attribute_map
    values = config.to_dict() | _layers(config, pick_layers("spaced", plan.layers, total))
    hidden = plan.hidden or config.hidden_size
    heads = plan.heads or config.num_attention_heads
    if hidden % heads and not getattr(config, "head_dim", None):
        raise ValueError(
            f"hidden={hidden} is no multiple of {heads} heads: expected one; pass another heads."
        )
    inner = next((name for name in _INNER if name in values), None)
    if inner is None and plan.intermediate is not None:
        raise ValueError(f"intermediate={plan.intermediate}: {type(config).__name__} has no such.")
    if inner is not None:  # GPT-2's None means four times hidden
        scaled = values[inner] and round(values[inner] * hidden / config.hidden_size)
        values[inner] = plan.intermediate or scaled
    new = {"hidden_size": hidden, "num_attention_heads": heads}
    values |= {names.get(name, name): value for name, value in new.items()}
    key_values = getattr(config, "num_key_value_heads", None)
    if key_values is not None and plan.heads is not None:
        groups = config.num_attention_heads // key_values
        values["num_key_value_heads"] = max(1, heads // groups)
    return _from(config, values)


def _from(config: Any, values: dict[str, Any]) -> Any:
    try:
        return type(config).from_dict(values)
    except Exception as error:  # configs check themselves, each in its own way
        raise ValueError(f"{type(config).__name__} cannot have these layers: {error}") from error


def _copy(student: nn.Module, teacher: nn.Module, chosen: list[int]) -> None:
    name, theirs = layer_list(teacher)
    _, ours = layer_list(student)
    kept = theirs.state_dict()
    rest = {k: v for k, v in teacher.state_dict().items() if not k.startswith(f"{name}.")}
    student.load_state_dict(rest, strict=False)
    for number, layer in enumerate(ours):
        origin = chosen[number] if len(theirs) > 1 else 0  # ALBERT's one layer
        start = f"{origin}."
        part = {k.removeprefix(start): v for k, v in kept.items() if k.startswith(start)}
        try:
            layer.load_state_dict(part)
        except RuntimeError as error:  # names or shapes differ
            raise ValueError(
                f"layer {number} of the student cannot start from layer {origin} of the teacher, "
                f"which is of another kind: choose another map. {error}"
            ) from None
