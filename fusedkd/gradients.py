"""The gradients that a call wants, as the chunks of its rows fill them: of dense logits, or of a
head."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from fusedkd import fp16
from fusedkd.cut import Cut
from fusedkd.inputs import PIECE_BYTES, Chunk, Inputs, Side, Wanted

Visited = tuple[Chunk, Tensor, Tensor | None]


def stored_dtype(x: Tensor, head: bool) -> torch.dtype:
    """In which the gradient of an input waits for the backward: a head's is not rounded before it
    is known what it will be multiplied by."""
    return torch.promote_types(x.dtype, torch.float32) if head else x.dtype


class LogitsGradient:
    """That of dense logits: what the row kernel writes, moved and rounded where it has to be.

    Args:
        student: as the caller gave them, and ``side``: as the chunks read them.
        wanted: whether it is made at all.
        inplace: it goes into the memory of the logits.
        some: chunks may leave out rows, whose gradient is 0.
    """

    def __init__(
        self,
        student: Tensor,
        side: Side,
        backend: ModuleType,
        wanted: bool,
        inplace: bool,
        some: bool,
    ) -> None:
        self.student, self.side, self.backend, self.inplace = student, side, backend, inplace
        self.made: Tensor | None = None  # (B, T, V)
        self.powers: Tensor | None = None  # of fp16 rows: (B, T)
        rows = side.rows
        if wanted:
            self.made = rows if inplace else _rows(side, backend, rows.dtype, some)
            if rows.dtype == torch.float16:
                self.powers = rows.new_ones(rows.shape[:-1], dtype=torch.float32)

    def bytes_per_entry(self, any_gradient: bool) -> tuple[int, int]:
        """As :meth:`Gradients.bytes_per_entry`."""
        return self.side.rows.itemsize + (4 if self.powers is not None else 0), 0

    def chunks(
        self, cut: Cut, blocks: list[Chunk], scale: Tensor | None = None, late: bool = False
    ) -> Iterator[Visited]:
        """As :meth:`Gradients.chunks`."""
        for part in blocks:
            logits = self.side.states(part)
            grad: Tensor | None = None
            if self.powers is not None:
                grad = self.backend.empty(logits.shape, dtype=torch.float32, device=logits.device)
            elif self.made is not None:  # chosen tokens are a copy
                grad = part.of(self.made) if part.tokens is None else logits
            yield part, logits, grad
            if grad is not None and self.powers is not None:  # each row at a power of its own
                power = fp16.powers(grad[0])[None]
                part.put(self.powers, power)
                grad.mul_(power[..., None])
            moved = self.powers is not None or part.tokens is not None
            if grad is not None and self.made is not None and moved:
                part.put(self.made, grad)
            del logits, grad

    def results(self) -> list[Tensor]:
        """The gradient unless it is in place, and the powers (N,) of fp16."""
        results = [] if self.made is None or self.inplace else [self.made.view(self.student.shape)]
        if self.inplace:
            torch.autograd.graph.increment_version(self.student)
        return results if self.powers is None else [*results, self.powers.view(-1)]


class Gradients:
    """Those of a head: of its hidden states, its weight and its bias.

    The gradient of the logits is kept for a block of rows, which are several chunks of logits, and
    multiplied at once; where it has the dtype of the logits it is written over them, so they are
    kept.

    Args:
        inputs, side: the student's tensors, and how the chunks read them.
        wanted: which of the gradients are made.
        some: chunks may leave out rows, whose gradient is 0.
    """

    def __init__(
        self,
        inputs: Inputs,
        side: Side,
        backend: ModuleType,
        wanted: Wanted,
        some: bool,
    ) -> None:
        assert side.weight is not None
        self.inputs, self.side, self.backend, self.wanted = inputs, side, backend, wanted
        self.weight = side.weight
        self.logits_dtype, self.dtype = backend.head_dtypes(side.dtype)
        self.accumulate = torch.promote_types(self.logits_dtype, torch.float32)
        self.over_logits = self.logits_dtype == self.dtype
        self.narrows = self.dtype == torch.float16 != self.logits_dtype
        self.kept: Tensor | None = None  # (1, n, V) of a block
        self.powers: Tensor | None = None  # of fp16: 0-d
        self.late: Tensor | None = None  # (n, H) the states of the only block
        self.d_hidden = _rows(side, backend, self.accumulate, some) if wanted.hidden else None
        self.d_weight: Tensor | None = None
        self.started = False  # whether it holds a block
        self.d_bias = None
        if wanted.bias:
            self.d_bias = self.weight.new_zeros(side.columns, dtype=self.accumulate)

    def bytes_per_entry(self, any_gradient: bool) -> tuple[int, int]:
        """What a logit takes, and what is kept of its gradient."""
        logit = self.logits_dtype.itemsize
        if not any_gradient:
            return logit, 0
        return (0, logit) if self.over_logits else (logit, self.dtype.itemsize)

    def chunks(
        self, cut: Cut, blocks: list[Chunk], scale: Tensor | None = None, late: bool = False
    ) -> Iterator[Visited]:
        """Of each chunk of tokens the student's logits (1, n, V), and where their gradient is to be
        written, if it is wanted, before the next one is asked for. Whoever gets them lets go of
        them first, else two chunks are held.

        Args:
            cut, blocks: the tokens that are computed.
            scale: of each of them; where it is 0 the states are taken as 0, for 0 times what a row
                that does not count may hold would be NaN.
            late: the caller can make dW of its factors, if :meth:`results` has them.
        """
        late = late and len(blocks) == 1 and self._spares(blocks[0].flat.stop)
        if self.wanted.weight and not late:  # the largest first: chunks leave it what it had
            self.d_weight = self._empty(self.weight.shape, self.accumulate)
            if self.side.ids is not None:
                self.d_weight.zero_()
        for block in blocks:
            states = self.side.states(block)
            if scale is not None:
                states = states.masked_fill((block.of_flat(scale) == 0).view(1, -1, 1), 0.0)
            if self.wanted.any_gradient:
                self.kept = self._empty((1, states.shape[1], self.side.columns), self.dtype)
            for part, at in block.parts(cut.logits):
                own = states if part is block else states[:, at]
                kept = None if self.kept is None else self.kept[:, at]
                logits = self.side.logits(self.backend, own, kept if self.over_logits else None)
                grad = logits if self.narrows and kept is not None else kept
                yield part, logits, grad
                if grad is not None:
                    self._take(grad, at)
                del logits, grad, kept
            if self.kept is not None:
                self._multiply(self.kept[0], states, block)
            if late:
                self.late = states[0]
            else:
                self.kept = None

    def _spares(self, n: int) -> bool:
        """Whether the gradient of n rows, kept until the backward rounds dW, takes no more than
        dW in fp32 would."""
        given, size = self.inputs.student_weight, self.accumulate.itemsize
        if given is None or not self.wanted.weight or self.side.ids is not None:
            return False
        if self.over_logits or given.itemsize >= size:
            return False
        return n * self.dtype.itemsize <= given.shape[1] * size

    def _take(self, grad: Tensor, at: slice) -> None:
        """Take up the gradient of a chunk. fp16 is kept at one power for all rows, for dW adds them
        up. It only shrinks from chunk to chunk, so what there is already is hardly ever touched."""
        if self.d_bias is not None:
            self.d_bias += grad[0].sum(0, dtype=self.d_bias.dtype)
        if not self.narrows or self.kept is None:
            return
        rows = fp16.powers(grad[0])
        power = rows.amin() if len(rows) else rows.new_ones(())
        if self.powers is not None:
            power = torch.minimum(power, self.powers)
            ratio = power / self.powers
            if at.start:
                self.backend.scale_(self.kept[:, : at.start], ratio)
            if self.started:
                self.backend.scale_(self.d_weight, ratio)
        self.powers = power
        self.kept[:, at].copy_(grad.mul_(power))

    def _multiply(self, grad: Tensor, states: Tensor, block: Chunk) -> None:
        """The products of a block (n, V), whose logits were made of ``states`` (1, n, H)."""
        mm_ = self.backend.mm_
        if self.d_hidden is not None:
            own = block.tokens is None  # else of rows here and there
            rows = block.of(self.d_hidden) if own else self._empty(states.shape, self.accumulate)
            self.side.back(self.backend, grad, rows[0])
            if self.powers is not None:
                rows.div_(self.powers)
            if not own:
                block.put(self.d_hidden, rows)
        if self.d_weight is not None:  # added up over blocks, at full precision
            if self.side.ids is None:
                mm_(self.d_weight, grad.T, states[0], accumulate=self.started)
            else:
                self._scatter(self.d_weight, self.side.ids, grad, states[0])
            self.started = True

    def _scatter(self, out: Tensor, ids: Tensor, grad: Tensor, states: Tensor) -> None:
        """Add grad^T @ states (V', H) to these rows."""
        for columns, rows in self.side.pieces():
            product = self._empty(rows.shape, out.dtype)
            self.backend.mm_(product, grad[:, columns].T, states)
            out.index_add_(0, ids[columns], product)

    def results(self) -> list[Tensor]:
        """What was wanted, in the inputs' shapes, as the backward needs it. Instead of dW there may
        be the gradient of the logits (n, V), and at the end the states (n, H) and the power of
        fp16, for :func:`weight_gradient`."""
        if self.d_weight is not None and self.powers is not None:
            self.backend.scale_(self.d_weight, 1 / self.powers)
        d_bias = self.d_bias
        if d_bias is not None and self.side.ids is not None:
            rows = d_bias.new_zeros(self.weight.shape[0])
            d_bias = rows.index_copy_(0, self.side.ids, d_bias)
        made = zip(self.inputs[:3], (self.d_hidden, self.d_weight, d_bias), strict=True)
        results = [
            self._converted(grad.view(x.shape), stored_dtype(x, head=True))
            for x, grad in made
            if grad is not None and x is not None
        ]
        if self.late is not None and self.kept is not None:
            results.insert(self.wanted.hidden, self.kept[0])
            results += [self.late] if self.powers is None else [self.late, self.powers]
        return results

    def _converted(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad if grad.dtype == dtype else self._empty(grad.shape, dtype).copy_(grad)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made: Tensor = self.backend.empty(shape, dtype=dtype, device=self.side.rows.device)
        return made


def _rows(side: Side, backend: ModuleType, dtype: torch.dtype, some: bool) -> Tensor:
    """(B, T, C) of the side's rows, contiguous; 0 where only some of them will be written."""
    made: Tensor = backend.empty(side.rows.shape, dtype=dtype, device=side.rows.device)
    return made.zero_() if some else made


def weight_gradient(
    grad: Tensor, states: Tensor, factor: Tensor, dtype: torch.dtype, backend: ModuleType
) -> Tensor:
    """factor * grad^T @ states: dW (V, H) rounded once to ``dtype``, without all of it in fp32.

    Args:
        grad: (n, V) of the logits.
        states: (n, H) of which they were made.
        factor: 0-d.
    """
    shape = grad.shape[1], states.shape[1]
    wide = torch.promote_types(grad.dtype, torch.float32)
    rows = PIECE_BYTES.get(grad.device.type, PIECE_BYTES["cpu"]) // (shape[1] * wide.itemsize)
    out: Tensor = backend.empty(shape, dtype=dtype, device=grad.device)
    scratch = backend.empty((max(1, min(rows, shape[0])), shape[1]), dtype=wide, device=grad.device)
    for columns, piece in zip(grad.split(len(scratch), 1), out.split(len(scratch)), strict=True):
        product = scratch[: len(piece)]
        backend.mm_(product, columns.T, states)
        backend.scale_(product, factor, piece)
    return out
