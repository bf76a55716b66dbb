"""A distribution as hidden states and the output projection that turns them into logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedkd.checks import check_device, check_logits, check_tensor, is_finite
from fusedkd.distributions.side import Side
from fusedkd.modes import stand_in
from fusedkd.spec import Transform
from fusedkd.synchronised import check_synchronised


@dataclass(frozen=True, eq=False)
class LMHead:
    """Hidden states and the output projection that turns them into logits, which then never exist
    in full.

    The logits are ``softcap * tanh(x / softcap)`` of ``x = logit_scale * (hidden @ weight.T +
    bias)``, without the tanh where ``softcap`` is None.

    Args:
        hidden: (..., H) last hidden states, after the final norm.
        weight: (V, H) the ``lm_head`` (or tied embedding) matrix.
        bias: (V,) or None.
        logit_scale: factor on the logits (Cohere's ``logit_scale``, 1 / Granite's
            ``logits_scaling``).
        softcap: Gemma 2's ``final_logit_softcapping``, or None.
        ids: (V',) int64 or int32, none twice: the vocabulary is these rows of ``weight`` and
            ``bias``, in this order, and labels and other ids count in it (what two tokenizers
            share, a draft model's head). They are gathered piece by piece, never all at once; the
            gradient has the weight's shape, 0 elsewhere. None: all rows.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    ids: Tensor | None = None


def head_side(name: str, head: LMHead, fewest: int) -> Side:
    """The head as the side called ``name``, checked, of no fewer columns than ``fewest``."""
    _check_head(name, head, fewest)
    if name != "teacher":
        check_synchronised(head.weight)
    transform = Transform(float(head.logit_scale), float(head.softcap or 0.0))
    columns = head.weight.shape[0] if head.ids is None else head.ids.numel()
    ids = None if head.ids is None else head.ids.detach().long()
    return Side(name, head.hidden, columns, head.weight, head.bias, transform, ids=ids)


def _check_head(name: str, head: LMHead, fewest: int) -> None:
    hidden, weight, bias = head.hidden, head.weight, head.bias
    for part, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and part == "bias":
            continue
        check_logits(f"{name}.{part}", tensor)
        assert tensor is not None
        check_device(f"{name}.{part}", tensor, f"{name}.hidden", hidden)
        if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{name}.{part} is {tensor.dtype} but {name}.hidden is {hidden.dtype}: expected "
                "one dtype. Convert one of them, or call under torch.autocast."
            )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected (..., H) and (V, H), as in hidden @ weight.T. Transpose the weight?"
        )
    if weight.shape[0] < fewest or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}: expected (V, H) and (V,), V > 0."
        )
    if head.ids is not None:
        _check_ids(f"{name}.ids", head.ids, weight)
    for part, number in (("logit_scale", head.logit_scale), ("softcap", head.softcap)):
        if part == "softcap" and number is None:
            continue
        if not is_finite(number):
            raise ValueError(f"{name}.{part}={number!r}: expected a finite Python number.")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"{name}.softcap={head.softcap!r}: expected a number above 0, or None.")


def _check_ids(name: str, ids: Tensor, weight: Tensor) -> None:
    check_tensor(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {ids.dtype}: expected torch.int64 or torch.int32 rows.")
    if ids.dim() != 1 or not ids.numel():
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected (V',), at least one row.")
    check_device(name, ids, "weight", weight)
    rows = weight.shape[0]
    near = ids.long().clamp(0, rows - 1)
    outside = near != ids
    times = near.new_zeros(rows).index_add_(0, near, torch.ones_like(near))
    expected = f"expected rows of the weight, 0 to {rows - 1}, none twice"
    if ids.device.type != "cpu" or stand_in(ids):
        torch._assert_async(~(outside.any() | (times > 1).any()), f"{name}: {expected}")
    elif outside.any():
        raise ValueError(f"{name} holds {int(ids[outside][0])}: {expected}.")
    elif (times > 1).any():
        raise ValueError(f"{name} holds {int(times.argmax())} twice: {expected}.")
