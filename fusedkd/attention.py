"""Losses between the attention scores of two models, of which a few rows exist at a time.

All B x H x L^2 scores would be the one thing here that grows with the square of the length. So they
are made of queries and keys a chunk at a time, and their gradient with them, in the forward, as for
heads (:mod:`fusedkd.autograd`): what is kept has the size of queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import backends
from fusedkd.autograd import SECOND, once_differentiable, roots, scaled
from fusedkd.divergences import forward_kl
from fusedkd.gradients import stored_dtype
from fusedkd.kernels import RowCall
from fusedkd.modes import in_functorch, stand_in
from fusedkd.spec import LossSpec

Block = tuple[slice, slice, slice]  # of sequences, heads and queries

# On a CPU what stays in the last cache: MSE of 12 heads of 2,048 tokens took 0.54, 0.50, 0.50 and
# 0.71 s of processor time with 2, 8, 16 and 64 MiB (1 core of Zen 5, busy, 2026-11-28). On a GPU:
# not measured.
CHUNK_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
PAIR_BYTES = 16  # of a query and a key: two scores, whether it is seen, what comes between


@dataclass(frozen=True, eq=False)
class AttentionStates:
    """What one layer of attention computed from.

    Args:
        query: (B, H, L, d), after any rotation by position.
        key, value: (B, H_kv, L, d); each of the H_kv heads serves H / H_kv heads of queries.
        scaling: factor on ``query @ key``; None: d ** -0.5.
        mask: (B or 1, 1 or H, L, L), True or 0 where a query sees a key; other numbers are added to
            the scores, and large negative ones hide. None: every key is seen.
        causal: without a mask, queries see no later keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None = None
    mask: Tensor | None = None
    causal: bool = False

    @property
    def factor(self) -> float:
        """The scaling, as a number."""
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    def pairs(self) -> Tensor:
        """(B or 1, 1 or H, L, L) bool: which queries see which keys."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        if self.mask is None:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
            return (seen.tril() if self.causal else seen)[None, None]
        mask = self.mask[..., :keys]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def scores(self, out: Tensor | None = None) -> Tensor:
        """(B, H, L, L) fp32 (fp64) attention scores before the softmax; of pairs that do not see
        each other, too. Without a graph they may go to ``out``."""
        query, key = wide(self.query) * self.factor, wide(self.repeated("key"))
        scores = torch.matmul(query, key.transpose(-1, -2), out=out)
        if self.mask is None or self.mask.dtype == torch.bool:
            return scores
        return scores.add_(self.mask[..., : scores.shape[-1]].where(self.pairs(), 0.0))

    def repeated(self, name: str) -> Tensor:
        """``query``, ``key`` or ``value`` with H heads: (B, H, L, d)."""
        states: Tensor = getattr(self, name)
        times = self.query.shape[1] // states.shape[1]
        return states if times == 1 else states.repeat_interleave(times, dim=1)

    def part(self, block: Block) -> AttentionStates:
        """Some sequences, heads and queries, with all keys, of as many heads; no values."""
        b, h, rows = block
        query, key, mask = self.query[b, h, rows], self.key[b, h], self.mask
        if mask is not None:
            mask = mask[_within(mask, block)]
        elif self.causal:
            seen = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
            mask = seen.tril(rows.start)[None, None]
        return AttentionStates(query, key, key, self.factor, mask)


class Inputs(NamedTuple):
    """The tensors of a call, each side's as :class:`AttentionStates` has them."""

    query: Tensor  # (B, H, L, d)
    key: Tensor | None  # (B, H, K, d); None: the queries
    mask: Tensor | None
    teacher_query: Tensor
    teacher_key: Tensor | None
    teacher_mask: Tensor | None
    row_scale: Tensor  # (B, L) fp32 (fp64): a factor on each token's loss; 0: it does not count


class How(NamedTuple):
    """What of a call is no tensor; of pairs, the student's comes first."""

    loss: str  # of LOSSES
    scaling: Sequence[float]
    causal: Sequence[bool]
    biased: bool  # whether the numbers of masks are added to the scores
    wanted: Sequence[bool]  # the gradients of query, key and mask


def score_loss(
    loss: str,
    student: AttentionStates,
    teacher: AttentionStates,
    row_scale: Tensor,
    biased: bool = True,
) -> Tensor:
    """The sum over heads and tokens of what :data:`LOSSES` makes of two rows of scores, times
    ``row_scale`` (B, L); with a graph to the student's states alone. Keys that are the queries
    themselves are one tensor."""
    tensors = [
        x
        for side in (student, teacher)
        for x in (side.query, None if side.key is side.query else side.repeated("key"), side.mask)
    ]
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:3]]
    how = How(
        loss,
        (student.factor, teacher.factor),
        (student.causal, teacher.causal),
        biased,
        (needs[0], needs[1], needs[2] and biased),
    )
    constants = [None if x is None else x.detach() for x in tensors[3:]]
    total, *_ = _ScoreLoss.apply(*tensors[:3], *constants, row_scale, how)
    return total


class _ScoreLoss(torch.autograd.Function):
    """Inputs: the fields of Inputs, how. Outputs: the loss, then the gradients that are wanted,
    which the caller drops."""

    @staticmethod
    def forward(  # dynamo binds the arguments one by one
        query: Tensor,
        key: Tensor | None,
        mask: Tensor | None,
        teacher_query: Tensor,
        teacher_key: Tensor | None,
        teacher_mask: Tensor | None,
        row_scale: Tensor,
        how: How,
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(query, key, mask, teacher_query, teacher_key, teacher_mask, row_scale)
        if stand_in(*inputs):
            return tuple(torch.ops.fusedkd.score_loss(*inputs, *how))
        return tuple(_run(inputs, how))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, how = inputs
        ctx.wanted = how.wanted
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        ctx.set_materialize_grads(False)
        if any(how.wanted):
            ctx.roots = roots(*tensors[:3])
            ctx.save_for_backward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
        if in_functorch() and any(x is not None for x in rest):
            raise RuntimeError(SECOND)
        nothing = (None,) * (len(Inputs._fields) + 1)
        if upstream is None:
            return nothing
        made = iter(ctx.saved_tensors)
        grads = [
            scaled(next(made), upstream, dtype, None) if want else None
            for want, dtype in zip(ctx.wanted, ctx.dtypes, strict=True)
        ]
        return *grads, *nothing[len(grads) :]


@torch.library.custom_op(
    "fusedkd::score_loss",
    mutates_args=(),
    schema="(Tensor query, Tensor? key, Tensor? mask, Tensor teacher_query, Tensor? teacher_key, "
    "Tensor? teacher_mask, Tensor row_scale, str loss, float[] scaling, bool[] causal, "
    "bool biased, bool[] wanted) -> Tensor[]",
)
def _op(*call: Any) -> list[Tensor]:
    """Stands for the work where a graph is traced."""
    return _run(*_unpacked(call))


@_op.register_fake
def _(*call: Any) -> list[Tensor]:
    inputs, how = _unpacked(call)
    made = _gradients(inputs, how)
    return [inputs.row_scale.new_empty(()), *(x for x in made if x is not None)]


def _unpacked(call: Sequence[Any]) -> tuple[Inputs, How]:
    tensors = len(Inputs._fields)
    return Inputs(*call[:tensors]), How(*call[tensors:])


def _run(inputs: Inputs, how: How) -> list[Tensor]:
    """The loss, and the gradients that are wanted."""
    with torch.autocast(inputs.query.device.type, enabled=False):  # all is fp32 at least
        return _in_chunks(inputs, how)


def _in_chunks(inputs: Inputs, how: How) -> list[Tensor]:
    student, teacher = (
        AttentionStates(query, query if key is None else key, query, factor, mask, causal)
        for (query, key, mask), factor, causal in zip(
            (inputs[:3], inputs[3:6]), how.scaling, how.causal, strict=True
        )
    )
    compare, backend = LOSSES[how.loss], backends.resolve(None, inputs.query.device)
    d_query, d_key, d_mask = made = _gradients(inputs, how)
    d_key = d_query if inputs.key is None else d_key
    dtype, room = inputs.row_scale.dtype, _Room(inputs.row_scale.device)
    total = inputs.row_scale.new_zeros((), dtype=torch.float64)
    for block in _blocks(student.query, student.key):
        b, h, rows = block
        ours, theirs = student.part(block), teacher.part(block)
        scale = inputs.row_scale[b, None, rows]
        none = (scale == 0)[..., None]
        pairs = ours.pairs(), theirs.pairs()
        shape = torch.broadcast_shapes(none.shape, *(x.shape for x in pairs))
        hidden = room("pairs", shape, torch.bool)
        hidden.copy_(none).logical_not_()
        for seen in pairs:
            hidden &= seen
        hidden.logical_not_()
        # what is not compared may be no number, and 0 times it none
        query = room.copy("query", ours.query, dtype).masked_fill_(none, 0.0)
        key = room.copy("key", ours.key, dtype).masked_fill_(hidden.all(-2)[..., None], 0.0)
        others = [room.copy(f"teacher's {x}", getattr(theirs, x), dtype) for x in ("query", "key")]
        if not how.biased:
            ours, theirs = replace(ours, mask=None), replace(theirs, mask=None)
        shape = (*query.shape[:3], key.shape[2])
        grad = replace(ours, query=query, key=key).scores(room("student", shape, dtype))
        theirs = replace(theirs, query=others[0], key=others[1])
        compared = grad, theirs.scores(room("teacher", shape, dtype))
        total += compare(*compared, hidden, scale, backend)  # scores become their gradient
        if d_query is not None:
            part = torch.matmul(grad, key, out=room("d_query", query.shape, dtype))
            d_query[b, h, rows].add_(part, alpha=ours.factor)
        if d_key is not None:
            part = torch.matmul(grad.mT, query, out=room("d_key", key.shape, dtype))
            d_key[b, h].add_(part, alpha=ours.factor)
        if d_mask is not None:
            part = d_mask[_within(d_mask, block)][..., : grad.shape[-1]]
            part += grad.sum_to_size(part.shape)
    return [total.to(dtype), *(x for x in made if x is not None)]


class _Room:
    """Memory that all chunks share, the first of which is the largest. Made anew for each, glibc
    before 2.38 finds it no room where the last one's was, and a process comes to hold many times
    as much."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pieces: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self.pieces:
            self.pieces[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.pieces[name][:size].view(shape)

    def copy(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self(name, x.shape, dtype).copy_(x)


def _gradients(inputs: Inputs, how: How) -> list[Tensor | None]:
    """Memory for those of query, key and mask that are wanted."""
    return [
        x.new_zeros(x.shape, dtype=stored_dtype(x, head=True)) if want and x is not None else None
        for x, want in zip(inputs[:3], how.wanted, strict=True)
    ]


def _blocks(query: Tensor, key: Tensor) -> Iterator[Block]:
    """All sequences, heads and queries, as many at a time as there is room for, or one."""
    batch, heads, length = query.shape[:3]
    room = CHUNK_BYTES.get(query.device.type, CHUNK_BYTES["cpu"])
    most = room // (PAIR_BYTES * max(1, key.shape[2]))  # rows of scores
    steps = most // max(1, heads * length), most // max(1, length), most
    b, h, rows = map(_slices, (batch, heads, length), steps)
    return product(b, h, rows)


def _slices(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _within(x: Tensor, block: Block) -> tuple[slice, ...]:
    """Where a block lies in (B or 1, 1 or H, L or 1, K)."""
    sizes = zip(x.shape, block, strict=False)
    return tuple(slice(None) if size == 1 else part for size, part in sizes)


def wide(x: Tensor) -> Tensor:
    """In fp32, or as fp64."""
    return x if x.dtype == torch.float64 else x.float()


# ----------------------------------------------------------------------------------------------
# Of scores (b, h, n, K) the rows' losses, each times its scale (b, 1, n), added up, over the keys
# (b or 1, 1 or h, n, K) that are not hidden. The student's become their gradient, the teacher's are
# lost.


def _mse(
    s: Tensor, t: Tensor, hidden: Tensor, scale: Tensor, backend: ModuleType, center: bool = False
) -> Tensor:
    """Mean squared gap; ``center``: less the row's mean gap."""
    count = (s.shape[-1] - hidden.sum(-1, keepdim=True)).clamp(min=1)
    gap = s.sub_(t).masked_fill_(hidden, 0.0)
    if center:
        gap.sub_(gap.sum(-1, keepdim=True) / count).masked_fill_(hidden, 0.0)
    factor = scale[..., None] / count
    loss = torch.mul(gap, gap, out=t).sum(-1, keepdim=True) * factor
    gap.mul_(2 * factor)  # of centred gaps, too: they add up to 0
    return loss.sum(dtype=torch.float64)


def _kl(s: Tensor, t: Tensor, hidden: Tensor, scale: Tensor, backend: ModuleType) -> Tensor:
    """KL of the softmaxes: the rows' own kernel, with the keys as vocabulary."""
    student, teacher = (x.masked_fill_(hidden, -torch.inf).view(1, -1, x.shape[-1]) for x in (s, t))
    call = RowCall(
        student,
        teacher,
        labels=None,
        row_scale=scale.expand(s.shape[:-1]).reshape(-1),
        spec=LossSpec(forward_kl(), s.shape[-1]),
        grad=student,
        metrics=False,
    )
    loss: Tensor = backend.rows(call).loss
    return loss.sum(dtype=torch.float64)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": _mse,
    "centered_mse": partial(_mse, center=True),
    "kl": _kl,
}
