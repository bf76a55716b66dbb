"""The work of a call, in chunks of rows: logits, the backend's rows, gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd import backends
from fusedkd.sparse import canonical
from fusedkd.spec import LossSpec

__all__ = [
    "CHUNK_BYTES",
    "Inputs",
    "Wanted",
    "as_rows",
    "chunk_budget",
    "in_place",
    "run",
    "stored_dtype",
]

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


class Wanted(NamedTuple):
    """Which results the caller needs; the rest is not computed."""

    hidden: bool  # or the dense logits' gradient
    weight: bool
    bias: bool
    metrics: bool

    @property
    def any_gradient(self) -> bool:
        return self.hidden or self.weight or self.bias


class Inputs(NamedTuple):
    """The tensors of one call: (..., V) logits where the weight is None, else (..., H) hidden. A
    teacher with indices is (..., K) log-probabilities."""

    student: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_indices: Tensor | None
    labels: Tensor | None


class _Chunk(NamedTuple):
    """Some of the tokens: what one round of the loop computes."""

    b: int
    rows: slice  # within b
    flat: slice  # the same rows of N
    whole: bool  # all there are: what slicing would cost, a small call feels
    last: bool

    def of(self, x: Tensor) -> Tensor:
        """Its rows of (B, T, ...), as (1, T', ...)."""
        return x if self.whole else x[self.b : self.b + 1, self.rows]

    def of_flat(self, x: Tensor) -> Tensor:
        """Its rows of (N, ...)."""
        return x if self.whole else x[self.flat]


class _Side(NamedTuple):
    """One side as the chunk loop reads it."""

    rows: Tensor  # (B, T, V) logits or (1, N, H) hidden states
    weight: Tensor | None
    bias: Tensor | None

    def logits(self, backend: ModuleType, part: _Chunk) -> Tensor:
        chunk = part.of(self.rows)
        if self.weight is None:
            return chunk
        dtype = backend.head_dtypes(chunk.dtype)[0]
        out = backend.empty(
            (1, chunk.shape[1], self.weight.shape[0]), dtype=dtype, device=chunk.device
        )
        backend.mm_(out[0], chunk[0], self.weight.T)
        return out if self.bias is None else out.add_(self.bias)

    def bytes_per_row(self, backend: ModuleType) -> int:
        """What one token's logits take when they are made here."""
        if self.weight is None:
            return 0
        return self.weight.shape[0] * backend.head_dtypes(self.rows.dtype)[0].itemsize


def run(inputs: Inputs, row_scale: Tensor, spec: LossSpec, wanted: Wanted) -> list[Tensor]:
    """Loss rows (N,), then metric rows (N, 7) and the gradients of student (unless in place), its
    weight and its bias: those that are wanted."""
    backend = backends.resolve(spec.backend, row_scale.device)
    labels = inputs.labels
    if labels is not None:
        labels = labels.contiguous()
        _check_labels(labels, row_scale, spec)
    student, teacher = _sides(inputs, spec, wanted)
    entries = None
    if inputs.teacher_indices is not None:
        entries = canonical(inputs.teacher_indices, inputs.teacher, row_scale, spec)
    grads = _Gradients(inputs, student, backend, spec, wanted)
    losses, metric_rows = [], []
    held = grads.bytes_per_row + teacher.bytes_per_row(backend)
    for part in _chunks(student, held, spec):
        s = student.logits(backend, part)
        grad = grads.buffer(s, part)
        label_rows = None if labels is None else part.of_flat(labels)
        rest = (label_rows, part.of_flat(row_scale), spec, grad, wanted.metrics)
        if entries is None:
            loss, found = backend.rows(s, teacher.logits(backend, part), *rest)
        else:
            loss, found = backend.sparse_rows(s, entries.part(part.flat), *rest)
        losses.append(loss)
        metric_rows.append(found)
        grads.add(grad, part)
        del s, grad, rest  # before the next chunk is made: else two are held at a time
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


def _sides(inputs: Inputs, spec: LossSpec, wanted: Wanted) -> tuple[_Side, _Side]:
    """Both sides with their rows as (B, T, columns); dense logits are copied only where no view
    has that form (a transposed vocabulary, leading dimensions that cannot be merged)."""
    shape = _common_rows(inputs)
    if in_place(inputs, spec, wanted):
        own = _row_shapes(inputs.student)
        if not own or 0 in inputs.student.stride():
            raise ValueError(
                f"inplace=True, but the student's logits (shape {tuple(inputs.student.shape)}, "
                f"strides {inputs.student.stride()}) do not own one contiguous row per token: "
                "call .contiguous() on them first, or leave inplace=False."
            )
        shape = shape or own[0]
    if shape is None:
        shape = (1, inputs.student.shape[:-1].numel())
    return _side(*inputs[0:3], shape, spec.autocast), _side(*inputs[3:6], shape, spec.autocast)


def _common_rows(inputs: Inputs) -> tuple[int, int] | None:
    """(B, T) such that both sides' dense logits can be viewed as (B, T, V), or None."""
    sides = (inputs[0:2],) if inputs.teacher_indices is not None else (inputs[0:2], inputs[3:5])
    dense = [x for x, w in sides if w is None]
    shapes = [_row_shapes(x) for x in dense]
    leading = inputs.student.shape[:-1]
    everything = [(1, leading.numel()), (leading[:-1].numel(), leading[-1] if leading else 1)]
    return next((shape for shape in everything if all(shape in s for s in shapes)), None)


def _row_shapes(x: Tensor) -> list[tuple[int, int]]:
    """The (B, T) with which x can be viewed as rows."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return []
    leading, strides = x.shape[:-1], x.stride()[:-1]
    contiguous = x.is_contiguous()  # nearly always, and the checks take a while
    shapes = []
    if contiguous or _merge(leading, strides):
        shapes.append((1, leading.numel()))
    if contiguous or _merge(leading[:-1], strides[:-1]):
        shapes.append((leading[:-1].numel(), leading[-1] if leading else 1))
    return shapes


def _merge(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether dimensions can be stepped over as one: each stride is the next one's extent."""
    steps = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(
        stride == inner * extent for (_, stride), (extent, inner) in itertools.pairwise(steps)
    )


def as_rows(x: Tensor) -> Tensor:
    return x.view(*_row_shapes(x)[0], x.shape[-1])


def _side(
    tensor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    autocast: torch.dtype | None,
) -> _Side:
    rows = tensor.detach().reshape(*shape, tensor.shape[-1])
    if weight is None:
        return _Side(rows if rows.stride(-1) == 1 else rows.contiguous(), None, None)
    dtype = autocast if autocast and rows.dtype != torch.float64 else rows.dtype
    return _Side(rows.to(dtype), weight.detach().to(dtype), None if bias is None else bias.detach())


def _chunks(student: _Side, bytes_per_row: int, spec: LossSpec) -> Iterator[_Chunk]:
    """All tokens, in chunks of which none holds more than its budget."""
    batch, length = student.rows.shape[:2]
    step = max(length, 1)
    if bytes_per_row:
        most = max(1, chunk_budget(spec.chunk_bytes, student.rows.device.type) // bytes_per_row)
        step = _even(step, most)
    for b in range(batch):
        for start in range(0, max(length, 1), step):  # no tokens: one empty chunk
            stop = min(start + step, length)
            flat = slice(b * length + start, b * length + stop)
            whole, last = stop - start == batch * length, flat.stop == batch * length
            yield _Chunk(b, slice(start, stop), flat, whole, last)


def _even(length: int, most: int) -> int:
    """Rows of each chunk: as few chunks as ``most`` allows, for each one passes over the weights
    and their gradient, and of one size; in whole tiles of the matrix products where that fits.
    """
    step = -(-length // -(-length // most))
    tiled = (-(-step // tile) * tile for tile in (64, 16))
    return next((rows for rows in tiled if rows <= most), step)


class _Gradients:
    """The gradients that are wanted, as the chunks fill them."""

    def __init__(
        self, inputs: Inputs, side: _Side, backend: ModuleType, spec: LossSpec, wanted: Wanted
    ) -> None:
        self.inputs, self.side, self.backend, self.wanted = inputs, side, backend, wanted
        self.inplace = in_place(inputs, spec, wanted)
        rows, weight = side.rows, side.weight
        self.bytes_per_row = side.bytes_per_row(backend)
        self.d_rows: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        if weight is None:
            if wanted.hidden:
                self.d_rows = rows if self.inplace else self._empty(rows.shape, rows.dtype)
            return
        self.dtypes = backend.head_dtypes(rows.dtype)
        if wanted.any_gradient and self.dtypes[0] != self.dtypes[1]:
            self.bytes_per_row += weight.shape[0] * self.dtypes[1].itemsize
        self.accumulate = torch.promote_types(self.dtypes[0], torch.float32)
        if wanted.hidden:
            self.d_rows = self._empty(rows.shape, inputs.student.dtype)
        if wanted.bias:
            self.d_bias = weight.new_zeros(weight.shape[0], dtype=self.accumulate)

    def buffer(self, logits: Tensor, part: _Chunk) -> Tensor | None:
        """Where the row kernel writes the gradient of these logits; None: no gradient wanted."""
        if not self.wanted.any_gradient:
            return None
        if self.side.weight is None:
            return part.of(self.d_rows) if self.d_rows is not None else None
        if self.dtypes[0] == self.dtypes[1]:
            return logits
        return self._empty(logits.shape, self.dtypes[1])

    def add(self, grad: Tensor | None, part: _Chunk) -> None:
        """The head's share of the gradient of one chunk of its logits."""
        if grad is None or self.side.weight is None:
            return
        mm_ = self.backend.mm_
        if self.d_rows is not None:
            mm_(part.of(self.d_rows)[0], grad[0], self.side.weight)
        if (own := self.inputs.student_weight) is not None and self.wanted.weight:
            # added up over chunks at full precision; the last one rounds what it adds to
            dtype = stored_dtype(own, False) if part.last else self.accumulate
            so_far = self.d_weight
            if so_far is None or so_far.dtype != dtype:
                self.d_weight = self._empty(own.shape, dtype)
            mm_(self.d_weight, grad[0].T, part.of(self.side.rows)[0], add=so_far)
        if self.d_bias is not None:
            self.d_bias += grad[0].sum(0, dtype=self.d_bias.dtype)

    def results(self) -> list[Tensor]:
        """What was wanted, in the inputs' shapes and dtypes."""
        if self.inplace:
            torch.autograd.graph.increment_version(self.inputs.student)
            return []
        made = zip(self.inputs[:3], (self.d_rows, self.d_weight, self.d_bias), strict=True)
        return [
            self._converted(grad.view(x.shape), stored_dtype(x, grad is self.d_rows))
            for x, grad in made
            if grad is not None and x is not None
        ]

    def _converted(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad if grad.dtype == dtype else self._empty(grad.shape, dtype).copy_(grad)

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        made: Tensor = self.backend.empty(shape, dtype=dtype, device=self.side.rows.device)
        return made


def stored_dtype(x: Tensor, rows: bool) -> torch.dtype:
    """In which the gradient of an input waits for the backward."""
    return torch.float32 if x.dtype == torch.float16 and not rows else x.dtype
