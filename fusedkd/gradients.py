"""The gradients that a call wants, as the chunks of its rows fill them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fusedkd import fp16
from fusedkd.inputs import Chunk, Inputs, Side, Wanted


def stored_dtype(x: Tensor, head: bool) -> torch.dtype:
    """In which the gradient of an input waits for the backward: a head's is not rounded before it
    is known what it will be multiplied by."""
    return torch.promote_types(x.dtype, torch.float32) if head else x.dtype


class Gradients:
    """Those of the student's rows (logits or hidden states), of its head's weight and its bias.

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
        self.powers: Tensor | None = None  # of dense fp16 rows: (N,); of an fp16 head's weight: 0-d
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
        self.started = False  # whether the weight's holds a chunk
        if wanted.weight:  # the largest first: no chunk takes the memory that the last call's left
            self.d_weight = self._empty(weight.shape, self.accumulate)
        if wanted.hidden:
            self.d_rows = self._rows(self.accumulate)
        if wanted.bias:
            self.d_bias = weight.new_zeros(weight.shape[0], dtype=self.accumulate)

    def _rows(self, dtype: torch.dtype) -> Tensor:
        """(B, T, C) of the side's rows, contiguous."""
        made = self._empty(self.side.rows.shape, dtype)
        return made.zero_() if self.some else made

    @property
    def _narrows(self) -> bool:
        """Whether a head's chunk of the gradient is made in the logits' memory, then rounded to
        fp16."""
        return self.side.weight is not None and self.dtype == torch.float16 != self.logits_dtype

    @property
    def bytes_per_entry(self) -> int:
        """What of a chunk's gradient is held beside its logits, for each of these."""
        if self.side.weight is None:
            return 4 if self.powers is not None else 0
        if not self.wanted.any_gradient or self.logits_dtype == self.dtype:
            return 0
        return self.dtype.itemsize

    def buffer(self, logits: Tensor, part: Chunk) -> Tensor | None:
        """Where the row kernel writes the gradient of these logits; None: no gradient wanted."""
        if not self.wanted.any_gradient:
            return None
        if self.side.weight is None:
            if self.powers is not None:
                return self._empty(logits.shape, torch.float32)
            if part.tokens is not None:  # they are a copy
                return logits
            return part.of(self.d_rows) if self.d_rows is not None else None
        if self._narrows or self.logits_dtype == self.dtype:
            return logits
        return self._empty(logits.shape, self.dtype)

    def add(self, grad: Tensor | None, states: Tensor, part: Chunk) -> None:
        """Take up the gradient of one chunk of logits, which were made of ``states``."""
        if grad is None:
            return
        if self.side.weight is not None:
            self._add_head(grad[0], states[0], part)
        elif self.d_rows is not None:
            if self.powers is not None:
                grad = self._narrowed_rows(grad, part)
            if self.powers is not None or part.tokens is not None:
                part.put(self.d_rows, grad)

    def _narrowed_rows(self, grad: Tensor, part: Chunk) -> Tensor:
        """(1, n, V) in fp16, each row at a power of its own."""
        assert self.powers is not None
        power = fp16.powers(grad.view(-1, grad.shape[-1])).view(grad.shape[:-1])
        part.put(self.powers.view(self.side.rows.shape[:-1]), power)
        return fp16.narrow(self._empty(grad.shape, torch.float16), grad, power[..., None])

    def _add_head(self, grad: Tensor, states: Tensor, part: Chunk) -> None:
        """A head's share: (n, V) and (n, H)."""
        if self.d_bias is not None:
            self.d_bias += grad.sum(0, dtype=self.d_bias.dtype)
        power = None
        if self._narrows:
            grad, power = self._narrowed(grad)
        mm_ = self.backend.mm_
        if self.d_rows is not None:
            scattered = part.tokens is not None
            shape = (1, *states.shape)
            rows = self._empty(shape, self.accumulate) if scattered else part.of(self.d_rows)
            mm_(rows[0], grad, self.side.weight)
            if power is not None:
                rows.div_(power)
            if scattered:
                part.put(self.d_rows, rows)
        if self.d_weight is not None:  # added up over chunks, at full precision
            mm_(self.d_weight, grad.T, states, accumulate=self.started)
            self.started = True

    def _narrowed(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk in fp16 and its power: one for all rows, for the weight's gradient adds them up.
        It only shrinks from chunk to chunk, so what has been added up is hardly ever touched."""
        rows = fp16.powers(grad)
        power = rows.amin() if len(rows) else rows.new_ones(())
        if self.powers is not None:
            power = torch.minimum(power, self.powers)
            if self.started:
                self.backend.scale_(self.d_weight, power / self.powers)
        self.powers = power
        return fp16.narrow(self._empty(grad.shape, torch.float16), grad, power), power

    def results(self) -> list[Tensor]:
        """What was wanted, in the inputs' shapes, as the backward needs it; behind it the powers of
        dense fp16 rows."""
        if self._narrows and self.powers is not None and self.d_weight is not None:
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
        return results if head or self.powers is None else [*results, self.powers]

    def _converted(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad if grad.dtype == dtype else self._empty(grad.shape, dtype).copy_(grad)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made: Tensor = self.backend.empty(shape, dtype=dtype, device=self.side.rows.device)
        return made
