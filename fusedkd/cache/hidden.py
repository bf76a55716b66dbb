"""Hidden states instead of probabilities: every divergence and temperature from one cache.

Policies ``bf16`` and ``int8`` keep the input of the teacher's head (lm_head), after the final norm,
H numbers for each of a sequence's L tokens, and the head once, in ``head.safetensors``.

========== =============================================================================
``states`` bf16, little-endian, token after token; or ``int8``, of which each group of 64
           neighbours (the last one of a token may have fewer) is multiplied by its
``scales`` fp16, the group's largest absolute value / 127. With ``int8`` only
========== =============================================================================

``head.safetensors`` holds ``weight`` (padded vocabulary, H) and perhaps ``bias``, in the teacher's
own dtype; ``logit_scale`` and ``softcap`` are in the manifest, with its SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedkd.cache.errors import CacheError
from fusedkd.cache.layout import Columns, Layout

GROUP = 64


@dataclass(frozen=True)
class HiddenLayout(Layout):
    """As :class:`Layout`, of hidden states: ``policy.k`` is H, and every temperature is served."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("states",) if self.policy.kind == "bf16" else ("states", "scales")

    @property
    def k(self) -> int:
        return self.policy.k

    @property
    def groups(self) -> int:
        """Of one token."""
        return -(-self.k // GROUP)

    @property
    def most_bytes_per_token(self) -> float:
        return 2 * self.k if self.policy.kind == "bf16" else self.k + 2 * self.groups

    def slot(self, temperature: float) -> int:
        return 0

    def encode_states(self, hidden: Tensor) -> Columns:
        """One sequence's columns, from (L, H).

        Raises:
            CacheError: NaN or infinity, or another H.
        """
        if hidden.shape[-1] != self.k:
            raise CacheError(f"the teacher's hidden states have {hidden.shape[-1]} numbers, not H.")
        if not hidden.isfinite().all():
            token = int((~hidden.isfinite().all(-1)).nonzero()[0])
            raise CacheError(
                f"the teacher's hidden states are NaN or infinite at token {token}: nothing can be "
                "learnt from that. A teacher in float16 may need --teacher-dtype bfloat16."
            )
        if self.policy.kind == "bf16":
            return {"states": _bytes(hidden.to(torch.bfloat16))}
        padding = self.groups * GROUP - self.k
        grouped = torch.nn.functional.pad(hidden.float(), (0, padding)).unflatten(-1, (-1, GROUP))
        scales = (grouped.abs().amax(-1) / 127).clamp(max=65504).half()
        steps = grouped / scales.float().clamp(min=1e-30)[..., None]
        codes = steps.round().clamp(-127, 127).to(torch.int8).flatten(-2)[:, : self.k]
        return {"states": _bytes(codes), "scales": _bytes(scales)}

    def states(self, columns: Mapping[str, Any], tokens: int) -> Tensor:
        """(L, H) bf16.

        Raises:
            ValueError: columns that :meth:`encode_states` does not make.
        """
        wide = self.policy.kind == "bf16"
        dtype = torch.bfloat16 if wide else torch.int8
        found = _tensor("states", columns["states"], dtype, (tokens, self.k))
        if not wide:
            scales = _tensor("scales", columns["scales"], torch.float16, (tokens, self.groups))
            each = scales.float().repeat_interleave(GROUP, -1)[:, : self.k]
            found = (found.float() * each).to(torch.bfloat16)
        if not found.isfinite().all():
            raise ValueError("there is a NaN or an infinity among its states.")
        return found


def layout_of(policy: Any, vocab_size: int, temperatures: tuple[float, ...]) -> Layout:
    """How a policy's rows are written.

    Raises:
        CacheError: as :class:`Layout`.
    """
    kind = HiddenLayout if policy.hidden else Layout
    return kind(policy, vocab_size, temperatures)


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(name: str, raw: Any, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    size = shape[0] * shape[1] * dtype.itemsize
    if len(raw) != size:
        raise ValueError(f"its {name} have {len(raw):,} bytes: expected {size:,}.")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)
