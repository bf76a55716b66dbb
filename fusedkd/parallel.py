"""Vocabulary-parallel losses: each rank of a group holds some columns of the logits.

Every rank's backend observes the columns that lie there; the statistics of rows, a few numbers per
token, are gathered, and nothing as wide as the vocabulary is ever sent. That is a backend whose
rows lie across the ranks (:mod:`fusedkd.parallel_rows`), so the loop over chunks, the products,
reductions and autograd are those of :mod:`fusedkd.autograd`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fusedkd.cut import chunk_budget
from fusedkd.distributions import LMHead, SparseTeacher
from fusedkd.kernels import Part
from fusedkd.parallel_rows import GroupRows


class Shards(NamedTuple):
    """One rank's part of a call, as :mod:`fusedkd.loss` goes on with it."""

    student: Any  # plain tensors, this rank's columns
    teacher: Any
    vocab_size: int  # of all ranks
    backend: GroupRows
    chunk_bytes: int
    chunk_columns: int  # the widest rank's: every rank makes chunks of as many tokens


class _Split(NamedTuple):
    """Which columns of the vocabulary lie here."""

    offset: int
    columns: int
    total: int  # on all ranks
    widest: int  # of any rank


def is_sharded(*sides: Any) -> bool:
    """Whether some side is a DTensor whose vocabulary is sharded."""
    columns = map(_columns, sides)
    dtensors = [(x, side) for x, side in zip(columns, sides, strict=True) if _is_dtensor(x)]
    return any(_mesh_dim(x, _dim(side)) is not None for x, side in dtensors)


def shards(
    student: Any,
    teacher: Any,
    group: Any,
    vocab_size: int | None,
    backend: str | None,
    chunk_bytes: int | None,
) -> Shards:
    """Take the columns that lie here.

    Raises:
        ValueError: the two sides are split differently, over other groups, or ``vocab_size`` is
            larger than what there is; a head of some rows of its weight.
        TypeError: ``group`` is none.
    """
    check_group(group)
    for name, side in (("student", student), ("teacher", teacher)):
        if isinstance(side, LMHead) and side.ids is not None:
            raise ValueError(
                f"{name}.ids with a vocabulary that is split over a group: expected None. Give "
                "each rank the rows of the weight that are its columns."
            )
    sides = [x for x in (student, teacher) if x is not None and not isinstance(x, SparseTeacher)]
    groups = [found for x in sides if (found := _group_of(x)) is not None]
    groups += [group] if group is not None else []
    if any(
        dist.get_process_group_ranks(g) != dist.get_process_group_ranks(groups[0]) for g in groups
    ):
        raise ValueError(
            "the student's vocabulary, the teacher's and group= name different process groups: "
            "expected the same ranks for all of them."
        )
    split = _split(sides, groups[0])
    size = split.total if vocab_size is None else vocab_size
    if not 1 <= size <= split.total:
        raise ValueError(
            f"vocab_size={vocab_size}: expected 1 to {split.total}, the columns on all ranks."
        )
    local_student = _here(student, split, groups[0], summed=True)
    device = _columns(local_student).device
    budget = max(1, chunk_budget(chunk_bytes, device, shared=True) // 2)
    part = Part(min(split.offset, size), max(0, min(split.columns, size - split.offset)))
    return Shards(
        local_student,
        _here(teacher, split, groups[0], summed=False),
        size,
        GroupRows(backend, device, groups[0], part, split.widest, budget),
        budget,
        split.widest,
    )


def check_group(group: Any) -> None:
    """Raise unless ``group`` is a group of processes with this one among them, or None.

    Raises:
        TypeError: no group.
        ValueError: this process is not in it.
    """
    if group is None:
        return
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not one of its members, so it has no part of it.")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}: expected a torch.distributed.ProcessGroup, such "
            "as new_group() returns, or None."
        )
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is not one of its members, so it has no part of it.")


# ----------------------------------------------------------------------------------------------
# What lies here


def _columns(side: Any) -> Any:
    """The tensor that has a vocabulary."""
    return side.weight if isinstance(side, LMHead) else side


def _dim(side: Any) -> int:
    """Which of its dimensions that is."""
    return 0 if isinstance(side, LMHead) else -1


def _is_dtensor(x: Any) -> bool:
    """Without importing DTensor, which takes as long as half of torch."""
    return type(x) is not Tensor and isinstance(x, Tensor) and hasattr(x, "placements")


def _mesh_dim(tensor: Any, dim: int) -> int | None:
    """The dimension of the device mesh over which ``dim`` is sharded, if any."""
    if not _is_dtensor(tensor):
        return None
    found = [i for i, p in enumerate(tensor.placements) if p.is_shard(dim % tensor.dim())]
    if len(found) > 1:
        raise ValueError(
            f"a vocabulary is sharded over {len(found)} mesh dimensions {tensor.placements}: "
            "expected one."
        )
    return found[0] if found else None


def _group_of(side: Any) -> Any:
    tensor = _columns(side)
    dim = _mesh_dim(tensor, _dim(side))
    return None if dim is None else tensor.device_mesh.get_group(dim)


def _split(sides: list[Any], group: Any) -> _Split:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if all(_group_of(side) is not None for side in sides):
        # torch shards as torch.chunk does: nothing to ask the others
        totals = [_columns(side).shape[_dim(side)] for side in sides]
        sizes = [
            [max(0, min(-(-total // world), total - r * -(-total // world))) for total in totals]
            for r in range(world)
        ]
    else:
        local = [_local(_columns(side)) for side in sides]
        here = [x.shape[_dim(side)] for x, side in zip(local, sides, strict=True)]
        mine = torch.tensor(here, device=local[0].device)
        everyone = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(everyone, mine, group=group)
        sizes = torch.stack(everyone).tolist()
    student = [size[0] for size in sizes]
    if any(size[-1] != size[0] for size in sizes):
        raise ValueError(
            f"the ranks hold {student} of the student's columns and {[s[-1] for s in sizes]} of "
            "the teacher's: expected both to be split alike. Redistribute one of them, or pad it."
        )
    return _Split(sum(student[:rank]), student[rank], sum(student), max(1, *student))


def _local(tensor: Any) -> Any:
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _here(side: Any, split: _Split, group: Any, summed: bool) -> Any:
    """The side as plain tensors; a rank without columns gets one that does not count."""
    if side is None or isinstance(side, SparseTeacher):
        return side
    if not isinstance(side, LMHead):
        logits = _local(side)
        return logits if split.columns else F.pad(logits, (0, 1))
    weight, bias = _local(side.weight), _local(side.bias)
    if not split.columns:
        weight = F.pad(weight, (0, 0, 0, 1))
        bias = None if bias is None else F.pad(bias, (0, 1))
    hidden = _replicated(side.hidden, _mesh_dim(side.weight, 0))
    if summed and hidden.requires_grad:
        hidden = _SumGradient.apply(hidden, group)
    return LMHead(hidden, weight, bias, side.logit_scale, side.softcap)


def _replicated(hidden: Any, mesh_dim: int | None) -> Any:
    """All tokens of the hidden states, as every rank of the group needs them."""
    if not _is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import Replicate

    whole = [
        Replicate() if i == mesh_dim or mesh_dim is None else placement
        for i, placement in enumerate(hidden.placements)
    ]
    return hidden.redistribute(placements=whole).to_local(grad_placements=whole)


class _SumGradient(torch.autograd.Function):
    """The identity; the gradients that the ranks' columns give are added up. In fp32: what one
    rank's columns give may be much larger than the sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None
