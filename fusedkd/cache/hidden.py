"""Hidden states instead of probabilities: every divergence and temperature from one cache.

Policies ``bf16`` and ``int8`` keep the input of the teacher's head (lm_head), after the final norm,
H numbers for each of a sequence's L tokens, and the head once, in ``head.safetensors``.

=========== ============================================================================
``states``  with ``bf16``: bf16, little-endian, token after token
``rotated`` with ``int8``: int8. Each group of 64 neighbours (the last one of a token is filled up
            with zeros) is rotated: number j of a token has its sign turned where bit j of
            SHAKE-128 of ``fusedkd`` is 1 (the first bit is a byte's highest), and the group is
            multiplied by Sylvester's Hadamard matrix / 8, which is its own inverse. Then it is
            divided by its scale, and rounded
``scales``  with ``int8``: fp16, the rotated group's largest absolute value / 127
=========== ============================================================================

Large models have a few numbers in H that are tens of times as large as all others. Rounded as it
is, a group of 64 with one of these loses the 63 others; rotated, all share the loss.

``head.safetensors`` holds ``weight`` (padded vocabulary, H) and perhaps ``bias``, in the teacher's
own dtype; ``logit_scale`` and ``softcap`` are in the manifest, with its SHA-256.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedkd.cache.actual import ActualLayout
from fusedkd.cache.errors import CacheError
from fusedkd.cache.layout import Columns, Layout
from fusedkd.cache.policy import ACTUAL, HIDDEN

GROUP = 64


@dataclass(frozen=True)
class HiddenLayout(Layout):
    """As :class:`Layout`, of hidden states: ``policy.k`` is H, and every temperature is served."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("states",) if self.policy.kind == "bf16" else ("rotated", "scales")

    @property
    def k(self) -> int:
        return self.policy.k

    @property
    def groups(self) -> int:
        """Of one token."""
        return -(-self.k // GROUP)

    @property
    def most_bytes_per_token(self) -> float:
        return 2 * self.k if self.policy.kind == "bf16" else self.groups * (GROUP + 2)

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
        turned = hidden.float() * _signs(self.k).to(hidden.device)
        grouped = torch.nn.functional.pad(turned, (0, padding)).unflatten(-1, (-1, GROUP))
        grouped = grouped @ _hadamard().to(hidden.device) / 8
        scales = (grouped.abs().amax(-1) / 127).clamp(max=65504).half()
        steps = grouped / scales.float().clamp(min=1e-30)[..., None]
        codes = steps.round().clamp(-127, 127).to(torch.int8)
        return {"rotated": _bytes(codes), "scales": _bytes(scales)}

    def states(self, columns: Mapping[str, Any], tokens: int) -> Tensor:
        """(L, H) bf16.

        Raises:
            ValueError: columns that :meth:`encode_states` does not make.
        """
        if self.policy.kind == "bf16":
            found = _tensor("states", columns, torch.bfloat16, (tokens, self.k))
        else:
            codes = _tensor("rotated", columns, torch.int8, (tokens, self.groups, GROUP))
            scales = _tensor("scales", columns, torch.float16, (tokens, self.groups, 1))
            grouped = codes.float() @ _hadamard()  # exact: whole numbers up to 64 * 127
            turned = (grouped * (scales.float() / 8)).flatten(1)[:, : self.k]
            found = (turned * _signs(self.k)).to(torch.bfloat16)
        if not found.isfinite().all():
            raise ValueError("there is a NaN or an infinity among its states.")
        return found


def layout_of(policy: Any, vocab_size: int, temperatures: tuple[float, ...]) -> Layout:
    """How a policy's rows are written.

    Raises:
        CacheError: as :class:`Layout`.
    """
    kinds: dict[str, type[Layout]] = {ACTUAL: ActualLayout, **dict.fromkeys(HIDDEN, HiddenLayout)}
    return kinds.get(policy.kind, Layout)(policy, vocab_size, temperatures)


@cache
def _signs(width: int) -> Tensor:
    """(H,) of 1 and -1, the same for ever."""
    bits = np.frombuffer(hashlib.shake_128(b"fusedkd").digest(-(-width // 8)), np.uint8)
    return torch.from_numpy(1 - 2 * np.unpackbits(bits)[:width].astype(np.float32))


@cache
def _hadamard() -> Tensor:
    """(64, 64) of 1 and -1."""
    made = torch.ones(1, 1)
    while len(made) < GROUP:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(
    name: str, columns: Mapping[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    raw, size = columns[name], math.prod(shape) * dtype.itemsize
    if len(raw) != size:
        raise ValueError(f"its {name} have {len(raw):,} bytes: expected {size:,}.")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)
