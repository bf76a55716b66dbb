"""Attention and relation terms: memory and processor time of a loss with its gradient, beside plain
torch, which holds all scores.

``python -m fusedkd.benchmarks.attention``. Student and teacher have heads of 64 entries in fp32;
half of the last sequence is padding. Peaks are those of a process of its own, less what was there
before, with the gradients. Processor time: the two in turns in one process, the best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd.features import AttentionStates, attention_kl, attention_score_mse, relation_kl

from .child import in_child
from .peak import peak, reset_peak

WIDTH = 64
Loss = Callable[[AttentionStates, AttentionStates, Tensor], Tensor]


def _seen(states: AttentionStates, tokens: Tensor) -> Tensor:
    mask = states.mask
    assert mask is not None
    return mask & tokens[:, None, :, None]


def _mse(s: AttentionStates, t: AttentionStates, tokens: Tensor) -> Tensor:
    seen = _seen(s, tokens)
    gap = (s.query @ s.key.mT - t.query @ t.key.mT) * WIDTH**-0.5
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    gap = gap - gap.where(seen, 0.0).sum(-1, keepdim=True) / count
    rows = gap.square().where(seen, 0.0).sum(-1) / count[..., 0]
    return rows.mean(1).sum() / tokens.sum()


def _kl(s: Tensor, t: Tensor, seen: Tensor, tokens: Tensor) -> Tensor:
    lowest = torch.finfo(s.dtype).min
    lq, lp = (x.masked_fill(~seen, lowest).log_softmax(-1) for x in (s, t))
    rows = F.kl_div(lq, lp, reduction="none", log_target=True).where(seen, 0.0).sum(-1)
    return rows.mean(1).sum() / tokens.sum()


def _attention(s: AttentionStates, t: AttentionStates, tokens: Tensor) -> Tensor:
    scores = ((x.query @ x.key.mT) * WIDTH**-0.5 for x in (s, t))
    return _kl(*scores, _seen(s, tokens), tokens)


def _relations(s: AttentionStates, t: AttentionStates, tokens: Tensor) -> Tensor:
    losses = []
    for name in ("query", "key", "value"):
        sides = (getattr(x, name) for x in (s, t))
        scores = ((x @ x.mT) * WIDTH**-0.5 for x in sides)
        losses.append(_kl(*scores, _seen(s, tokens), tokens))
    return torch.stack(losses).sum()


LOSSES: dict[str, dict[str, Loss]] = {
    "attention_mse": {"torch": _mse, "fusedkd": attention_score_mse},
    "attention_kl": {"torch": _attention, "fusedkd": attention_kl},
    "relation_kl": {
        "torch": _relations,
        "fusedkd": lambda s, t, tokens: relation_kl(s, t, tokens, heads=s.query.shape[1]),
    },
}


def states(batch: int, heads: int, length: int) -> tuple[AttentionStates, AttentionStates, Tensor]:
    """Of student and teacher, and which tokens are real."""
    torch.manual_seed(0)
    tokens = torch.ones(batch, length, dtype=torch.bool)
    tokens[-1, length // 2 :] = False
    mask = tokens[:, None, None].expand(batch, 1, length, length)
    sides = []
    for student in (True, False):
        parts = (torch.randn(batch, heads, length, WIDTH) for _ in range(3))
        sides.append(AttentionStates(*(x.requires_grad_(student) for x in parts), mask=mask))
    return sides[0], sides[1], tokens


def step(loss: Loss, sides: tuple[AttentionStates, AttentionStates, Tensor]) -> float:
    """The loss with its gradient."""
    student = sides[0]
    for x in (student.query, student.key, student.value):
        x.grad = None
    value = loss(*sides)
    value.backward()  # type: ignore[no-untyped-call]
    return value.item()


def peaks(name: str, batch: int, heads: int, length: int) -> dict[str, int]:
    """Bytes at most beside the states; for a process of its own."""
    torch.set_num_threads(1)
    found = {}
    for who in reversed(LOSSES[name]):  # first the one that takes less
        step(LOSSES[name][who], states(1, heads, min(length, 256)))  # what is loaded once
        sides = states(batch, heads, length)
        before = reset_peak()
        step(LOSSES[name][who], sides)
        found[who] = peak() - before
    return found


def seconds(name: str, batch: int, heads: int, length: int, rounds: int) -> dict[str, float]:
    """Of the processor, at best.

    Raises:
        AssertionError: the two losses differ.
    """
    sides, best = states(batch, heads, length), {}
    values = {}
    for _ in range(rounds):
        for who, loss in LOSSES[name].items():
            start = time.process_time()
            values[who] = step(loss, sides)
            best[who] = min(best.get(who, float("inf")), time.process_time() - start)
    torch.testing.assert_close(values["fusedkd"], values["torch"], rtol=1e-4, atol=1e-7)
    return best


def main(write: Callable[[str], None] = print) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--terms", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, whatever the length")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write("| term | tokens | torch | fusedkd | processor time |")
    write("|---|---|---|---|---|")
    for name in options.terms:
        for length in options.lengths:
            size = max(1, options.tokens // length), options.heads, length
            held = in_child(peaks, name, *size, timeout=600)
            best = seconds(name, *size, options.rounds)
            mib = " | ".join(f"{held[who] >> 20:,} MiB" for who in LOSSES[name])
            ratio = best["fusedkd"] / best["torch"]
            write(f"| `{name}` | {size[0]} x {length:,} | {mib} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
