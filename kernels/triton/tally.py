"""A call in two or three launches: plain logits, from labels to the sum of the rows' losses.

What a small call costs is its steps. In torch, weights, their sum, the labels' range and the sum of
the losses are 13 operations; here they are two launches of one kernel of one program, which has
nothing to wait for but as many lines as labels fill.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedkd.kernels import RowCall
from fusedkd.spec import LossSpec

from . import device, ops
from .launcher import Launcher

MOST = 1 << 16  # labels: 64 rounds of the program, which is alone
BLOCK, WARPS = 1024, 4


def reduced(
    spec: LossSpec,
) -> Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None] | None] | None:
    """See :mod:`fusedkd.kernels`."""
    if spec.divergence.key is None:  # by hand: the general way says what it lacks
        return None
    columns_of = functools.lru_cache(maxsize=8)(lambda columns: spec._replace(vocab_size=columns))
    mean = spec.reduction == "mean"

    def compute(
        student: Tensor, teacher: Tensor, labels: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        columns = student.shape[-1]
        n = student.numel() // columns
        if n > MOST:
            return None
        wide = student.dtype is torch.float64 or teacher.dtype is torch.float64
        # whether all labels are right, and the loss
        answers = student.new_empty(2, dtype=torch.float64 if wide else torch.float32)
        right, loss = answers.unbind()
        tally = {"labels": labels, "rows": n, "vocab": columns, "mean": int(mean)}
        tally["ignore_index"] = spec.ignore_index
        launch = launcher()
        with device.guard(student):
            if labels is None:
                row_scale = answers.new_full((n,), 1.0 / n if mean else 1.0)
            else:
                row_scale = answers.new_empty(n)
                launch((1, 1), {**tally, "values": row_scale, "answer": right, "after": 0})
                if not device.holds(right, f"labels: expected 0 to {columns - 1}"):
                    return None
            grad = torch.empty_like(student) if gradient else None
            call = RowCall(
                student=student.view(1, n, columns),
                teacher=teacher.view(1, n, columns),
                labels=labels,
                row_scale=row_scale,
                spec=columns_of(columns),
                grad=None if grad is None else grad.view(1, n, columns),
                metrics=False,
            )
            results = ops.rows(call)
            launch((1, 1), {**tally, "values": results.loss, "answer": loss, "after": 1})
        return loss, grad

    return compute


@functools.cache
def launcher() -> Launcher:
    """Of ``tally_kernel``."""
    return Launcher(tally_kernel, {"BLOCK": BLOCK}, {"num_warps": WARPS})


@triton.jit
def _sum(values, rows, BLOCK: tl.constexpr):
    total = tl.full([BLOCK], 0, tl.float64)
    for start in range(0, rows, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total += tl.load(values + n, mask=n < rows, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _weigh(labels, values, rows, vocab, ignore_index, mean, BLOCK: tl.constexpr):
    """Write the weights; whether all labels are right."""
    counted, wrong = tl.full([BLOCK], 0, tl.int32), tl.full([BLOCK], 0, tl.int32)
    for start in range(0, rows, BLOCK):
        n = start + tl.arange(0, BLOCK)
        label = tl.load(labels + n, mask=n < rows, other=ignore_index)
        counts = label != ignore_index
        counted += counts.to(tl.int32)
        wrong += (counts & ((label < 0) | (label >= vocab))).to(tl.int32)
    number = tl.maximum(tl.sum(counted, axis=0), 1)
    each = tl.where(mean == 1, 1.0 / number.to(tl.float64), 1.0)
    for start in range(0, rows, BLOCK):
        n = start + tl.arange(0, BLOCK)
        label = tl.load(labels + n, mask=n < rows, other=ignore_index)
        weight = tl.where(label != ignore_index, each, 0.0)
        tl.store(values + n, weight.to(values.dtype.element_ty), mask=n < rows)
    return tl.sum(wrong, axis=0) == 0


@triton.jit(
    do_not_specialize=("rows", "vocab", "ignore_index", "mean", "after"),
    do_not_specialize_on_alignment=("labels", "values", "answer"),
)
def tally_kernel(
    labels,  # (rows,) int64 or None
    values, answer,  # (rows,) and a number, of the accumulation type
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64,
    mean: tl.int32, after: tl.int32,  # yes or no
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Before the rows: values = each one's weight, answer = whether all labels are right. After
    them: answer = the sum of the values, in fp64. One program."""
    if after == 1:
        tl.store(answer, _sum(values, rows, BLOCK).to(answer.dtype.element_ty))
    elif labels is not None:
        right = _weigh(labels, values, rows, vocab, ignore_index, mean, BLOCK)
        tl.store(answer, right.to(answer.dtype.element_ty))
