"""The autograd function and the loop over row chunks.

The gradient is made in the forward, while logits are at hand, so a head costs four matrix products
(two forward, two for the gradients) and never keeps a logit. The backward only multiplies by the
upstream gradient. Two cases differ:

* ``reduction="none"`` with a student head: the upstream gradient is per token, and enters the
  weight gradient's sum over tokens, so the chunks are computed again in the backward (6 products);
* fp16: the stored gradient is that of tokens that weigh 1 at most, and what a head adds up over
  tokens stays in fp32, until the backward multiplies and rounds. 1e-4 * (q - p) is below what fp16
  can hold, where loss scaling comes too late to save it; the sum over 20,000 tokens is above.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import backends
from fusedkd.divergences import make
from fusedkd.sparse import canonical
from fusedkd.spec import METRIC_COLUMNS, LossSpec, Transform

__all__ = ["fused_loss"]

# Bytes of logits (and their gradient) that a head may hold at a time. On a GPU large chunks keep
# the products efficient; 1 GiB is small beside any model whose vocabulary needs chunks. On a CPU
# the chunk leaves the caches either way, and every chunk costs one more pass over dW.
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}


class _Wanted(NamedTuple):
    """Which results the caller needs; the rest is not computed."""

    hidden: bool  # or the dense logits' gradient
    weight: bool
    bias: bool
    metrics: bool

    @property
    def any_gradient(self) -> bool:
        return self.hidden or self.weight or self.bias


class _Inputs(NamedTuple):
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


class _Side(NamedTuple):
    """One side as the chunk loop reads it."""

    rows: Tensor  # (B, T, V) logits or (1, N, H) hidden states
    weight: Tensor | None
    bias: Tensor | None

    def logits(self, backend: ModuleType, b: int, rows: slice) -> Tensor:
        chunk = self.rows[b : b + 1, rows]
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


def fused_loss(
    inputs: tuple[Tensor | None, ...],
    labels: Tensor | None,
    weights: Tensor,
    divisor: Tensor | None,
    spec: LossSpec,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """The reduced loss, with a graph, and the (N, 7) metric rows if wanted.

    Args:
        inputs: student, its head's weight and bias, teacher, its head's weight and bias, the ids
            that a sparse teacher's log-probabilities belong to.
        labels: (N,) or None.
        weights: (N,) in the accumulation type, 0 where the token does not count.
        divisor: 0-d, what the weighted sum is divided by, or None.
    """
    student = inputs[0]
    assert student is not None
    if spec.inplace and _traced():
        spec = dataclasses.replace(spec, inplace=False)
    grad = torch.is_grad_enabled()
    hidden, weight, bias = (grad and t is not None and t.requires_grad for t in inputs[:3])
    wanted = _Wanted(hidden, weight, bias, metrics)
    row_scale, post = weights, None
    if divisor is not None:
        if torch.float16 in (student.dtype, spec.autocast) and weights.numel():
            largest = weights.abs().amax()
            post = torch.where(largest != 0, largest / divisor, 0.0)
            row_scale = torch.where(weights != 0, weights / largest, 0.0)
        else:
            row_scale = torch.where(weights != 0, weights / divisor, 0.0)
    loss, *rest = _FusedLoss.apply(*inputs, labels, row_scale, post, spec, wanted)
    return loss, rest[0] if metrics else None


class _FusedLoss(torch.autograd.Function):
    """Inputs: the fields of _Inputs, row_scale, post, spec, wanted. Outputs: the loss, metric rows
    if wanted, then the gradients made in the forward, which the caller drops."""

    @staticmethod
    def forward(  # dynamo binds the arguments one by one
        student: Tensor,
        student_weight: Tensor | None,
        student_bias: Tensor | None,
        teacher: Tensor,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        teacher_indices: Tensor | None,
        labels: Tensor | None,
        row_scale: Tensor,
        post: Tensor | None,
        spec: LossSpec,
        wanted: _Wanted,
    ) -> tuple[Tensor, ...]:
        inputs = _Inputs(
            student,
            student_weight,
            student_bias,
            teacher,
            teacher_weight,
            teacher_bias,
            teacher_indices,
            labels,
        )
        if _deferred(inputs, spec):
            wanted = _Wanted(False, False, False, wanted.metrics)
        loss, *rest = _dispatch(inputs, row_scale, spec, wanted)
        if spec.reduction != "none":
            loss = loss.sum(dtype=torch.float64).to(row_scale.dtype)
            loss = loss if post is None else loss * post
        return loss, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, row_scale, post, spec, wanted = inputs
        ctx.spec, ctx.wanted = spec, wanted
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.deferred = _deferred(_Inputs(*tensors), spec)
        if not wanted.any_gradient:
            return
        if ctx.deferred:
            ctx.save_for_backward(*tensors, row_scale)
        elif _inplace(_Inputs(*tensors), spec, wanted):
            ctx.save_for_backward(tensors[0], post)  # holds its gradient by now
        else:
            ctx.save_for_backward(*output[1 + wanted.metrics :], post)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        arguments = len(ctx.needs_input_grad)
        if upstream is None:
            return (None,) * arguments
        if ctx.deferred:
            *tensors, row_scale = ctx.saved_tensors
            scale = torch.where(row_scale != 0, row_scale * upstream.to(row_scale.dtype), 0.0)
            wanted = ctx.wanted._replace(metrics=False)
            grads = iter(_dispatch(_Inputs(*tensors), scale, ctx.spec, wanted)[1:])
        else:
            *saved, post = ctx.saved_tensors
            factor = upstream if post is None else upstream * post
            grads = iter([_scaled(grad.detach(), factor, ctx.spec) for grad in saved])
        kept = zip(ctx.dtypes, ctx.wanted[:3], strict=True)
        made = [next(grads).to(dtype) if want else None for dtype, want in kept]
        return *made, *(None,) * (arguments - len(made))


# torch inspects the signature on every call to bind the arguments; this spares it the work.
_FusedLoss.forward.__signature__ = inspect.signature(_FusedLoss.forward)  # type: ignore[attr-defined]


def _deferred(inputs: _Inputs, spec: LossSpec) -> bool:
    return spec.reduction == "none" and inputs.student_weight is not None


def _inplace(inputs: _Inputs, spec: LossSpec, wanted: _Wanted) -> bool:
    dense = inputs.student_weight is None
    return spec.inplace and dense and wanted.hidden


def _traced() -> bool:
    """Whether tensors may be stand-ins without memory: dynamo's, or torch.func's wrappers."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _scaled(grad: Tensor, factor: Tensor, spec: LossSpec) -> Tensor:
    """grad * factor: in grad's own memory when this is the graph's last backward."""
    if _traced():
        rowwise = factor.view(*grad.shape[:-1], 1) if factor.dim() else factor
        return (grad * rowwise).to(grad.dtype)
    # Kept graphs may run backward again, and the caller may still hold what we return.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()
    if grad.numel():
        # The upstream gradient of a sum is one number, expanded to every token.
        factor = factor.reshape(-1).contiguous() if factor.dim() else factor
        backends.resolve(spec.backend, grad.device).scale_(_as_rows(grad), factor)
    return grad


# ----------------------------------------------------------------------------------------------
# The work itself: called directly in eager mode, through a custom op when a graph is traced.


def _run(inputs: _Inputs, row_scale: Tensor, spec: LossSpec, wanted: _Wanted) -> list[Tensor]:
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
    for b, rows, flat in _chunks(student, held, spec):
        s = student.logits(backend, b, rows)
        grad = grads.buffer(s, b, rows)
        part = labels[flat] if labels is not None else None
        rest = (part, row_scale[flat], spec, grad, wanted.metrics)
        if entries is None:
            loss, found = backend.rows(s, teacher.logits(backend, b, rows), *rest)
        else:
            loss, found = backend.sparse_rows(s, entries.part(flat), *rest)
        losses.append(loss)
        metric_rows.append(found)
        grads.add(grad, b, rows)
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


def _sides(inputs: _Inputs, spec: LossSpec, wanted: _Wanted) -> tuple[_Side, _Side]:
    """Both sides with their rows as (B, T, columns); dense logits are copied only where no view
    has that form (a transposed vocabulary, leading dimensions that cannot be merged)."""
    shape = _common_rows(inputs)
    if _inplace(inputs, spec, wanted):
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


def _common_rows(inputs: _Inputs) -> tuple[int, int] | None:
    """(B, T) such that both sides' dense logits can be viewed as (B, T, V), or None."""
    sides = (inputs[0:2],) if inputs.teacher_indices is not None else (inputs[0:2], inputs[3:5])
    dense = [x for x, w in sides if w is None]
    if all(x.is_contiguous() for x in dense):  # nearly always, and the checks below take a while
        return 1, inputs.student.shape[:-1].numel()
    shapes = [_row_shapes(x) for x in dense]
    leading = inputs.student.shape[:-1]
    everything = [(1, leading.numel()), (leading[:-1].numel(), leading[-1] if leading else 1)]
    return next((shape for shape in everything if all(shape in s for s in shapes)), None)


def _row_shapes(x: Tensor) -> list[tuple[int, int]]:
    """The (B, T) with which x can be viewed as rows."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return []
    leading, strides = x.shape[:-1], x.stride()[:-1]
    shapes = []
    if _merge(leading, strides):
        shapes.append((1, leading.numel()))
    if _merge(leading[:-1], strides[:-1]):
        shapes.append((leading[:-1].numel(), leading[-1] if leading else 1))
    return shapes


def _merge(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether dimensions can be stepped over as one: each stride is the next one's extent."""
    steps = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(
        stride == inner * extent for (_, stride), (extent, inner) in itertools.pairwise(steps)
    )


def _as_rows(x: Tensor) -> Tensor:
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


def _chunks(
    student: _Side, bytes_per_row: int, spec: LossSpec
) -> Iterator[tuple[int, slice, slice]]:
    """(b, rows within b, the same rows of N) such that no chunk holds more than its budget."""
    batch, length = student.rows.shape[:2]
    step = max(length, 1)
    if bytes_per_row:
        device = student.rows.device.type
        budget = spec.chunk_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"])
        step = max(1, budget // bytes_per_row)
        step -= step % 64 if step > 64 else 0  # whole tiles for the matrix products
    for b in range(batch):
        for start in range(0, max(length, 1), step):  # no tokens: one empty chunk
            stop = min(start + step, length)
            yield b, slice(start, stop), slice(b * length + start, b * length + stop)


class _Gradients:
    """The gradients that are wanted, as the chunks fill them."""

    def __init__(
        self, inputs: _Inputs, side: _Side, backend: ModuleType, spec: LossSpec, wanted: _Wanted
    ) -> None:
        self.inputs, self.side, self.backend, self.wanted = inputs, side, backend, wanted
        self.inplace = _inplace(inputs, spec, wanted)
        rows, weight = side.rows, side.weight
        self.bytes_per_row = side.bytes_per_row(backend)
        self.d_rows = self.d_weight = self.d_bias = None
        self.started = False
        if weight is None:
            if wanted.hidden:
                self.d_rows = rows if self.inplace else self._empty(rows.shape, rows.dtype)
            return
        self.dtypes = backend.head_dtypes(rows.dtype)
        if wanted.any_gradient and self.dtypes[0] != self.dtypes[1]:
            self.bytes_per_row += weight.shape[0] * self.dtypes[1].itemsize
        accumulate = torch.promote_types(self.dtypes[0], torch.float32)
        if wanted.hidden:
            self.d_rows = self._empty(rows.shape, inputs.student.dtype)
        if wanted.weight:  # summed over chunks at full precision; the first chunk overwrites
            self.d_weight = self._empty(weight.shape, accumulate)
        if wanted.bias:
            self.d_bias = weight.new_zeros(weight.shape[0], dtype=accumulate)

    def buffer(self, logits: Tensor, b: int, rows: slice) -> Tensor | None:
        """Where the row kernel writes the gradient of these logits; None: no gradient wanted."""
        if not self.wanted.any_gradient:
            return None
        if self.side.weight is None:
            return self.d_rows[b : b + 1, rows] if self.d_rows is not None else None
        if self.dtypes[0] == self.dtypes[1]:
            return logits
        return self._empty(logits.shape, self.dtypes[1])

    def add(self, grad: Tensor | None, b: int, rows: slice) -> None:
        """The head's share of the gradient of one chunk of its logits."""
        if grad is None or self.side.weight is None:
            return
        mm_ = self.backend.mm_
        if self.d_rows is not None:
            mm_(self.d_rows[b, rows], grad[0], self.side.weight)
        if self.d_weight is not None:
            mm_(self.d_weight, grad[0].T, self.side.rows[b, rows], accumulate=self.started)
            self.started = True
        if self.d_bias is not None:
            self.d_bias += grad[0].sum(0, dtype=self.d_bias.dtype)

    def results(self) -> list[Tensor]:
        """What was wanted, in the inputs' shapes and dtypes."""
        if self.inplace:
            torch.autograd.graph.increment_version(self.inputs.student)
            return []
        made = zip(self.inputs[:3], (self.d_rows, self.d_weight, self.d_bias), strict=True)
        return [
            self._converted(grad.view(x.shape), _stored_dtype(x, grad is self.d_rows))
            for x, grad in made
            if grad is not None and x is not None
        ]

    def _converted(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad if grad.dtype == dtype else self._empty(grad.shape, dtype).copy_(grad)

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        made: Tensor = self.backend.empty(shape, dtype=dtype, device=self.side.rows.device)
        return made


def _stored_dtype(x: Tensor, rows: bool) -> torch.dtype:
    """In which the gradient of an input waits for the backward."""
    return torch.float32 if x.dtype == torch.float16 and not rows else x.dtype


# ----------------------------------------------------------------------------------------------
# The same as a custom op, for tracing: tensors and plain numbers in, tensors out.


@torch.library.custom_op("fusedkd::forward", mutates_args=())
def _op(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_indices: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    names: str,
    numbers: Tensor,
    integers: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    inputs = _Inputs(
        *(student, student_weight, student_bias),
        *(teacher, teacher_weight, teacher_bias),
        *(teacher_indices, labels),
    )
    return _run(inputs, row_scale, _unpack(names, numbers, integers), _Wanted(*wanted))


@_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *tensors, row_scale, _names, _numbers, _integers, flags = arguments
    inputs, wanted = _Inputs(*tensors), _Wanted(*flags)
    result = [torch.empty_like(row_scale)]
    if wanted.metrics:
        result.append(row_scale.new_empty(row_scale.numel(), len(METRIC_COLUMNS)))
    return result + [
        x.new_empty(x.shape, dtype=_stored_dtype(x, i == 0))
        for i, (x, want) in enumerate(zip(inputs[:3], wanted[:3], strict=True))
        if want and x is not None
    ]


def _dispatch(inputs: _Inputs, row_scale: Tensor, spec: LossSpec, wanted: _Wanted) -> list[Tensor]:
    if _traced():
        return torch.ops.fusedkd.forward(*inputs, row_scale, *_pack(spec), list(wanted))
    if spec.autocast is None:
        return _run(inputs, row_scale, spec, wanted)
    with torch.autocast(row_scale.device.type, enabled=False):  # casts are made explicitly
        return _run(inputs, row_scale, spec, wanted)


def _pack(spec: LossSpec) -> tuple[str, Tensor, list[int]]:
    s, t = spec.student_transform, spec.teacher_transform
    autocast = "none" if spec.autocast is None else str(spec.autocast).removeprefix("torch.")
    named = (spec.divergence.name, spec.reduction, spec.backend, autocast, spec.tail)
    names = " ".join(name or "none" for name in named)
    numbers = [spec.temperature, spec.teacher_temperature, spec.kd_weight, spec.ce_weight]
    numbers += [spec.label_smoothing, s.scale, s.softcap, t.scale, t.softcap]
    integers = [spec.vocab_size, int(spec.scale_by_t2), spec.ignore_index, spec.chunk_bytes or 0]
    # A product with a tensor is what dynamo keeps symbolic: a number passed as such, or in a list,
    # is burnt into the graph, and a schedule of temperatures recompiles until dynamo gives up.
    one = torch.ones((), dtype=torch.float64)
    return names, torch.stack([one * x for x in (*numbers, *spec.divergence.params)]), integers


def _unpack(names: str, numbers: Tensor, integers: list[int]) -> LossSpec:
    name, reduction, backend, autocast, tail = names.split()
    vocab_size, t2, ignore_index, chunk_bytes = integers
    plain = numbers.tolist()  # in the host's memory on every device: nothing waits
    temperature, teacher_temperature, kd_weight, ce_weight, smoothing, *transforms = plain[:9]
    return LossSpec(
        make(name, *plain[9:]),
        vocab_size,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        scale_by_t2=bool(t2),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
        student_transform=Transform(*transforms[:2]),
        teacher_transform=Transform(*transforms[2:]),
        tail=None if tail == "none" else tail,
        chunk_bytes=chunk_bytes or None,
        backend=None if backend == "none" else backend,
        autocast=None if autocast == "none" else getattr(torch, autocast),
    )
