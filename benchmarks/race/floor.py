"""The least that it could take: the bytes of logits moved, the bare products of heads; of a small
call, an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .case import DTYPES, Case, Problem, native_dtype
from .provider import EMPTY, FLOOR, Forward, Provider


def _floor(case: Case, problem: Problem) -> Forward:
    return _products(case, problem) if case.form == "head" else _bytes_moved(problem, case)


def _bytes_moved(problem: Problem, case: Case) -> Forward:
    """Two tensors read and one written (evaluation: none written), with nothing computed. Of rows
    that do not count, only the gradient is written.

    One integer addition per 8 bytes runs at memory speed: 13.3 ms for 3 x 156 MB on 2 cores of an
    EPYC 9004, where copies that move the same bytes take 14.1 ms (2026-11-24).
    """
    m = case.n_counted
    s, t = _as_words(problem.student.detach()[:m]), _as_words(problem.teacher[:m])
    if case.mode == "eval":

        def read() -> None:
            s.amax()
            t.amax()

        return read
    out, uncounted = torch.empty_like(s), torch.empty_like(problem.student[m:])

    def move() -> None:
        torch.add(s, t, out=out)
        uncounted.zero_()

    return move


def _as_words(x: Tensor) -> Tensor:
    """The same bytes as integers, of the widest type that divides them."""
    flat = x.reshape(-1)
    size = flat.numel() * flat.element_size()
    wide = next(d for d in (torch.int64, torch.int32, torch.int16) if size % d.itemsize == 0)
    return flat.view(wide)


def _products(case: Case, problem: Problem) -> Forward:
    """The bare matrix products of the rows that count, into memory that is there already: two, and
    for training two more (three in all with a frozen head). On a CPU that does not multiply half
    precision, of operands that are fp32 already."""
    assert problem.student_weight is not None and problem.teacher_weight is not None
    dtype = DTYPES[case.dtype if native_dtype(case.device) == "bf16" else "fp32"]
    m = case.n_counted
    sides = problem.student[:m], problem.teacher[:m], problem.student_weight, problem.teacher_weight
    hs, ht, ws, wt = (x.detach().to(dtype) for x in sides)
    s, t = (torch.empty(m, case.vocab, dtype=hs.dtype, device=hs.device) for _ in range(2))
    dh, dw = torch.empty_like(hs), torch.empty_like(ws)

    def multiply() -> None:
        torch.mm(hs, ws.T, out=s)
        torch.mm(ht, wt.T, out=t)
        if case.mode == "train":
            torch.mm(s, ws, out=dh)
            if not case.frozen:
                torch.mm(s.T, hs, out=dw)

    return multiply


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x  # type: ignore[no-any-return]


def _empty(case: Case, problem: Problem) -> Forward:
    return lambda: _Empty.apply(problem.student)


def _empty_missing(case: Case) -> str | None:
    alone = case.form == "dense" and case.mode == "train"
    return None if alone else "is measured with logits and their gradient"


LEAST = [
    Provider(FLOOR, "the bytes or matrix products alone", lambda case: None, _floor, bare=True),
    Provider(EMPTY, "an autograd function alone", _empty_missing, _empty, bare=True),
]
