"""One number a token: how probable the teacher thinks the token that is there. It is all that a
student with another tokenizer needs (:func:`fusedkd.alignment.alm_loss`).

Policy ``actual``: of a sequence of L tokens,

============= ==========================================================================
``log_probs`` fp32, little-endian, L of them: number n is the natural log-probability, at T = 1, of
              token n + 1 given those up to n; the last is 0
============= ==========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedkd.cache.errors import CacheError
from fusedkd.cache.layout import Array, Columns, Layout
from fusedkd.distributions import LMHead
from fusedkd.log_probs import token_log_probs

_FP32 = np.dtype("<f4")


@dataclass(frozen=True)
class ActualLayout(Layout):
    """As :class:`Layout`, of the actual tokens' log-probabilities, at T = 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperatures != (1.0,):
            raise CacheError(
                f"--temperatures {self._listed()} with --actual: what both models think of a text "
                "is compared at 1: expected none."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return ("log_probs",)

    @property
    def most_bytes_per_token(self) -> float:
        return _FP32.itemsize

    def encode_log_probs(self, log_probs: Array) -> Columns:
        """One sequence's columns, from (L,).

        Raises:
            CacheError: NaN, or above 0.
        """
        if not (log_probs <= 0).all():
            token = int(np.flatnonzero(~(log_probs <= 0))[0])
            raise CacheError(
                f"the teacher gives the token after token {token} the log-probability "
                f"{log_probs[token]}: nothing can be learnt from that. A teacher in float16 may "
                "need --teacher-dtype bfloat16."
            )
        return {"log_probs": log_probs.astype(_FP32).tobytes()}

    def log_probs(self, columns: Mapping[str, Any], tokens: int) -> Array:
        """(L,) fp32.

        Raises:
            ValueError: columns that :meth:`encode_log_probs` does not make.
        """
        raw = columns["log_probs"]
        if len(raw) != (size := tokens * _FP32.itemsize):
            raise ValueError(f"its log_probs have {len(raw):,} bytes: expected {size:,}.")
        found = np.frombuffer(raw, _FP32).astype(np.float32)
        if not (found <= 0).all():
            raise ValueError("there is a log-probability that is NaN or above 0.")
        return found


def actual_log_probs(answers: Tensor | LMHead, ids: Tensor) -> Array:
    """(B, L) what a model's answers say of the tokens (B, L) after each; 0 for the last."""
    device = (answers.hidden if isinstance(answers, LMHead) else answers).device
    after = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1).to(device)
    found = token_log_probs(answers, after).log_probs.float()
    return found.clamp(max=0).cpu().numpy()  # rounded sums of exponentials may lie above by an ulp
