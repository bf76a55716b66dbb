"""Which columns of a batch a model reads, and which of its places are one sequence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fusedkd.models.kinds import bare


def base_model(model: Any) -> Any:
    """The model out of what wraps it for several processes, and out of its adapters."""
    model = bare(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _kind(model: Any) -> Any:
    return type(base_model(model))


def columns(model: Any) -> frozenset[str]:
    """The arguments that the forward of ``model`` names."""
    return _parameters(_kind(model))[0]


def own_columns(model: Any, other: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a batch for two models, what is for ``model``: what its forward names, and, if it takes
    more than it names (as for padding-free attention), what ``other`` does not name either. One
    that names nothing gets everything."""
    named, takes_more = _parameters(_kind(model))
    theirs = columns(other) if other is not None and named else frozenset()
    return {
        name: value
        for name, value in inputs.items()
        if name in named or (takes_more and name not in theirs)
    }


def known_ids(model: Any, other: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of two models with vocabularies of different sizes, the smaller one has no embedding for a
    padding token that was added for the other: what padding holds is nobody's affair.

    Raises:
        ValueError: such a token is none of the padding.
    """
    sizes = [_embeddings(model), _embeddings(other)]
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if None in sizes or sizes[0] >= sizes[1] or ids is None:
        return inputs
    unknown = ids >= sizes[0]
    padding = torch.zeros_like(unknown) if mask is None or mask.dim() != 2 else mask == 0
    if (unknown & ~padding).any():
        raise ValueError(
            f"input_ids holds {int(ids.max())}: the {type(base_model(model)).__name__} knows "
            f"{sizes[0]:,} tokens, the other model {sizes[1]:,}: expected data without tokens that "
            "only one of them has."
        )
    return {**inputs, "input_ids": ids.masked_fill(unknown, 0)}


def _embeddings(model: Any) -> Any:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


@cache
def _parameters(kind: Any) -> tuple[frozenset[str], bool]:
    """What the forward of a class names, or of the nearest above it that names anything; whether
    its own takes more."""
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    forwards = [vars(above)["forward"] for above in kind.__mro__ if "forward" in vars(above)]
    signatures = [inspect.signature(forward).parameters.values() for forward in forwards]
    more = any(p.kind is rest[1] for p in signatures[0])
    names = [{p.name for p in found if p.kind not in rest} - {"self"} for found in signatures]
    return frozenset(next(filter(None, names), ())), more


def spans(batch: Mapping[str, Any], row: int) -> list[Tensor]:
    """The positions of each sequence in a row of a batch: without padding, and apart where several
    are in one row, which their position ids tell."""
    ids, mask, positions = (batch.get(x) for x in ("input_ids", "attention_mask", "position_ids"))
    there = torch.ones_like(ids[row]) if mask is None else mask[row]  # type: ignore[index]
    there = there.nonzero()[:, 0]
    starts = [] if positions is None else (positions[row, there] == 0).nonzero()[:, 0].tolist()
    bounds = sorted({0, *starts, len(there)})
    return [there[a:b] for a, b in pairwise(bounds)]
