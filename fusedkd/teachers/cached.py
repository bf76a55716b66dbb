"""A teacher that does not run here: a cache of its answers, or a server that gives them, as a
function from a batch to its distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fusedkd import LMHead, SparseTeacher
from fusedkd.cache.keys import tokenizer_hash
from fusedkd.cache.reader import TeacherCache
from fusedkd.divergences import Divergence
from fusedkd.models.columns import spans
from fusedkd.models.kinds import vocabulary_size
from fusedkd.teachers.served import ServedTeacher

_INDICES, _LOG_PROBS, _ENTROPY = "teacher_indices", "teacher_log_probs", "teacher_entropy"
_STATES = "teacher_states"


Answers = TeacherCache | ServedTeacher


class CachedTeacher:
    """A cache, or a server, as a function from a batch to a :class:`fusedkd.SparseTeacher`, or from
    hidden states to an :class:`fusedkd.LMHead`.

    The answers are looked up where the batch is made (:meth:`collator`), so in the data loader's
    workers if it has some, and travel to the device with the rest of it. A server can also be asked
    when they are needed.

    Args:
        cache: see there, or :class:`fusedkd.teachers.ServedTeacher`.
        divergence, temperature: of the loss; the temperature is the teacher's.
        tail: what becomes of the mass outside the entries that were kept. Draws have none.

    Raises:
        CacheError: the cache cannot serve this loss.
        ValueError: a tail is given, and the cache has draws or hidden states.
    """

    def __init__(
        self, cache: Answers, divergence: Divergence, temperature: float, tail: str
    ) -> None:
        cache.check_loss(divergence, temperature)
        self.cache, self.temperature = cache, temperature
        self.hidden = isinstance(cache, TeacherCache) and cache.hidden
        whole = cache.sampled or self.hidden
        if whole and tail not in ("bucket", "drop"):  # the default, and what draws have
            raise ValueError(
                f"teacher_tail={tail!r}: the cache {cache.folder} has draws or hidden states, "
                "which stand for the whole vocabulary: expected none."
            )
        self.tail = "drop" if cache.sampled else tail
        self.resident = True  # whether a head stays on the device, or is copied there for each call
        self._head: LMHead | None = None

    def __call__(self, inputs: dict[str, Any]) -> SparseTeacher | LMHead:
        """Take the answers out of the batch."""
        if _STATES in inputs:
            return self._of_states(inputs.pop(_STATES))
        if _INDICES not in inputs and isinstance(self.cache, ServedTeacher):
            inputs.update(self.answered(inputs))
        if _INDICES not in inputs:
            raise ValueError(
                "the batch has no answers of the teacher: make it with trainer.data_collator, "
                "which looks them up in the cache."
            )
        indices, log_probs = inputs.pop(_INDICES), inputs.pop(_LOG_PROBS)
        return SparseTeacher(indices, log_probs, self.tail, inputs.pop(_ENTROPY, None))

    def _of_states(self, states: Tensor) -> LMHead:
        """With the head, which is read and sent to the device once, in its dtype."""
        assert isinstance(self.cache, TeacherCache)
        device = states.device if self.resident else torch.device("cpu")
        if self._head is None or self._head.weight.device != device:
            read = self.cache.head()
            bias = None if read.bias is None else read.bias.to(device)
            self._head = replace(read, weight=read.weight.to(device), bias=bias)
        return replace(self._head, hidden=states.to(self._head.weight.dtype))

    def collator(self, collate: Callable[..., Any]) -> Callable[..., Any]:
        """``collate``, with the teacher's answers added to the batch."""
        return _Collator(collate, self.cache, self.temperature)

    def answered(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the answers, which are looked up now unless it has them."""
        if _INDICES in batch or _STATES in batch:
            return dict(batch)
        names = ("input_ids", "attention_mask", "position_ids")
        found = self.collator(dict)({k: batch[k].cpu() for k in names if batch.get(k) is not None})
        device = batch["input_ids"].device
        answers = [x for x in (_INDICES, _LOG_PROBS, _ENTROPY, _STATES) if x in found]
        return {**batch, **{name: found[name].to(device) for name in answers}}

    def vocabulary(self, student: Any, given: int | None) -> int | None:
        """How many of the student's columns are real; None: all of them.

        Raises:
            ValueError: the student has fewer than the teacher, or ``given`` is another number.
        """
        size = self.cache.layout.vocab_size
        columns = vocabulary_size(student)
        if self.hidden and given is None and columns == self._padded():
            return None  # as with the model itself
        if given not in (None, size):
            raise ValueError(f"vocab_size={given}: the cache {self.cache.folder} has {size:,}.")
        if columns < size:
            raise ValueError(
                f"the student's vocabulary has {columns:,} entries and the one of the cache "
                f"{self.cache.folder} {size:,}: distillation by token needs one tokenizer."
            )
        return None if columns == size else size

    def _padded(self) -> int:
        assert isinstance(self.cache, TeacherCache)
        return self.cache.manifest.padded_vocab_size

    def check(self, tokenizer: Any, **datasets: Any) -> None:
        """Compare the tokenizer, and look up every sequence of those data sets that are on disk or
        in memory.

        Raises:
            CacheError: another tokenizer, or sequences that are not in the cache.
        """
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            self.cache.check_tokenizer(tokenizer_hash(tokenizer))
        for name, data in datasets_of(datasets):
            self.cache.check_rows(name, sequences_of(data))


def datasets_of(given: Mapping[str, Any]) -> Iterator[tuple[str, Dataset]]:
    """Those that are on disk or in memory, with the name of what they are for."""
    for name, data in given.items():
        for part in data.values() if isinstance(data, dict) else [data]:
            if isinstance(part, Dataset):
                yield name, part


def sequences_of(data: Dataset) -> Iterator[np.ndarray]:
    """What a teacher is asked about: their ids, without padding."""
    names = ("input_ids", "attention_mask", "position_ids")
    rows = data.select_columns([name for name in names if name in data.column_names])
    for row in rows.with_format("torch"):
        for span in spans({name: values[None] for name, values in row.items()}, 0):
            yield row["input_ids"][span].numpy()


class _Collator:
    """Picklable, for data loaders that start their workers afresh."""

    def __init__(self, collate: Callable[..., Any], cache: Answers, t: float) -> None:
        self.collate, self.cache, self.temperature = collate, cache, t

    def __call__(self, features: Any) -> Any:
        batch = self.collate(features)
        ids = batch["input_ids"].numpy()
        pieces = [(row, span.numpy()) for row in range(len(ids)) for span in spans(batch, row)]
        if isinstance(self.cache, TeacherCache) and self.cache.hidden:
            states = torch.zeros(*ids.shape, self.cache.layout.k, dtype=torch.bfloat16)
            for row, span in pieces:
                states[row, span] = self.cache.states(ids[row, span])
            batch[_STATES] = states
            return batch
        found = self.cache.get_many([ids[row, span] for row, span in pieces], self.temperature)
        width = max((target.ids.shape[1] for target in found), default=0)
        indices = np.full((*ids.shape, width), -1, np.int32)
        log_probs = np.full((*ids.shape, width), -np.inf, np.float32)
        entropy = np.zeros(ids.shape, np.float32)  # of the whole teacher, at T = 1
        for (row, span), target in zip(pieces, found, strict=True):
            indices[row, span, : target.ids.shape[1]] = target.ids
            log_probs[row, span, : target.ids.shape[1]] = target.log_probs
            entropy[row, span] = target.entropy
        batch[_INDICES] = torch.from_numpy(indices)
        batch[_LOG_PROBS] = torch.from_numpy(log_probs)
        if self.temperature == 1 and not np.isnan(entropy).any():
            batch[_ENTROPY] = torch.from_numpy(entropy)
        return batch
