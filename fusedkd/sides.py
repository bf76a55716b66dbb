"""What a call is given, checked: the two sides, and what comes one per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedkd.logits import TAILS, LMHead, SparseTeacher
from fusedkd.spec import IDENTITY, LossSpec, Transform, check_whole, is_finite

__all__ = ["Side", "autocast_dtype", "check_pair", "check_rows", "side_of", "true_vocabulary"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Side:
    """One side's tensors, by name: ``student`` or ``teacher``."""

    name: str
    tensor: Tensor  # logits (..., V), hidden states (..., H) or log-probabilities (..., K)
    columns: int | None  # None: any vocabulary
    weight: Tensor | None = None
    bias: Tensor | None = None
    transform: Transform = IDENTITY
    indices: Tensor | None = None  # of the log-probabilities
    tail: str | None = None

    @property
    def leading(self) -> torch.Size:
        return self.tensor.shape[:-1]


def side_of(name: str, value: Tensor | LMHead | SparseTeacher) -> Side:
    """The side called ``name``, "student" or "teacher", which alone may be a SparseTeacher."""
    if isinstance(value, SparseTeacher) and name == "teacher":
        return _sparse(value)
    if isinstance(value, Tensor):
        _check_dtype(name, value)
        if value.dim() < 1 or value.shape[-1] < 1:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: expected logits (..., V), vocabulary last."
            )
        return Side(name, value, value.shape[-1])
    if not isinstance(value, LMHead):
        raise TypeError(
            f"{name} is a {type(value).__name__}: expected logits (a Tensor) or "
            "LMHead(hidden, weight); as teacher also SparseTeacher(indices, log_probs). A "
            "transformers output has its logits in `.logits`."
        )
    _check_head(name, value)
    transform = Transform(float(value.logit_scale), float(value.softcap or 0.0))
    return Side(name, value.hidden, value.weight.shape[0], value.weight, value.bias, transform)


def _sparse(teacher: SparseTeacher) -> Side:
    indices, log_probs = teacher.indices, teacher.log_probs
    for part, tensor in (("indices", indices), ("log_probs", log_probs)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"teacher.{part} is a {type(tensor).__name__}: expected a Tensor.")
    _check_dtype("teacher.log_probs", log_probs)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"teacher.indices is {indices.dtype}: expected torch.int64 or torch.int32 vocabulary "
            "ids; use indices.long()."
        )
    if indices.dim() < 1 or indices.shape != log_probs.shape:
        raise ValueError(
            f"teacher.indices has shape {tuple(indices.shape)}, teacher.log_probs "
            f"{tuple(log_probs.shape)}: expected (..., K) for both, with index -1 as padding."
        )
    _check_device("teacher.indices", indices, "teacher.log_probs", log_probs)
    if teacher.tail not in TAILS:
        raise ValueError(
            f"teacher.tail={teacher.tail!r}: expected one of {', '.join(map(repr, TAILS))}."
        )
    return Side("teacher", log_probs, None, indices=indices, tail=teacher.tail)


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}; "
            f"convert it, e.g. {name}.float()."
        )


def _check_head(name: str, head: LMHead) -> None:
    hidden, weight, bias = head.hidden, head.weight, head.bias
    for part, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and part == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{part} is a {type(tensor).__name__}: expected a Tensor.")
        _check_dtype(f"{name}.{part}", tensor)
        _check_device(f"{name}.{part}", tensor, f"{name}.hidden", hidden)
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
    if weight.shape[0] < 1 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}: expected (V, H) and (V,), V > 0."
        )
    for part, number in (("logit_scale", head.logit_scale), ("softcap", head.softcap)):
        if part == "softcap" and number is None:
            continue
        if not is_finite(number):
            raise ValueError(f"{name}.{part}={number!r}: expected a finite Python number.")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"{name}.softcap={head.softcap!r}: expected a number above 0, or None.")


def _check_device(name: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other} on {reference.device}: expected one device. "
            f"Move it: {name}.to({other}.device)."
        )


def check_pair(s: Side, t: Side) -> None:
    _check_device("teacher", t.tensor, "student", s.tensor)
    if t.tensor.requires_grad:
        what = "logits" if t.weight is None else "hidden states"
        what = what if t.indices is None else "log_probs"
        raise ValueError(
            f"the teacher's {what} require grad, but the teacher is a constant here: run it under "
            "torch.no_grad(), or detach them."
        )
    if s.leading != t.leading:
        raise ValueError(
            f"student has leading shape {tuple(s.leading)}, teacher {tuple(t.leading)}: expected "
            "the same tokens on both sides: equal leading dimensions, before the last of each "
            "(vocabulary, hidden size or K)."
        )


def true_vocabulary(s: Side, t: Side, vocab_size: int | None) -> int:
    assert s.columns is not None
    columns = s.columns if t.columns is None else t.columns
    if vocab_size is None:
        if s.columns != columns:
            raise ValueError(
                f"student has {s.columns} vocabulary columns, teacher {t.columns}: expected the "
                "same vocabulary. If one is only padded further, pass vocab_size=len(tokenizer); "
                "with two tokenizers their distributions cannot be compared entry by entry."
            )
        return s.columns
    check_whole("vocab_size", vocab_size, 1)
    if not 1 <= vocab_size <= min(s.columns, columns):
        raise ValueError(
            f"vocab_size={vocab_size}: expected 1 to {min(s.columns, columns)}, the columns that "
            f"both have (student {s.columns}, teacher {t.columns or 'any'})."
        )
    return vocab_size


def autocast_dtype(s: Side, t: Side) -> torch.dtype | None:
    """The dtype in which autocast would have a linear layer multiply; None: nothing to cast."""
    device = s.tensor.device.type
    heads = s.weight is not None or t.weight is not None
    return torch.get_autocast_dtype(device) if heads and torch.is_autocast_enabled(device) else None


def check_rows(
    s: Side, labels: Tensor | None, token_weights: Tensor | None, spec: LossSpec
) -> None:
    if labels is None and spec.ce_weight > 0:
        raise ValueError(f"ce_weight={spec.ce_weight:g} needs labels, but labels is None.")
    for name, tensor in (("labels", labels), ("token_weights", token_weights)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: expected a Tensor or None.")
        if tensor.shape != s.leading:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(s.leading)}, one entry "
                "per token of the student."
            )
        _check_device(name, tensor, "student", s.tensor)
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}: expected torch.int64; use labels.long().")
    if token_weights is not None and token_weights.is_complex():
        raise TypeError(f"token_weights is {token_weights.dtype}: expected real numbers or bool.")
