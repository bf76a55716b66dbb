"""What a teacher's answers take on the disk, as the cache's own layouts tell."""

from __future__ import annotations

from typing import NamedTuple

from fusedkd.cache.hidden import layout_of
from fusedkd.cache.policy import Policy


class Kept(NamedTuple):
    name: str
    per_token: float  # bytes, at most
    once: int = 0  # bytes: the head's


def caches(
    vocab_size: int, hidden_size: int, head_bytes: int, top_k: int, draws: int
) -> list[Kept]:
    """Every kind of cache."""
    kinds: dict[str, Policy] = {
        f"top {top_k}": Policy("top", top_k),
        f"{draws} draws": Policy("sample", draws),
        "hidden, bf16": Policy("bf16", hidden_size),
        "hidden, int8": Policy("int8", hidden_size),
    }
    return [
        Kept(
            name,
            layout_of(policy, vocab_size, (1.0,)).most_bytes_per_token,
            head_bytes if policy.hidden else 0,
        )
        for name, policy in kinds.items()
    ]
