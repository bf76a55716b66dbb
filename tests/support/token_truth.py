"""Log-probabilities and entropies of tokens from the formulas alone, at any precision; and random
calls, by a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedkd import LMHead

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class TokenCase:
    """A call: leaves by name, tokens, keywords."""

    leaves: dict[str, Tensor]
    tokens: Tensor
    scale: float = 1.0
    softcap: float | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype

    @property
    def wanted(self) -> list[str]:
        return [name for name, x in self.leaves.items() if x.requires_grad]

    def side(self) -> Tensor | LMHead:
        if "logits" in self.leaves:
            return self.leaves["logits"]
        return LMHead(
            self.leaves["hidden"],
            self.leaves["weight"],
            self.leaves.get("bias"),
            logit_scale=self.scale,
            softcap=self.softcap,
        )


def log_probs(case: TokenCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of every token and row, and the leaves that they are functions of; of a head its raw logits,
    too."""
    named = {name: x.detach().to(dtype).requires_grad_() for name, x in case.leaves.items()}
    if "logits" in named:
        raw = named["logits"]
    else:
        raw = named["hidden"] @ named["weight"].T
        raw = raw + named["bias"] if "bias" in named else raw
        named["raw"] = raw
    z = raw[..., : case.keywords.get("vocab_size")] * case.scale
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    log_q = (z / case.keywords.get("temperature", 1.0)).log_softmax(-1)
    several = case.tokens.dim() == z.dim()
    ids = (case.tokens if several else case.tokens[..., None]).long()
    there = ids >= 0
    lp = torch.where(there, log_q.gather(-1, ids.clamp(min=0)), 0.0)
    zero = log_q == -math.inf
    h = -(log_q.exp() * log_q.masked_fill(zero, 0.0)).sum(-1)
    return lp if several else lp[..., 0], torch.where(there.any(-1), h, 0.0), named


def random_case(seed: int) -> TokenCase:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice(DTYPES)
    leading = rng.choice([(), (1,), (5,), (2, 3), (2, 1, 4)])
    v, h = rng.choice([2, 17, 64, 257, 2049, 4100]), rng.choice([3, 16])
    several = rng.choice([0, 0, 1, 5])
    vocab = rng.choice([v, v, max(1, v - 3)])
    tokens = torch.randint(vocab, (*leading, several) if several else leading, generator=g)
    if rng.random() < 0.5:
        drop = torch.rand(tokens.shape, generator=g) < 0.3
        tokens = tokens.masked_fill(drop, rng.choice([-1, -100]) if several else -100)
    keywords: dict[str, Any] = {"temperature": rng.choice([1.0, 1.0, 2.0, 0.3])}
    if vocab != v:
        keywords["vocab_size"] = vocab

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * size).to(dtype)

    form = rng.choice(["logits", "frozen", "trained", "biased"])
    if form == "logits":
        x = draw(*leading, v, size=rng.choice([0.1, 3.0]))
        if rng.random() < 0.3:
            x = x + rng.choice([100, -60])  # what all have in common
        return TokenCase({"logits": x.requires_grad_()}, tokens, keywords=keywords)
    trained = form != "frozen"
    leaves = {"hidden": draw(*leading, h), "weight": draw(v, h, size=0.7)}
    leaves["hidden"].requires_grad_(rng.random() < 0.9 or not trained)
    leaves["weight"].requires_grad_(trained)
    if form == "biased":
        leaves["bias"] = draw(v).requires_grad_(rng.random() < 0.8)
    keywords["chunk_bytes"] = rng.choice([None, 3 * v * 8])
    cap = rng.choice([None, None, 3.0])
    return TokenCase(leaves, tokens, rng.choice([1.0, 0.5]), cap, keywords)
