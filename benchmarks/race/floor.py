"""The least that the machine could take: the bytes of logits moved, the bare products of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import DTYPES, Case, Problem, native_dtype
from .provider import FLOOR, Forward, Provider


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


LEAST = Provider(FLOOR, "the bytes or matrix products alone", lambda case: None, _floor)
