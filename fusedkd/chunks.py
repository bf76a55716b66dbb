"""The work of a call, in chunks of rows: logits, the backend's rows, gradients."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fusedkd import backends, debug, fp16
from fusedkd.counted import chosen, counted, sides_of
from fusedkd.cut import Cut, chunk_budget
from fusedkd.distributions.sparse import SparseRows, canonical
from fusedkd.gradients import Gradients, LogitsGradient
from fusedkd.inputs import Chunk, Inputs, Plan, Side
from fusedkd.kernels import RowCall
from fusedkd.spec import LossSpec
from fusedkd.strides import check_in_place, row_shapes


def run(inputs: Inputs, spec: LossSpec, plan: Plan) -> list[Tensor]:
    """The loss, of each token (N,) for reduction "none" and else their sum; then the sums of the
    metrics (7,) and the gradients of student (unless in place), its weight and its bias: those that
    are wanted.

    Rows that do not count are never multiplied where there is a head.
    """
    if plan.autocast is None:
        return _run(inputs, spec, plan)
    with torch.autocast(inputs.row_scale.device.type, enabled=False):  # casts are made explicitly
        return _run(inputs, spec, plan)


def _run(inputs: Inputs, spec: LossSpec, plan: Plan) -> list[Tensor]:
    row_scale, wanted = inputs.row_scale, plan.wanted
    backend = backends.resolve(plan.backend, row_scale.device)
    inplace = in_place(inputs, plan)
    if inplace:
        others = zip(Inputs._fields[1:-1], inputs[1:-1], strict=True)
        named = {name.replace("_", "'s ", 1): x for name, x in others}
        check_in_place(inputs.student, {**named, "token_weights": row_scale})
    if not spec.kd_scale and not wanted.metrics:  # all that a teacher would have a say in
        inputs = inputs._replace(teacher=None, teacher_weight=None, teacher_indices=None)
    index = counted(inputs, plan)
    student, teacher = _sides(inputs, plan.autocast, inplace, index)
    scale, labels, entries = _per_token(inputs, spec, plan.tail, index)
    some = scale.numel() < row_scale.numel()
    masked = student.weight is not None and not chosen(row_scale)
    grads: Gradients | LogitsGradient
    if student.weight is None:
        grads = LogitsGradient(inputs.student, student, backend, wanted.hidden, inplace, some)
    else:
        grads = Gradients(inputs, student, backend, wanted, some)
    losses, metric_sums = [], []
    cut, blocks = cut_rows(student, teacher, grads, plan, index, wanted.any_gradient)
    if debug.ENABLED:
        debug.show(inputs, spec, plan, backend, cut, blocks)
    for part, s, grad in grads.chunks(cut, blocks, scale if masked else None, plan.late):
        rows = backend.rows(
            RowCall(
                student=s,
                teacher=_teacher_rows(teacher, entries, backend, part),
                labels=None if labels is None else part.of_flat(labels),
                row_scale=part.of_flat(scale),
                spec=spec,
                grad=grad,
                metrics=wanted.metrics,
            )
        )
        losses.append(rows.loss)
        if rows.metrics is not None:
            metric_sums.append(rows.metrics.sum(0))
        del s, grad, rows  # before the next chunk is made: else two are held at a time
    if inplace and some:
        student.rows.masked_fill_((row_scale == 0).view(*student.rows.shape[:2], 1), 0.0)
    loss = losses[0] if len(losses) == 1 else torch.cat(losses)
    if spec.reduction != "none":
        loss = loss.sum(dtype=torch.float64).to(loss.dtype)
    elif index is not None:
        loss = torch.zeros_like(row_scale).index_copy_(0, index, loss)
    result = [loss, torch.stack(metric_sums).sum(0)] if wanted.metrics else [loss]
    return result + grads.results()


def _teacher_rows(
    teacher: Side | None, entries: SparseRows | None, backend: ModuleType, part: Chunk
) -> Tensor | SparseRows | None:
    """A chunk's, as a RowCall takes them."""
    if entries is not None:
        return entries.part(part.flat)
    return None if teacher is None else teacher.logits(backend, teacher.states(part))


def _per_token(
    inputs: Inputs, spec: LossSpec, tail: str | None, index: Tensor | None
) -> tuple[Tensor, Tensor | None, SparseRows | None]:
    """Of the tokens that are computed: scale, labels, a sparse teacher's entries."""
    row_scale = inputs.row_scale
    scale = row_scale if index is None else row_scale[index]
    labels = inputs.labels
    if labels is not None:
        labels = labels.contiguous() if index is None else labels[index]
        _check_labels(labels, scale, spec)
    if tail is None or inputs.teacher_indices is None or inputs.teacher is None:
        return scale, labels, None
    ids, log_probs = (
        x.reshape(row_scale.numel(), x.shape[-1]) for x in (inputs.teacher_indices, inputs.teacher)
    )
    if index is not None:
        ids, log_probs = ids[index], log_probs[index]
    return scale, labels, canonical(ids, log_probs, scale, spec, tail)


def _check_labels(labels: Tensor, row_scale: Tensor, spec: LossSpec) -> None:
    wrong = (labels != labels.clamp(0, spec.vocab_size - 1)).logical_and_(row_scale)
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"labels: expected 0 to {spec.vocab_size - 1}")
    elif wrong.any():
        raise ValueError(
            f"labels holds {int(labels[wrong][0])}: expected 0 to {spec.vocab_size - 1} (the "
            f"vocabulary), or ignore_index={spec.ignore_index} for tokens that do not count."
        )


def in_place(inputs: Inputs, plan: Plan) -> bool:
    """Whether the gradient is written over the student's logits."""
    return plan.inplace and inputs.student_weight is None and plan.wanted.hidden


def _sides(
    inputs: Inputs, autocast: torch.dtype | None, inplace: bool, index: Tensor | None
) -> tuple[Side, Side | None]:
    """Both sides with their rows as (B, T, columns), one B and T where chunks have no index; they
    are copied only where no view has that form (a transposed vocabulary, leading dimensions that
    cannot be merged)."""
    shape = None if index is not None else _common_rows(inputs)
    if inplace:
        shape = shape or row_shapes(inputs.student)[0]
    student = side_of(inputs.student, *inputs[1:3], inputs.student_ids, shape, autocast)
    if inputs.teacher is None or inputs.teacher_indices is not None:
        return student, None
    teacher = side_of(inputs.teacher, *inputs[4:6], inputs.teacher_ids, shape, autocast)
    return student, teacher


def _common_rows(inputs: Inputs) -> tuple[int, int]:
    """(B, T) such that both sides' dense logits can be viewed as (B, T, V); 1 and N if there is no
    such view, or no dense logits."""
    dense = [x for x, weight in sides_of(inputs) if weight is None]
    leading = inputs.student.shape[:-1]
    if all(x.is_contiguous() for x in dense):
        return 1, leading.numel()
    shapes = [row_shapes(x) for x in dense]
    everything = [(1, leading.numel()), (leading[:-1].numel(), leading[-1] if leading else 1)]
    common = (shape for shape in everything if all(shape in s for s in shapes))
    return next(common, everything[0])


def side_of(
    tensor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor | None,
    shape: tuple[int, int] | None,
    autocast: torch.dtype | None,
) -> Side:
    """With its rows as (B, T, columns): of the shape that is given, or of any."""
    tensor = tensor.detach()
    if shape is None:
        shape = next(iter(row_shapes(tensor)), (1, tensor.shape[:-1].numel()))
    rows = tensor.reshape(*shape, tensor.shape[-1])
    if weight is None:
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        return Side(rows, None, None, rows.dtype)
    dtype = autocast if autocast and rows.dtype != torch.float64 else rows.dtype
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if ids is None:
        return Side(rows, weight.to(dtype), bias, dtype)
    bias = None if bias is None else bias[ids]
    return Side(rows, weight, bias, dtype, ids)  # the weight is converted piece by piece


def cut_rows(
    student: Side,
    teacher: Side | None,
    grads: Gradients | LogitsGradient,
    plan: Plan,
    index: Tensor | None,
    any_gradient: bool,
) -> tuple[Cut, list[Chunk]]:
    """How the tokens that are computed are cut, where gradients are made or where none are."""
    batch, length = student.rows.shape[:2] if index is None else (1, index.numel())
    sides = [student] if teacher is None else [student, teacher]
    device, columns = student.rows.device, plan.chunk_columns or student.columns
    logits, gradient = grads.bytes_per_entry(any_gradient)
    if any(side.weight is not None for side in sides):
        logits += 0 if teacher is None else teacher.bytes_per_entry(grads.backend)
        budget = chunk_budget(plan.chunk_bytes, device)
    elif grads.powers is not None:
        budget = fp16.SCRATCH_BYTES.get(device.type, fp16.SCRATCH_BYTES["cpu"])
    else:
        logits, budget = 0, 0
    cut = Cut.of(length, budget, logits * columns, gradient * columns)
    return cut, list(cut.blocks(batch, length, index))
