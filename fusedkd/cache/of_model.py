"""What the cache of a model is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import nn
from torch.distributed.tensor import DTensor

from fusedkd.cache.build import NO_HEAD, Ids, Job
from fusedkd.cache.errors import CacheError
from fusedkd.cache.hidden import layout_of
from fusedkd.cache.keys import tokenizer_hash, weight_hash
from fusedkd.cache.policy import Policy
from fusedkd.cache.writer import SHARD_BYTES
from fusedkd.distributions import LMHead
from fusedkd.models.kinds import vocabulary_size
from fusedkd.models.live import LiveTeacher
from fusedkd.models.proof import is_partitioned


def job_of(
    run: LiveTeacher,
    tokenizer: Any,
    sequences: Sequence[Ids],
    policy: Policy,
    temperatures: tuple[float, ...] = (1.0,),
    *,
    name: str,
    vocab_size: int | None = None,
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
) -> Job:
    """
    Args:
        run: the teacher.
        sequences: token ids, without padding; those of one length beside each other.
        policy: of hidden states with any ``k``.
        temperatures: that the cache serves.
        name: of the teacher, for the record.
        vocab_size: entries with an id; None: the tokenizer's.
        batch_size, shard_bytes: of the job.

    Raises:
        CacheError: a number out of range, or hidden states of a teacher without a plain head.
    """
    model: Any = run.model
    columns = vocabulary_size(model)
    size = min(len(tokenizer), columns) if vocab_size is None else vocab_size
    if not 2 <= size <= columns:
        raise CacheError(
            f"--vocab-size {size}: expected 2 to {columns}, the columns of the teacher's logits."
        )
    facts = {
        "teacher": name,
        "teacher_hash": weight_hash(_weights(model)),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "padded_vocab_size": columns,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    head = None
    if policy.hidden:
        head = _head(run)
        policy = replace(policy, k=head.weight.shape[1])
        facts["padded_vocab_size"] = head.weight.shape[0]
    layout = layout_of(policy, size, temperatures)
    return Job(sequences, layout, facts, batch_size, shard_bytes, head)


def check_whole(teacher: nn.Module) -> None:
    """
    Raises:
        CacheError: several processes have it in parts, and would be given other sequences each.
    """
    if any(isinstance(x, DTensor) or is_partitioned(x) for x in teacher.parameters()):
        raise CacheError(
            f"the teacher {type(teacher).__name__} lies in parts on the group's processes, which "
            "would each run other sequences: expected a whole one in each. `fusedkd cache "
            "--teacher_tp` caches one that is spread."
        )


def sequences_of(rows: Any) -> list[np.ndarray]:
    """The token ids of rows, short ones first: of a list or tensor of ids, of rows that have
    ``input_ids`` and perhaps an ``attention_mask`` (places with 0 are left out), or of a batch of
    these, as tokenizers give it."""
    if isinstance(rows, Mapping):
        names = [name for name in ("input_ids", "attention_mask") if name in rows]
        parts: Iterable[Any] = zip(*(rows[name] for name in names), strict=True)
        rows = (dict(zip(names, values, strict=True)) for values in parts)
    return sorted(map(_ids, rows), key=len)


def _ids(row: Any) -> np.ndarray:
    if not isinstance(row, Mapping):
        return np.asarray(row, dtype=np.int64)
    ids = np.asarray(row["input_ids"], dtype=np.int64)
    mask = row.get("attention_mask")
    return ids if mask is None else ids[np.asarray(mask, dtype=bool)]


def _head(run: LiveTeacher) -> LMHead:
    """
    Raises:
        CacheError: it has none that is plain.
    """
    device = next(run.model.parameters()).device
    answers = run({"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=device)})
    if not isinstance(answers, LMHead):
        raise CacheError(NO_HEAD)
    return answers


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Also those that a device map has put on the disk."""
    named = model.state_dict()
    if any(tensor.is_meta for tensor in named.values()):
        found = get_state_dict_offloaded_model(model)
        named = {name: found[name] for name in named}
    yield from named.items()
