"""Seeing what a transformers model holds inside while it runs.

Hidden states are what ``output_hidden_states`` returns. Attention has no such way out: weights come
from eager attention only (with sdpa ``outputs.attentions`` is empty, silently), are after dropout
in training, and scores are not returned at all. So an attention function is registered that writes
down its queries and keys and calls sdpa.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import TransformersKwargs

from fusedkd.features import AttentionStates
from fusedkd.models.layers import depth

_NAME = "fusedkd_sdpa"
# Tensors that attention may be handed and that change no score: transformers' own, and what passes
# through. Others (sinks, a position bias, chosen keys) may, and are not written down here.
_HARMLESS = {
    *TransformersKwargs.__annotations__,
    *("cache_position", "cu_seqlens", "hidden_states", "shift_labels"),
}


@dataclass
class Captured:
    """What one forward pass held: L + 1 hidden states (B, L, D), the first the embeddings' output,
    and L layers of attention if those were asked for. A shared layer counts at each application."""

    hidden: tuple[Tensor, ...] = ()
    attention: list[AttentionStates] = field(default_factory=list)


_records: ContextVar[list[AttentionStates] | None] = ContextVar("_records", default=None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if (records := _records.get()) is not None:
        others = (name for name, x in kwargs.items() if isinstance(x, Tensor))
        if named := [name for name in others if name not in _HARMLESS]:
            raise ValueError(
                f"{type(module).__name__} gives its attention {named[0]}, which may change the "
                "scores: attention terms are not available for this model; hidden-state terms are."
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        records.append(AttentionStates(query, key, value, scaling, attention_mask, causal))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )


def expose_attention(model: Any) -> None:
    """Have a model attend through sdpa in a way that :func:`capture` can see. Its saved config does
    not change.

    Raises:
        ValueError: the model does not run on sdpa, such as those with soft-capped scores.
    """
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)  # without one, padding would be seen
    try:
        model.set_attn_implementation(_NAME)
    except ValueError as error:
        raise ValueError(
            f"attention terms are not available for {type(model).__name__}, hidden-state terms "
            f"are: {error}"
        ) from None


@contextmanager
def capture(model: Any, attention: bool = False) -> Iterator[Captured]:
    """While open, one forward pass of ``model`` fills the :class:`Captured` that this gives.

    It is filled when the model's forward returns, before other forward hooks that were there, and
    is closed again before a backward, in which checkpointed layers run once more.

    Args:
        attention: also see attention; :func:`expose_attention` came first.

    Raises:
        RuntimeError: when the forward returns: another number of states than the model has layers.
    """
    seen = Captured()

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def take(module: nn.Module, args: Any, outputs: Any) -> Any:
        seen.hidden = tuple(outputs.hidden_states or ())
        _check(model, seen, attention)
        # the caller did not ask for them: a Trainer would gather them as predictions
        return type(outputs)(**{k: v for k, v in outputs.items() if k != "hidden_states"})

    handles = (
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(take, prepend=True),
    )
    token = _records.set(seen.attention if attention else None)
    try:
        yield seen
    finally:
        _records.reset(token)
        for handle in handles:
            handle.remove()


def _check(model: Any, seen: Captured, attention: bool) -> None:
    name, layers = type(model).__name__, depth(model.config)
    if len(seen.hidden) != layers + 1:
        raise RuntimeError(
            f"{name} returned {len(seen.hidden)} hidden states: expected {layers + 1}, one more "
            "than it has layers. Hidden-state terms need a model that returns them all."
        )
    if not attention:
        return
    if len(seen.attention) != layers:
        raise RuntimeError(
            f"{len(seen.attention)} layers of {name} attended through transformers' attention "
            f"interface: expected {layers}. Attention terms need a model all of whose layers do."
        )
    lost = torch.is_grad_enabled() and not seen.attention[-1].query.requires_grad
    if lost and seen.hidden[-1].requires_grad:
        raise RuntimeError(
            f"the attention of {name} has no gradient, as under reentrant checkpointing: pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
