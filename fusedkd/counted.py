"""Which tokens are computed: those that count, where a head would multiply all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd.inputs import Inputs, Plan
from fusedkd.strides import row_shapes


def sides_of(inputs: Inputs) -> list[tuple[Tensor, Tensor | None]]:
    """Logits or hidden states, and the head's weight, of each side that is no sparse teacher."""
    sides = [(inputs.student, inputs.student_weight)]
    if inputs.teacher is not None and inputs.teacher_indices is None:
        sides.append((inputs.teacher, inputs.teacher_weight))
    return sides


def counted(inputs: Inputs, plan: Plan) -> Tensor | None:
    """(n,) which of the N tokens are computed, ascending; None: all of them, as they lie.

    Dense logits need no choice: their kernels read no row that does not count. A GPU is asked how
    many there are, once, unless ``plan.num_counted`` says so; not while a graph is captured, which
    is for any number of them.
    """
    heads = [x for x, weight in sides_of(inputs) if weight is not None]
    if not heads:
        return None
    row_scale, number = inputs.row_scale, plan.num_counted
    total = row_scale.numel()
    index = None
    if chosen(row_scale):
        if number is None:
            index = row_scale.nonzero().squeeze(1)
        else:
            _check_number(row_scale, number)
            if number != total:
                index = torch.nonzero_static(row_scale, size=number).squeeze(1)
        if index is not None and index.numel() == total:
            index = None
    if index is None and not all((1, total) in row_shapes(x) for x in heads):
        # of no common stride: gathered chunk by chunk, for reshaping would copy all of them
        return torch.arange(total, device=row_scale.device)
    return index


def chosen(row_scale: Tensor) -> bool:
    """Whether tokens can be chosen at all: a graph that is captured is for any number of them."""
    return not (row_scale.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_number(row_scale: Tensor, number: int) -> None:
    actual = row_scale.count_nonzero()
    if row_scale.device.type != "cpu":
        torch._assert_async(actual == number, "num_counted: another number of tokens counts")
    elif actual != number:
        raise ValueError(
            f"num_counted={number}, but {int(actual)} tokens count: expected the number of "
            "those whose label is not ignore_index and whose weight is not 0, or None."
        )
