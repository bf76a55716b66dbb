"""A divergence of one's own: how long until it runs, and then against ours and torch.compile; and
what row rules cost beside ours.

``python -m fusedkd.benchmarks.own``. A JSD written as a user would; in turns, the best of several
rounds; its first use in a process of its own and a cache folder of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusedkd import divergences, kd_loss, row_rules

from .child import in_child

BARS = {  # of design: at most, at most, at least; seconds at most
    "over ours": 1.3,
    "torch.compile over it": 6.0,
    "token clip over none": 1.1,
    "entropy gate over none": 1.3,
    "first use": 20.0,
    "first use in a new process": 0.1,
    "another parameter": 0.05,
}


@divergences.custom
def written_jsd(lp: Tensor, lq: Tensor, *, beta: float = 0.5) -> Tensor:
    p, q = lp.exp(), lq.exp()
    m = beta * p + (1 - beta) * q
    lm = torch.log(torch.where(m > 0, m, 1.0))
    kl_p = torch.where(p > 0, p * (lp - lm), 0.0)
    return beta * kl_p + (1 - beta) * torch.where(q > 0, q * (lq - lm), 0.0)


@row_rules.custom
def token_clip(divergence: Tensor, *, most: float = 0.5) -> Tensor:
    return torch.clamp(most / divergence, max=1.0)


@row_rules.custom
def entropy_gate(teacher_entropy: Tensor, *, threshold: float = 2.0) -> Tensor:
    return teacher_entropy < threshold


@divergences.custom
def written_kl(lp: Tensor, lq: Tensor) -> Tensor:
    p = lp.exp()
    return torch.where(p > 0, p * (lp - lq), 0.0)


@divergences.custom
def written_alpha(lp: Tensor, lq: Tensor, *, alpha: float = 0.5) -> Tensor:
    p, q = lp.exp(), lq.exp()
    return (alpha * p + (1 - alpha) * q - p**alpha * q ** (1 - alpha)) / (alpha * (1 - alpha))


@divergences.custom
def written_le_cam(lp: Tensor, lq: Tensor) -> Tensor:
    p, q = lp.exp(), lq.exp()
    return torch.where(p + q > 0, (p - q) ** 2 / (p + q), 0.0)


def first_uses() -> dict[str, float]:
    """Seconds of calls beyond a built-in one's: compiled; again in a new process; with another
    parameter there."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, FUSEDKD_CACHE=folder),
    ):
        first, _ = in_child(_first_use, timeout=300)
        again, other = in_child(_first_use, timeout=300)
    return {"first use": first, "first use in a new process": again, "another parameter": other}


def _first_use() -> list[float]:
    s, t = torch.randn(2, 8, 1000).unbind()
    kd_loss(s, t, divergence="jsd")
    seconds = []
    for beta in (0.5, 0.25):
        start = time.perf_counter()
        kd_loss(s, t, divergence=written_jsd(beta=beta))
        seconds.append(time.perf_counter() - start)
    return seconds


def ratios(rows: int, vocab: int, rounds: int) -> dict[str, float]:
    """Of forward and backward in bf16 with cross-entropy at T = 2: the formula above over ours;
    torch.compile of it over the formula here; ours with a rule over ours without."""
    s, t = ((3 * torch.randn(rows, vocab)).bfloat16() for _ in range(2))
    labels = torch.randint(vocab, (rows,))
    s.requires_grad_()
    compiled = torch.compile(_plain, dynamic=False)
    steps: dict[str, Callable[[], Tensor]] = {
        "own": lambda: _ours(s, t, labels, written_jsd()),
        "ours": lambda: _ours(s, t, labels, "jsd"),
        "token clip": lambda: _ours(s, t, labels, "jsd", token_clip()),
        "entropy gate": lambda: _ours(s, t, labels, "jsd", entropy_gate()),
        "torch.compile": lambda: compiled(s, t, labels),
    }
    best = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            if name == "torch.compile" and number > 3:
                continue  # slow, and not close to its bar
            s.grad = None
            start = time.perf_counter()
            step().backward()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    own = best["own"]
    return {
        "over ours": own / best["ours"],
        "torch.compile over it": best["torch.compile"] / own,
        "token clip over none": best["token clip"] / best["ours"],
        "entropy gate over none": best["entropy gate"] / best["ours"],
    }


def _ours(s: Tensor, t: Tensor, labels: Tensor, divergence: Any, rule: Any = None) -> Tensor:
    how = {"temperature": 2.0, "ce_weight": 0.5, "row_rule": rule}
    return kd_loss(s, t, labels, divergence=divergence, **how)


def _plain(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    lp, lq = ((x.float() / 2.0).log_softmax(-1) for x in (t, s))
    kd = written_jsd.formula(lp, lq).sum(-1).mean()
    return 4.0 * kd + 0.5 * torch.nn.functional.cross_entropy(s.float(), labels)


def main(write: Callable[[str], None] = print) -> None:
    """Print the numbers beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    numbers = first_uses() | ratios(options.rows, options.vocab, options.rounds)
    for name, number in numbers.items():
        most = "at least" if name == "torch.compile over it" else "at most"
        write(f"{name:30s}{number:8.3f} ({most} {BARS[name]:g})")


if __name__ == "__main__":
    main()
