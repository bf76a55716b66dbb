"""A teacher with another tokenizer than its student's, as a function of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedkd import LMHead
from fusedkd.alignment import Retelling, pad_spans, shared_vocabulary
from fusedkd.models.kinds import vocabulary_size
from fusedkd.models.live import LiveTeacher

_IDS, _MASK = "teacher_input_ids", "teacher_attention_mask"
_STUDENT, _TEACHER = "student_spans", "teacher_spans"
KEYS = (_IDS, _MASK, _STUDENT, _TEACHER)


class Aligned(NamedTuple):
    """A teacher's answers to its own tokens of the same text."""

    side: Tensor | LMHead  # (B, L', ...)
    labels: Tensor  # (B, L') the token after each; -100 where it is in no span
    student_spans: Tensor  # (B, M, 2) of positions whose answers are about the same bytes; or -1
    teacher_spans: Tensor
    student_ids: Tensor | None  # (V',) the shared vocabulary; None: all of it, in the same order
    teacher_ids: Tensor | None


class AlignedTeacher:
    """A model with a tokenizer of its own.

    Args:
        live: the model, as a function of what it reads.
        student: whose vocabulary it shares some of.
        student_tokenizer, teacher_tokenizer: see :func:`fusedkd.alignment.byte_offsets`.

    Raises:
        TypeError: a tokenizer of which nobody knows which bytes its tokens stand for.
        ValueError: they share no token.
    """

    def __init__(
        self, live: LiveTeacher, student: nn.Module, student_tokenizer: Any, teacher_tokenizer: Any
    ) -> None:
        self.live, self.model = live, live.model
        config: Any = live.model.config
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.retelling = Retelling(student_tokenizer, teacher_tokenizer, longest)
        ids = shared_vocabulary(student_tokenizer, teacher_tokenizer)
        if not len(ids[0]):
            raise ValueError(
                "the two tokenizers share no token: expected cross_tokenizer='alm', and tokenizers "
                "of the same script."
            )
        sizes = vocabulary_size(student), vocabulary_size(live.model)
        whole = all(torch.equal(x, torch.arange(n)) for x, n in zip(ids, sizes, strict=True))
        self._ids: tuple[Tensor | None, Tensor | None] = (None, None) if whole else ids

    @property
    def shared(self) -> int:
        """How many tokens both vocabularies have."""
        ids = self._ids[0]
        return vocabulary_size(self.model) if ids is None else len(ids)

    def take(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A batch as what the student reads, and what was added for the teacher.

        Raises:
            ValueError: nothing was.
        """
        if _IDS not in inputs:
            raise ValueError(
                "the batch has no tokens of the teacher's: make it with trainer.data_collator, "
                "which reads the text to both tokenizers."
            )
        rest = {name: value for name, value in inputs.items() if name not in KEYS}
        return rest, {name: inputs[name] for name in KEYS}

    def __call__(self, read: dict[str, Any]) -> Aligned:
        """The teacher's answers to its part of a batch."""
        ids, mask = read[_IDS], read[_MASK]
        spans = read[_TEACHER]
        labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], 1)
        labels = labels.masked_fill(~_within(spans, ids.shape[1]), -100)
        side = self.live({"input_ids": ids, "attention_mask": mask})
        if self._ids[0] is not None and self._ids[0].device != ids.device:
            self._ids = tuple(x.to(ids.device) for x in self._ids)  # type: ignore[union-attr, assignment]
        return Aligned(side, labels, read[_STUDENT], spans, *self._ids)

    def check(self, tokenizer: Any, **datasets: Any) -> None:
        """Nothing of the data is known before they come."""

    def collator(self, collate: Callable[..., Any]) -> Callable[..., Any]:
        """``collate``, with each row's text read to the teacher's tokenizer, and the spans."""
        return _Collator(collate, self.retelling)


def _within(spans: Tensor, length: int) -> Tensor:
    """(B, L) which positions lie in some of the spans (B, M, 2), which do not overlap."""
    steps = torch.zeros(len(spans), length + 1, dtype=torch.int64, device=spans.device)
    there = (spans[..., 0] >= 0).long()
    for end, sign in ((0, 1), (1, -1)):
        steps.scatter_add_(1, spans[..., end].clamp(min=0), sign * there)
    return steps.cumsum(1)[:, :-1] > 0


class _Collator:
    """Picklable."""

    def __init__(self, collate: Callable[..., Any], retelling: Retelling) -> None:
        self.collate, self.retelling = collate, retelling

    def __call__(self, features: Any) -> Any:
        batch = self.collate(features)
        if batch.get("position_ids") is not None:
            raise ValueError(
                "cross_tokenizer with several texts in a row: expected --packing blocks or none."
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        there = torch.ones_like(ids) if mask is None else mask
        rows, ours, theirs = [], [], []
        for row, real in zip(ids, there.bool(), strict=True):
            told = self.retelling(row[real].tolist())
            # a token is told at the position before it, and the first of a sequence nowhere
            kept = (told.student_spans[:, 0] > 0) & (told.teacher_spans[:, 0] > 0)
            first = int(real.long().argmax())
            rows.append(torch.tensor(told.ids, dtype=torch.int64))
            ours.append(told.student_spans[kept] - 1 + first)
            theirs.append(told.teacher_spans[kept] - 1)
        pad = torch.nn.utils.rnn.pad_sequence
        batch[_IDS] = pad(rows, batch_first=True)
        batch[_MASK] = pad([torch.ones_like(row) for row in rows], batch_first=True)
        batch[_STUDENT], batch[_TEACHER] = pad_spans(ours), pad_spans(theirs)
        return batch
