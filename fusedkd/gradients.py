"""The gradients that a call wants, as the chunks of its rows fill them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from fusedkd import fp16
from fusedkd.cut import Cut
from fusedkd.inputs import Chunk, Inputs, Side, Wanted


def stored_dtype(x: Tensor, head: bool) -> torch.dtype:
    """In which the gradient of an input waits for the backward: a head's is not rounded before it
    is known what it will be multiplied by."""
    return torch.promote_types(x.dtype, torch.float32) if head else x.dtype


class Gradients:
    """Those of the student's rows (logits or hidden states), of its head's weight and its bias.

    A head's is kept for a block of rows, of which logits are made chunk by chunk, and multiplied at
    once; where it has the dtype of the logits it is written over them, so they are kept.

    Args:
        inputs, side: the student's tensors, and how the chunks read them.
        wanted: which of the gradients are made.
        inplace: the gradient of dense logits goes into their memory.
        some: chunks may leave out rows, whose gradient is 0.
    """

    def __init__(
        self,
        inputs: Inputs,
        side: Side,
        backend: ModuleType,
        wanted: Wanted,
        inplace: bool,
        some: bool,
    ) -> None:
        self.inputs, self.side, self.backend, self.wanted = inputs, side, backend, wanted
        self.inplace, self.some = inplace, some
        self.d_rows: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        self.powers: Tensor | None = None  # of dense fp16 rows: (N,); of an fp16 head's: 0-d
        self.kept: Tensor | None = None  # (1, n, V) of a head's block
        self.late: Tensor | None = None  # (n, H) the states of the only one
        rows, weight = side.rows, side.weight
        if weight is None:
            if wanted.hidden:
                self.d_rows = rows if inplace else self._rows(rows.dtype)
                if rows.dtype == torch.float16:
                    n = rows.shape[0] * rows.shape[1]
                    self.powers = torch.ones(n, dtype=torch.float32, device=rows.device)
            return
        self.logits_dtype, self.dtype = backend.head_dtypes(side.dtype)
        self.accumulate = torch.promote_types(self.logits_dtype, torch.float32)
        self.started = False  # whether the weight's holds a block
        if wanted.hidden:
            self.d_rows = self._rows(self.accumulate)
        if wanted.bias:
            self.d_bias = weight.new_zeros(weight.shape[0], dtype=self.accumulate)

    def _rows(self, dtype: torch.dtype) -> Tensor:
        """(B, T, C) of the side's rows, contiguous."""
        made = self._empty(self.side.rows.shape, dtype)
        return made.zero_() if self.some else made

    @property
    def _over_logits(self) -> bool:
        """Whether a head's gradient has the dtype of its logits, and is written over them."""
        return self.logits_dtype == self.dtype

    @property
    def _narrows(self) -> bool:
        """Whether it is, but then rounded to fp16."""
        return self.dtype == torch.float16 != self.logits_dtype

    def bytes_per_entry(self, any_gradient: bool) -> tuple[int, int]:
        """What a logit takes with what is made beside it, and what is kept of its gradient."""
        logit = self.side.bytes_per_entry(self.backend)
        if self.side.weight is None:
            return logit + (4 if self.powers is not None else 0), 0
        if not any_gradient:
            return logit, 0
        return (0, logit) if self._over_logits else (logit, self.dtype.itemsize)

    def chunks(
        self, cut: Cut, blocks: list[Chunk], scale: Tensor | None = None, late: bool = False
    ) -> Iterator[tuple[Chunk, Tensor, Tensor | None]]:
        """Of each chunk of tokens the student's logits (1, n, V), and where their gradient is to be
        written, if it is wanted, before the next one is asked for. Whoever gets them lets go of
        them first, else two chunks are held.

        Args:
            cut, blocks: the tokens that are computed.
            scale: of each of them; where it is 0 a head's states are taken as 0, for 0 times what a
                row that does not count may hold would be NaN.
            late: the caller can make dW of its factors, if :meth:`results` has them.
        """
        late = late and len(blocks) == 1 and self._spares(blocks[0].flat.stop)
        if self.wanted.weight and not late:  # the largest first: chunks leave it what it had
            self.d_weight = self._empty(self.side.weight.shape, self.accumulate)
        for block in blocks:
            states = self.side.states(block)
            if scale is not None:
                states = states.masked_fill((block.of_flat(scale) == 0).view(1, -1, 1), 0.0)
            if self.side.weight is not None and self.wanted.any_gradient:
                self.kept = self._empty((1, states.shape[1], self.side.columns), self.dtype)
            for part, at in block.parts(cut.logits):
                own = states if part is block else states[:, at]
                memory = self.kept[:, at] if self.kept is not None and self._over_logits else None
                logits = self.side.logits(self.backend, own, memory)
                grad = self._buffer(logits, part, at)
                yield part, logits, grad
                self._take(grad, part, at)
                del logits, grad, memory
            self._multiply(states, block)
            if late:
                self.late = states[0]
            else:
                self.kept = None

    def _spares(self, n: int) -> bool:
        """Whether the gradient of n rows, kept until the backward rounds dW, takes no more than
        dW in fp32 would."""
        weight = self.inputs.student_weight
        if not self.wanted.weight or weight is None or self._over_logits:
            return False
        size = self.accumulate.itemsize
        return weight.itemsize < size and n * self.dtype.itemsize <= weight.shape[1] * size

    def _buffer(self, logits: Tensor, part: Chunk, at: slice) -> Tensor | None:
        """Where the row kernel writes the gradient of these logits; None: no gradient wanted."""
        if self.kept is not None:
            return logits if self._narrows else self.kept[:, at]
        if not self.wanted.any_gradient:
            return None
        if self.powers is not None:
            return self._empty(logits.shape, torch.float32)
        if part.tokens is not None:  # they are a copy
            return logits
        return part.of(self.d_rows) if self.d_rows is not None else None

    def _take(self, grad: Tensor | None, part: Chunk, at: slice) -> None:
        """Take up what has been written there."""
        if grad is None:
            return
        if self.kept is not None:
            if self.d_bias is not None:
                self.d_bias += grad[0].sum(0, dtype=self.d_bias.dtype)
            if self._narrows:
                self._narrow_chunk(grad, at)
        elif self.d_rows is not None:
            if self.powers is not None:  # each row at a power of its own
                power = fp16.powers(grad[0])[None]
                part.put(self.powers.view(self.side.rows.shape[:-1]), power)
                grad.mul_(power[..., None])
            if self.powers is not None or part.tokens is not None:
                part.put(self.d_rows, grad)

    def _narrow_chunk(self, grad: Tensor, at: slice) -> None:
        """Keep a chunk in fp16, at one power for all rows, for the weight's gradient adds them up.
        It only shrinks from chunk to chunk, so what there is already is hardly ever touched."""
        assert self.kept is not None
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

    def _multiply(self, states: Tensor, block: Chunk) -> None:
        """The products of a head's block, whose logits were made of ``states`` (1, n, H)."""
        if self.kept is None:
            return
        grad, mm_ = self.kept[0], self.backend.mm_
        if self.d_rows is not None:
            own = block.tokens is None  # else of rows here and there
            rows = block.of(self.d_rows) if own else self._empty(states.shape, self.accumulate)
            mm_(rows[0], grad, self.side.weight)
            if self.powers is not None:
                rows.div_(self.powers)
            if not own:
                block.put(self.d_rows, rows)
        if self.d_weight is not None:  # added up over blocks, at full precision
            mm_(self.d_weight, grad.T, states[0], accumulate=self.started)
            self.started = True

    def results(self) -> list[Tensor]:
        """What was wanted, in the inputs' shapes, as the backward needs it. Instead of dW there may
        be the gradient of the logits (n, V), and at the end the states (n, H), for
        :func:`weight_gradient`. Last the powers of fp16, if they are not taken out."""
        if self.d_weight is not None and self._narrows and self.powers is not None:
            self.backend.scale_(self.d_weight, 1 / self.powers)
        if self.inplace:
            torch.autograd.graph.increment_version(self.inputs.student)
        head = self.side.weight is not None
        made = zip(self.inputs[:3], (self.d_rows, self.d_weight, self.d_bias), strict=True)
        results = [
            self._converted(grad.view(x.shape), stored_dtype(x, head))
            for x, grad in made
            if grad is not None and x is not None and not self.inplace
        ]
        if self.late is not None and self.kept is not None:
            results.insert(self.wanted.hidden, self.kept[0])
            results.append(self.late)
        elif head:
            return results
        return results if self.powers is None else [*results, self.powers]

    def _converted(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad if grad.dtype == dtype else self._empty(grad.shape, dtype).copy_(grad)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made: Tensor = self.backend.empty(shape, dtype=dtype, device=self.side.rows.device)
        return made


# Of fp32, rounded before the next is made. Against dW in fp32, 16, 512 and 1,024 tokens x 50,304 in
# bf16 took 1.61, 1.04 and 1.11 times the bare products, in pieces of 8 MiB 1.39, 1.01 and 1.04, of
# 32 MiB 1.51, 0.98 and 0.96 (H = 896, 1 core of Zen 5, busy, 2026-11-28). On a GPU: not measured.
PIECE_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}


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
    scratch = backend.empty((max(1, rows), shape[1]), dtype=wide, device=grad.device)
    for columns, piece in zip(grad.split(len(scratch), 1), out.split(len(scratch)), strict=True):
        product = scratch[: len(piece)]
        backend.mm_(product, columns.T, states)
        backend.scale_(product, factor, piece)
    return out
