"""What a call is given, checked: the two sides, and what comes one per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedkd.checks import (
    check_constant,
    check_device,
    check_logits,
    check_tensor,
    check_whole,
    is_finite,
)
from fusedkd.logits import TAILS, LMHead, SparseTeacher
from fusedkd.spec import IDENTITY, LossSpec, Transform

__all__ = [
    "Side",
    "autocast_dtype",
    "check_pair",
    "check_rows",
    "check_temperature",
    "side_of",
    "teacher_of",
    "true_vocabulary",
]


@dataclass(frozen=True)
class Side:
    """One side's tensors, by name: ``student`` or ``teacher``. A teacher may have none."""

    name: str
    tensor: Any  # logits (..., V), hidden states (..., H) or log-probabilities (..., K)
    columns: int | None  # None: any vocabulary
    weight: Tensor | None = None
    bias: Tensor | None = None
    transform: Transform = IDENTITY
    indices: Tensor | None = None  # of the log-probabilities
    tail: str | None = None

    @property
    def leading(self) -> torch.Size:
        leading: torch.Size = self.tensor.shape[:-1]
        return leading

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self.tensor is None else self.tensor.dtype


def teacher_of(value: Tensor | LMHead | SparseTeacher | None, fewest: int = 1) -> Side:
    """The teacher's side, which alone may be sparse, or nothing."""
    if value is None:
        return Side("teacher", None, None)
    return _sparse(value) if isinstance(value, SparseTeacher) else side_of("teacher", value, fewest)


def side_of(name: str, value: Tensor | LMHead, fewest: int = 1) -> Side:
    """The side called ``name``, "student" or "teacher", of no fewer columns than ``fewest``."""
    if isinstance(value, Tensor):
        check_logits(name, value)
        if value.dim() < 1 or value.shape[-1] < fewest:
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
    _check_head(name, value, fewest)
    transform = Transform(float(value.logit_scale), float(value.softcap or 0.0))
    return Side(name, value.hidden, value.weight.shape[0], value.weight, value.bias, transform)


def _sparse(teacher: SparseTeacher) -> Side:
    indices, log_probs = teacher.indices, teacher.log_probs
    check_tensor("teacher.indices", indices)
    check_logits("teacher.log_probs", log_probs)
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
    check_device("teacher.indices", indices, "teacher.log_probs", log_probs)
    if not isinstance(teacher.tail, str) or teacher.tail not in TAILS:
        raise ValueError(
            f"teacher.tail={teacher.tail!r}: expected one of {', '.join(map(repr, TAILS))}."
        )
    return Side("teacher", log_probs, None, indices=indices, tail=teacher.tail)


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
    for part, number in (("logit_scale", head.logit_scale), ("softcap", head.softcap)):
        if part == "softcap" and number is None:
            continue
        if not is_finite(number):
            raise ValueError(f"{name}.{part}={number!r}: expected a finite Python number.")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"{name}.softcap={head.softcap!r}: expected a number above 0, or None.")


def check_pair(s: Side, t: Side) -> None:
    """Raise unless the two can be compared, token by token."""
    if t.tensor is None:
        return
    check_device("teacher", t.tensor, "student", s.tensor)
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
    """How many columns count."""
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
    s: Side, t: Side, labels: Tensor | None, token_weights: Tensor | None, spec: LossSpec
) -> None:
    """Raise unless what comes one per token fits the student, and what the loss needs is there."""
    if t.tensor is None and spec.kd_weight:
        raise ValueError(
            f"teacher is None, but kd_weight={spec.kd_weight:g}: expected logits, LMHead(hidden, "
            "weight) or SparseTeacher(indices, log_probs); or kd_weight=0, for cross-entropy alone."
        )
    if labels is None and spec.ce_weight > 0:
        raise ValueError(f"ce_weight={spec.ce_weight:g} needs labels, but labels is None.")
    for name, tensor in (("labels", labels), ("token_weights", token_weights)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.shape != s.leading:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(s.leading)}, one entry "
                "per token of the student."
            )
        check_device(name, tensor, "student", s.tensor)
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}: expected torch.int64; use labels.long().")
    if token_weights is not None:
        check_constant("token_weights", token_weights, "real numbers or bool")


# Rounding of the normalisers is 1e-8 of them at best, and the divergence of two distributions is
# about half the variance of their logits' gap, over T^2. With a variance of 1, fp32 loses 2 to 7 %
# of forward KL at T = 1000 and 400 % at 10,000, where the formula in eager torch loses 90 % and
# 7,000 (8 x 2,000, 2026-11-28).
MOST_HEAT = {torch.float32: 1e3, torch.float64: 1e6}
LEAST_HEAT = 1e-30  # its inverse is a number, also in fp32


def check_temperature(spec: LossSpec, accumulate: torch.dtype) -> None:
    """Raise where the divergence would be rounding, and nothing else."""
    most = MOST_HEAT[accumulate]
    for name in ("temperature", "teacher_temperature"):
        if (value := getattr(spec, name)) < LEAST_HEAT:
            raise ValueError(f"{name}={value:g}: expected at least {LEAST_HEAT:g}.")
        if value > most:
            raise ValueError(
                f"{name}={value:g}: expected at most {most:g} for "
                f"{str(accumulate).removeprefix('torch.')}, beyond which the divergence is smaller "
                "than its rounding. Its limit is half the mean squared difference of centred "
                "logits, divided by T^2: train on that, or give fp64 tensors."
            )
