"""Operations on tensors that have no memory, and what they would take of it: bytes that live after
each, products and traffic."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Array = NDArray[np.float64]
_aten: Any = torch.ops.aten


class Watch(TorchDispatchMode):
    """While open: storages made count until they are freed. What was there before does not."""

    as_if_real = True  # the loss does its own work here, and leaves none to an op (modes.stand_in)

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.rows: list[tuple[int, float, float]] = []  # bytes that live, flops, bytes moved

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if op is _aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # Liger asks whether its upstream gradient is another than 1
        if op.overloadpacket in _INDEXED:
            args = (args[0], _all_chosen(args[1]), *args[2:])
        before = _tensors((*args, *given.values()))
        for x in before:
            self._keep(x.untyped_storage(), there=True)
        out = op(*args, **given)
        after = _tensors(out if isinstance(out, tuple | list) else (out,))
        for x in after:
            self._keep(x.untyped_storage())
        self.note(*_work(op, args, given, out, before, after))
        return out

    def note(self, flops: float, moved: float) -> None:
        """An operation: here or, with tensors that it gets, somewhere else."""
        self.rows.append((self.live, flops, moved))

    def _keep(self, storage: Any, there: bool = False) -> None:
        key, size = storage._cdata, 0 if there else storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self._drop(key)), size
            self.live += size

    def _drop(self, key: int) -> None:
        self.live -= self.known.pop(key)[1]

    @property
    def peak(self) -> int:
        return max((live for live, *_ in self.rows), default=0)

    def table(self, start: int = 0, stop: int | None = None) -> Array:
        """(operations, 3): the bytes that live after each, its flops, the bytes it moves."""
        return np.array(self.rows[start:stop], np.float64).reshape(-1, 3)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple | list):
            found += _tensors(x)
    return found


def _all_chosen(indices: list[Tensor | None]) -> list[Tensor | None]:
    """A mask, of which nobody knows how much is true, as if all of it were."""
    chosen: list[Tensor | None] = []
    for x in indices:
        mask = x is not None and x.dtype in (torch.bool, torch.uint8)
        chosen += [x.new_empty(x.numel(), dtype=torch.long)] * x.dim() if mask else [x]  # type: ignore
    return chosen


def _work(
    op: Any, args: Any, kwargs: Any, out: Any, before: list[Tensor], after: list[Tensor]
) -> tuple[float, float]:
    """(flops, bytes moved); of a view, or memory that nobody has written, nothing."""
    packet = op.overloadpacket
    if packet in _ATTENTION:
        flops = _attention(args, _ATTENTION[packet])
    elif packet in flop_registry:
        flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
    else:
        flops = 0.0
    name = op._schema.name
    inside = {x.untyped_storage()._cdata for x in before}
    view = not op._schema.is_mutable and all(x.untyped_storage()._cdata in inside for x in after)
    if view or "empty" in name:
        return flops, 0.0
    return flops, float(sum(x.numel() * x.itemsize for x in (*before, *after)))


def _attention(args: Any, products: int) -> float:
    """Of causal attention: half of the scores."""
    query, key = args[:2] if products == 2 else args[1:3]
    return products * math.prod(query.shape) * key.shape[-2]


_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
_ATTENTION = {  # how many products of L x L a head makes
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}


class Line:
    """A table as it grows with the batch: each of its numbers is a + c * batch, so that its peak is
    known for every batch from two tables."""

    def __init__(self, table: Callable[[int], Array]) -> None:
        two, three = table(2), table(3)  # of 1 torch leaves out some operations
        if two.shape != three.shape:
            raise ValueError(
                f"{len(two)} operations for a batch of 2, {len(three)} for 3: expected as many."
            )
        self.slope = three - two
        self.start = two - 2 * self.slope

    def part(self, start: int, stop: int | None) -> Line:
        """Some of the operations."""
        line = copy(self)
        line.slope, line.start = self.slope[start:stop], self.start[start:stop]
        return line

    def at(self, batch: int) -> Array:
        return self.start + batch * self.slope
