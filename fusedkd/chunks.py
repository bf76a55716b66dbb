"""The work of a call, in chunks of rows: logits, the backend's rows, gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedkd import backends, fp16
from fusedkd.gradients import Gradients
from fusedkd.inputs import Chunk, Inputs, Side, Wanted
from fusedkd.sparse import canonical
from fusedkd.spec import LossSpec
from fusedkd.strides import check_in_place, row_shapes

__all__ = ["CHUNK_BYTES", "chunk_budget", "in_place", "run"]

# Bytes of logits (and their gradient) that a head may hold at a time. On a GPU large chunks keep
# the products efficient; 1 GiB is small beside any model whose vocabulary needs chunks. It is 704
# rows at V = 151,936 (10 bytes an entry: two fp32 logits, a bf16 gradient); a floor of 1,024 would
# hold 1.45 GiB, and no GPU was at hand to say whether that is faster. On a CPU every chunk costs a
# pass over the weights and dW: with 256 MiB, 512 MiB and 1 GiB, 512 tokens x 151,936 in bf16 took
# 1.39, 1.23 and 1.07 times the bare products, 4,096 took 1.23, 1.08 and 1.09 (2 cores with AMX,
# Granite Rapids, 2026-11-26).
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 512 << 20}


def chunk_budget(chunk_bytes: int | None, device_type: str) -> int:
    """``chunk_bytes`` as given, or the default of the device."""
    return chunk_bytes or CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"])


def run(inputs: Inputs, row_scale: Tensor, spec: LossSpec, wanted: Wanted) -> list[Tensor]:
    """Loss rows (N,), then metric rows (N, 7) and the gradients of student (unless in place), its
    weight and its bias: those that are wanted."""
    backend = backends.resolve(spec.backend, row_scale.device)
    labels = inputs.labels
    if labels is not None:
        labels = labels.contiguous()
        _check_labels(labels, row_scale, spec)
    if in_place(inputs, spec, wanted):
        others = zip(Inputs._fields[1:], inputs[1:], strict=True)
        named = {name.replace("_", "'s ", 1): x for name, x in others}
        check_in_place(inputs.student, {**named, "token_weights": row_scale})
    student, teacher = _sides(inputs, spec, wanted)
    entries = None
    if inputs.teacher_indices is not None and inputs.teacher is not None:
        entries = canonical(inputs.teacher_indices, inputs.teacher, row_scale, spec)
    grads = Gradients(inputs, student, backend, wanted, in_place(inputs, spec, wanted))
    losses, metric_rows = [], []
    held = [side.bytes_per_row(backend) for side in (student, teacher) if side is not None]
    for part in _chunks(student, sum(held), grads.bytes_per_row, spec):
        s = student.logits(backend, part)
        grad = grads.buffer(s, part)
        label_rows = None if labels is None else part.of_flat(labels)
        rest = (label_rows, part.of_flat(row_scale), spec, grad, wanted.metrics)
        if entries is not None:
            t = None
            loss, found = backend.sparse_rows(s, entries.part(part.flat), *rest)
        else:  # no teacher: what a term of weight 0 reads may be anything
            t = s if teacher is None else teacher.logits(backend, part)
            loss, found = backend.rows(s, t, *rest)
        losses.append(loss)
        metric_rows.append(found)
        grads.add(grad, part)
        del s, t, grad, rest  # before the next chunk is made: else two are held at a time
    result = [losses[0] if len(losses) == 1 else torch.cat(losses)]
    if wanted.metrics:
        result.append(torch.cat(metric_rows))
    return result + grads.results()


def _check_labels(labels: Tensor, row_scale: Tensor, spec: LossSpec) -> None:
    wrong = (labels != labels.clamp(0, spec.vocab_size - 1)).logical_and_(row_scale)
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"labels: expected 0 to {spec.vocab_size - 1}")
    elif wrong.any():
        raise ValueError(
            f"labels holds {int(labels[wrong][0])}: expected 0 to {spec.vocab_size - 1} (the "
            f"vocabulary), or ignore_index={spec.ignore_index} for tokens that do not count."
        )


def in_place(inputs: Inputs, spec: LossSpec, wanted: Wanted) -> bool:
    dense = inputs.student_weight is None
    return spec.inplace and dense and wanted.hidden


def _sides(inputs: Inputs, spec: LossSpec, wanted: Wanted) -> tuple[Side, Side | None]:
    """Both sides with their rows as (B, T, columns); dense logits are copied only where no view
    has that form (a transposed vocabulary, leading dimensions that cannot be merged)."""
    shape = _common_rows(inputs)
    if in_place(inputs, spec, wanted):
        shape = shape or row_shapes(inputs.student)[0]
    if shape is None:
        shape = (1, inputs.student.shape[:-1].numel())
    student = _side(inputs.student, *inputs[1:3], shape, spec.autocast)
    if inputs.teacher is None:
        return student, None
    return student, _side(inputs.teacher, *inputs[4:6], shape, spec.autocast)


def _common_rows(inputs: Inputs) -> tuple[int, int] | None:
    """(B, T) such that both sides' dense logits can be viewed as (B, T, V), or None."""
    dense = [inputs.student] if inputs.student_weight is None else []
    if inputs.teacher is not None and inputs.teacher_weight is inputs.teacher_indices is None:
        dense.append(inputs.teacher)
    shapes = [row_shapes(x) for x in dense]
    leading = inputs.student.shape[:-1]
    everything = [(1, leading.numel()), (leading[:-1].numel(), leading[-1] if leading else 1)]
    return next((shape for shape in everything if all(shape in s for s in shapes)), None)


def _side(
    tensor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    autocast: torch.dtype | None,
) -> Side:
    rows = tensor.detach().reshape(*shape, tensor.shape[-1])
    if weight is None:
        return Side(rows if rows.stride(-1) == 1 else rows.contiguous(), None, None)
    dtype = autocast if autocast and rows.dtype != torch.float64 else rows.dtype
    return Side(rows.to(dtype), weight.detach().to(dtype), None if bias is None else bias.detach())


def _chunks(student: Side, logits: int, gradient: int, spec: LossSpec) -> Iterator[Chunk]:
    """All tokens, in chunks of which none holds more than its budget.

    Args:
        logits, gradient: bytes that are held for one token.
    """
    batch, length = student.rows.shape[:2]
    step = max(length, 1)
    if logits + gradient:
        budget = chunk_budget(spec.chunk_bytes, student.rows.device.type)
        if not logits:
            budget = fp16.SCRATCH_BYTES.get(student.rows.device.type, fp16.SCRATCH_BYTES["cpu"])
        step = _even(step, max(1, budget // (logits + gradient)))
    for b in range(batch):
        for start in range(0, max(length, 1), step):  # no tokens: one empty chunk
            stop = min(start + step, length)
            flat = slice(b * length + start, b * length + stop)
            yield Chunk(b, slice(start, stop), flat, stop - start == batch * length)


def _even(length: int, most: int) -> int:
    """Rows of each chunk: as few chunks as ``most`` allows, for each one passes over the weights
    and their gradient, and of one size; in whole tiles of the matrix products where that fits.
    """
    step = -(-length // -(-length // most))
    tiled = (-(-step // tile) * tile for tile in (64, 16))
    return next((rows for rows in tiled if rows <= most), step)
