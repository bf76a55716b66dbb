"""The most probable tokens of a distribution, and the mass of all others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fusedkd import token_rows
from fusedkd.checks import check_device, check_tensor, check_whole
from fusedkd.distributions import LMHead, lone_side
from fusedkd.log_probs import CheckedTokens, TokenRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TopK(NamedTuple):
    """What :func:`top_k` gives: constants, without a graph."""

    indices: Tensor  # (..., k + A) int64, the k most probable first; -1: none
    log_probs: Tensor  # (..., k + A) nats; -inf where there is no index
    tail_log_mass: Tensor  # (...,) log of the probability of all others together


@torch._disable_dynamo
def top_k(
    logits: Tensor | LMHead,
    k: int,
    *,
    temperature: float = 1.0,
    also: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TopK:
    """The k most probable tokens of ``softmax(logits / temperature)``, from logits or a head.

    ``SparseTeacher(top.indices, top.log_probs)`` is then a teacher. The mass outside is summed up
    as it is, not as 1 less the others', so it is right however small. Breaks torch.compile's graph.

    Args:
        logits: (..., V) fp64, fp32, bf16 or fp16, or a head, whose logits never exist in full and
            are multiplied once.
        k: 1 to the size of the vocabulary.
        temperature: T, at most 1000 (fp64: 1e6).
        also: (..., A) int64 or int32 ids that have to be among the columns, -1: none. One that is
            there already is -1 in its own column.
        mask: (...,) bool; rows outside are not multiplied: their ids are -1.
        vocab_size, chunk_bytes, group, backend: as in :func:`fusedkd.token_log_probs`.

    Returns:
        Of equally probable tokens the smaller id comes first. Tokens of probability 0 are left out
        (-1). fp32 (fp64 for fp64 logits). A row that holds NaN has NaN log-probabilities.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected and the remedy.
        RuntimeError: the backend cannot run here.
    """
    side = lone_side("logits", logits, 0)
    leading = side.leading
    if also is None:
        also = torch.empty((*leading, 0), dtype=torch.int64, device=side.tensor.device)
    elif check_tensor("also", also).dim() != len(leading) + 1:
        raise ValueError(
            f"also has shape {tuple(also.shape)}: expected {(*leading, 'A')}, ids beside those of "
            "each row (labels: labels[..., None])."
        )
    call = TokenRequest(
        logits, also, temperature, False, -1, vocab_size, chunk_bytes, group, backend
    ).checked()
    check_whole("k", k, 1)
    if k > call.spec.vocab_size:
        raise ValueError(f"k={k}: expected 1 to {call.spec.vocab_size}, the vocabulary.")
    counts = _counts(mask, call)
    ids = _once(call.inputs.tokens.masked_fill(~counts[:, None], -1))
    with torch.no_grad():
        inputs = call.inputs._replace(tokens=ids, counts=counts)
        return _result(token_rows.top(inputs, call.spec, k), ids, call, counts)


def _counts(mask: Tensor | None, call: CheckedTokens) -> Tensor:
    if mask is None:
        return torch.ones_like(call.inputs.counts)
    if check_tensor("mask", mask).dtype != torch.bool or mask.shape != call.leading:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: expected torch.bool of shape "
            f"{tuple(call.leading)}."
        )
    check_device("mask", mask, "logits", call.inputs.student)
    return mask.reshape(-1).contiguous()


def _once(ids: Tensor) -> Tensor:
    """Each id of a row once; -1 in place of the others."""
    if ids.shape[1] < 2:
        return ids
    ordered, order = ids.sort(dim=-1, stable=True)
    twice = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return ids.masked_fill(torch.zeros_like(twice).scatter(1, order, twice), -1)


def _result(top: token_rows.Top, also: Tensor, call: CheckedTokens, counts: Tensor) -> TopK:
    most, total, outside = top.statistics[:, :3].unbind(-1)
    normalizer = (most + total.log())[:, None]
    known = (also[:, :, None] == top.ids[:, None]).any(-1) | (also < 0)
    nan = (total.isnan() & counts)[:, None]
    first = torch.arange(top.ids.shape[1], device=also.device).expand_as(top.ids)
    ids = torch.cat([torch.where(nan, first, top.ids), also.masked_fill(known, -1)], 1)
    z = torch.cat([top.values, top.statistics[:, 3:]], 1)
    found = (z - normalizer).clamp(max=0).masked_fill((ids < 0) & ~nan, -math.inf)
    tail = (outside / total).log().masked_fill(~counts, 0.0)
    shape = (*call.leading, ids.shape[1])
    return TopK(
        ids.view(shape), found.to(call.dtype).view(shape), tail.to(call.dtype).view(call.leading)
    )
