"""Log-probabilities of drawn tokens, losses on them and top k: beside the bare products, TRL and
eager torch, interleaved in one process, best of several.

``python -m benchmarks.tokens [--tokens 512] [--vocab 151936] [--hidden 896] [--dtype bfloat16]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedkd import LMHead, sampled_kd_loss, token_log_probs
from fusedkd.kernels import cpu

Case = Callable[[], Any]


def best(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Seconds of each, the fastest of its rounds."""
    times = dict.fromkeys(cases, float("inf"))
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def products(h: Tensor, w: Tensor, count: int) -> Case:
    """So many bare products of a head, in its own dtypes: logits, dh, dW, logits once more."""
    wide, narrow = cpu.head_dtypes(h.dtype)
    logits = torch.empty(len(h), len(w), dtype=wide)
    grad = torch.randn(len(h), len(w), dtype=torch.float32).to(narrow)
    dh, dw = torch.empty(h.shape, dtype=wide), torch.empty(w.shape, dtype=wide)

    def run() -> None:
        cpu.mm_(logits, h, w.T)
        if count > 1:
            cpu.mm_(dh, grad, w)
        if count > 2:
            cpu.mm_(dw, grad.T, h)
        if count > 3:
            cpu.mm_(logits, h, w.T)

    return run


def backward(log_probs: Tensor, leaves: list[Tensor]) -> None:
    torch.autograd.grad(log_probs.sum(), leaves)


def eager_log_probs(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """As trainers wrote it before they had a kernel: fp32 logits and log_softmax."""
    return (h @ w.T).float().log_softmax(-1).gather(-1, y[:, None])[:, 0]


def trl_log_probs(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    found: Tensor = ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 8192, None, 1.0, ())[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    h = torch.randn(options.tokens, options.hidden).to(dtype)
    w = (torch.randn(options.vocab, options.hidden) / options.hidden**0.5).to(dtype)
    y = torch.randint(options.vocab, (options.tokens,))
    accuracy(h, w, y)
    head_cases(h, w, y, options.rounds)


def accuracy(h: Tensor, w: Tensor, y: Tensor) -> None:
    """Largest error in nats, of fp64 on the same numbers."""
    with torch.no_grad():
        truth = torch.cat(
            [
                (a.double() @ w.double().T).log_softmax(-1).gather(-1, b[:, None])[:, 0]
                for a, b in zip(h[:64].split(16), y[:64].split(16), strict=True)
            ]
        )
        found = {
            "fusedkd": token_log_probs(LMHead(h, w), y).log_probs,
            "TRL": trl_log_probs(h, w, y),
            "eager": eager_log_probs(h[:64], w, y[:64]),
        }
    for name, x in found.items():
        print(f"{name:10s} largest error {(x[:64].double() - truth).abs().max():.2e} nats")


def head_cases(h: Tensor, w: Tensor, y: Tensor, rounds: int) -> None:
    trained, hidden = w.clone().requires_grad_(), h.clone().requires_grad_()
    t = torch.full((len(h),), -12.0)
    both = [hidden, trained]
    cases: dict[str, Case] = {
        "4 products": products(h, w, 4),
        "token_log_probs, trained": lambda: backward(
            token_log_probs(LMHead(hidden, trained), y).log_probs, both
        ),
        "TRL, trained": lambda: backward(trl_log_probs(hidden, trained, y), both),
        "eager, trained": lambda: backward(eager_log_probs(hidden, trained, y), both),
        "3 products": products(h, w, 3),
        "sampled_kd_loss, trained": lambda: backward(
            sampled_kd_loss(LMHead(hidden, trained), t, y), both
        ),
        "2 products": products(h, w, 2),
        "token_log_probs, frozen": lambda: backward(
            token_log_probs(LMHead(hidden, w), y).log_probs, [hidden]
        ),
        "1 product": products(h, w, 1),
        "token_log_probs, no_grad": lambda: token_log_probs(LMHead(h, w), y),
    }
    times = best(cases, rounds)
    bare = 0.0
    for name, seconds in times.items():
        bare = seconds if "product" in name else bare
        print(f"{name:28s} {seconds * 1e3:9.1f} ms  {seconds / bare:6.2f} x products")


if __name__ == "__main__":
    main()
