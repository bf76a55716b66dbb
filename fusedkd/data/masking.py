"""Masked-LM batches as DistilBERT makes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase


def count_tokens(rows: Iterable[Any], size: int) -> np.ndarray:
    """(size,) how often each id occurs in the ``input_ids`` of ``rows``."""
    counts = np.zeros(size, np.int64)
    for row in rows:
        counts += np.bincount(np.asarray(row["input_ids"]), minlength=size)[:size]
    return counts


class FrequencyMasking(DataCollatorForLanguageModeling):
    """Pads, masks and labels, anew at every call. Of the masked tokens 80 % become the mask token,
    10 % a random one, 10 % stay.

    A share ``probability`` of a batch's real tokens is masked, exactly and not on average, drawn
    without replacement in proportion to count ** -smoothing, so that rare tokens are learnt too
    (XLM's sampling, in DistilBERT's release with 0.7). Special tokens never are.

    Args:
        tokenizer: with a mask token.
        counts: (V,) how often each id occurs in the data; a token that never does counts as one
            that occurs once.
        probability: 0 masks nothing and leaves no label (TinyBERT's general stage).
        smoothing: 0 draws uniformly.

    Raises:
        ValueError: no mask token, or numbers out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        counts: np.ndarray,
        probability: float = 0.15,
        smoothing: float = 0.7,
    ) -> None:
        if not 0 <= probability < 1 or not 0 <= smoothing < math.inf:
            raise ValueError(
                f"mlm_probability={probability}, mlm_smoothing={smoothing}: expected a share from "
                "0 to below 1, and an exponent of at least 0 (0.7 is XLM's, 0 uniform)."
            )
        # the base class then masks every token that is not said to be special: those not drawn are
        super().__init__(tokenizer, mlm_probability=1.0)
        self.share = probability
        self.weights = torch.from_numpy(np.maximum(counts, 1).astype(np.float64) ** -smoothing)
        self.weights[torch.tensor(tokenizer.all_special_ids, dtype=torch.long)] = 0.0

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[Any, Any]:
        """As the base class's; which tokens is drawn here."""
        if not self.share:
            return inputs, torch.full_like(inputs, -100)
        special = self.weights[inputs] == 0
        if special_tokens_mask is not None:
            special |= torch.as_tensor(special_tokens_mask).bool()
        drawn = self._draw(self.weights[inputs].masked_fill(special, 0.0))
        return super().torch_mask_tokens(inputs, ~drawn, offset_mapping)

    def _draw(self, weights: Tensor) -> Tensor:
        flat, drawn = weights.flatten(), torch.zeros(weights.numel(), dtype=torch.bool)
        number = math.ceil(self.share * int((flat > 0).sum()))
        if number:
            drawn[torch.multinomial(flat, number)] = True
        return drawn.view(weights.shape)
