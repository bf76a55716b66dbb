"""One side of a comparison as named tensors, whatever its form; and whether two fit together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.checks import check_device, check_whole
from fusedkd.spec import IDENTITY, Transform


class Side(NamedTuple):
    """The tensors of ``student`` or ``teacher``. A teacher may have none."""

    name: str
    tensor: Any  # logits (..., V), hidden states (..., H) or log-probabilities (..., K)
    columns: int | None  # None: any vocabulary
    weight: Tensor | None = None
    bias: Tensor | None = None
    transform: Transform = IDENTITY
    indices: Tensor | None = None  # of the log-probabilities
    tail: str | None = None
    entropy: Tensor | None = None  # (...,) of a teacher of which only some is known
    ids: Tensor | None = None  # of the weight's rows that are the vocabulary; None: all

    @property
    def leading(self) -> torch.Size:
        leading: torch.Size = self.tensor.shape[:-1]
        return leading

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self.tensor is None else self.tensor.dtype


NOTHING = Side("teacher", None, None)


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
    if not heads or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
