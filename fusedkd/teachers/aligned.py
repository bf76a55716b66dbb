"""A teacher with another tokenizer than its student's, as a function of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fusedkd import LMHead
from fusedkd.alignment import pad_spans, shared_vocabulary
from fusedkd.cache.keys import tokenizer_hash
from fusedkd.cache.reader import TeacherCache
from fusedkd.data.two_templates import CONVERSATION, Reading
from fusedkd.models.kinds import vocabulary_size
from fusedkd.models.live import LiveTeacher
from fusedkd.teachers.cached import Answers, datasets_of, sequences_of
from fusedkd.teachers.served import ServedTeacher

_IDS, _MASK = "teacher_input_ids", "teacher_attention_mask"
_STUDENT, _TEACHER = "student_spans", "teacher_spans"
_STATES, _LOG_PROBS = "teacher_states", "teacher_log_probs"
KEYS = (_IDS, _MASK, _STUDENT, _TEACHER, _STATES, _LOG_PROBS)


class Aligned(NamedTuple):
    """A teacher's answers to its own tokens of the same text."""

    side: Tensor | LMHead | None  # (B, L', ...)
    log_probs: Tensor | None  # (B, L') of the labels; there is this or a side
    labels: Tensor  # (B, L') the token after each; -100 where it is in no span
    student_spans: Tensor  # (B, M, 2) of positions whose answers are about the same bytes; or -1
    teacher_spans: Tensor
    student_ids: Tensor | None  # (V',) the shared vocabulary; None: all of it, in the same order
    teacher_ids: Tensor | None


class AlignedTeacher:
    """A teacher with a tokenizer of its own: a model that runs here, a cache of its hidden states,
    or a cache or a server that says of each token how probable it was.

    Args:
        teacher: see above; the model as a function of what it reads. Others are asked about the
            teacher's own ids of each row (:class:`fusedkd.data.two_templates.Reading`).
        student: whose vocabulary it shares some of.
        student_tokenizer, teacher_tokenizer: see :func:`fusedkd.alignment.byte_offsets`.
        kind: ``cross_tokenizer`` of the run.

    Raises:
        TypeError: a tokenizer of which nobody knows which bytes its tokens stand for.
        ValueError: the teacher does not tell what ``kind`` compares, or that needs a shared
            vocabulary, and they share no token.
        CacheError, TeacherError: a cache, or a server, of another tokenizer than the teacher's.
    """

    def __init__(
        self,
        teacher: LiveTeacher | Answers,
        student: nn.Module,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        kind: str,
    ) -> None:
        self.teacher = teacher
        if not isinstance(teacher, LiveTeacher):
            _check_answers(teacher, kind)
            teacher.check_tokenizer(tokenizer_hash(teacher_tokenizer))
        self.reading = Reading(student_tokenizer, teacher_tokenizer, _longest(teacher))
        self._ids: tuple[Tensor | None, Tensor | None] = (None, None)
        if kind == "alm":
            return
        ids = shared_vocabulary(student_tokenizer, teacher_tokenizer)
        if not len(ids[0]):
            raise ValueError(
                f"cross_tokenizer={kind!r}: the two tokenizers share no token: expected 'alm'."
            )
        sizes = vocabulary_size(student), _columns(teacher)
        whole = all(torch.equal(x, torch.arange(n)) for x, n in zip(ids, sizes, strict=True))
        self._ids = (None, None) if whole else ids

    @property
    def model(self) -> nn.Module | None:
        """The one that runs here."""
        return self.teacher.model if isinstance(self.teacher, LiveTeacher) else None

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
        return rest, {name: inputs[name] for name in KEYS if name in inputs}

    def __call__(self, read: dict[str, Any]) -> Aligned:
        """The teacher's answers to its part of a batch."""
        ids, mask = read[_IDS], read[_MASK]
        spans = read[_TEACHER]
        labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], 1)
        labels = labels.masked_fill(~_within(spans, ids.shape[1]), -100)
        side: Tensor | LMHead | None = None
        if isinstance(self.teacher, LiveTeacher):
            side = self.teacher({"input_ids": ids, "attention_mask": mask})
        elif _STATES in read:
            assert isinstance(self.teacher, TeacherCache)
            head = self.teacher.head(ids.device)
            side = replace(head, hidden=read[_STATES].to(head.weight.dtype))
        if self._ids[0] is not None and self._ids[0].device != ids.device:
            self._ids = tuple(x.to(ids.device) for x in self._ids)  # type: ignore[union-attr, assignment]
        return Aligned(side, read.get(_LOG_PROBS), labels, read[_STUDENT], spans, *self._ids)

    def check(self, tokenizer: Any, **datasets: Any) -> None:
        """Look up what a cache, or a server, is to be asked of those data sets that are on disk or
        in memory.

        Raises:
            CacheError, TeacherError: sequences that are not there, or that are too long.
        """
        if isinstance(self.teacher, LiveTeacher):
            return
        for name, data in datasets_of(datasets):
            self.teacher.check_rows(name, self._told(data))

    def _told(self, data: Any) -> Iterator[list[int]]:
        count = len(data)
        made = data[CONVERSATION] if CONVERSATION in data.column_names else [None] * count
        for ids, conversation in zip(sequences_of(data), made, strict=True):
            yield self.reading(ids.tolist(), conversation).ids

    def collator(self, collate: Callable[..., Any]) -> Callable[..., Any]:
        """``collate``, with each row's text read to the teacher's tokenizer, the spans, and what a
        cache or a server says about it."""
        teacher = None if isinstance(self.teacher, LiveTeacher) else self.teacher
        return _Collator(collate, self.reading, teacher)


def _check_answers(teacher: Answers, kind: str) -> None:
    """
    Raises:
        ValueError: they are not those that are compared.
    """
    hidden = isinstance(teacher, TeacherCache) and teacher.hidden
    if hidden or (teacher.actual and kind == "alm"):
        return
    of, remedy = (
        (f"the cache {teacher.folder}", "fusedkd cache --student_tokenizer with --actual")
        if isinstance(teacher, TeacherCache)
        else (f"the server {teacher.service.urls[0]}", "Service(top_k=0)")
    )
    lacks = (
        f"{of} gives {teacher.layout.policy}, which does not tell how probable each token that is "
        f"there was: expected {remedy}"
        if kind == "alm"
        else f"{of} gives {teacher.layout.policy}, no distributions over the shared vocabulary: "
        "expected 'alm', a model that runs here"
    )
    raise ValueError(
        f"cross_tokenizer={kind!r}: {lacks}, or a cache of hidden states (fusedkd cache "
        "--student_tokenizer with --hidden bf16 or int8)."
    )


def _longest(teacher: LiveTeacher | Answers) -> int | None:
    """Where the teacher's rows are cut. A cache has them as they were cached: whole."""
    if isinstance(teacher, TeacherCache):
        return None
    if isinstance(teacher, ServedTeacher):
        return teacher.served.most_tokens
    return context(teacher.model)


def context(model: Any) -> int | None:
    """How many tokens a model, or its config, says that it reads at most."""
    config = getattr(model, "config", model)
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def told(rows: Dataset, reading: Reading) -> Dataset:
    """Rows of the student's ids as ``input_ids`` of the teacher's."""

    def tell(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"input_ids": reading(row["input_ids"], row.get(CONVERSATION)).ids}

    names = rows.column_names
    return rows.map(tell, remove_columns=names, desc="Reading", load_from_cache_file=False)


def _columns(teacher: LiveTeacher | Answers) -> int:
    if isinstance(teacher, LiveTeacher):
        return vocabulary_size(teacher.model)
    assert isinstance(teacher, TeacherCache)
    return teacher.manifest.padded_vocab_size


def _within(spans: Tensor, length: int) -> Tensor:
    """(B, L) which positions lie in some of the spans (B, M, 2), which do not overlap."""
    steps = torch.zeros(len(spans), length + 1, dtype=torch.int64, device=spans.device)
    there = (spans[..., 0] >= 0).long()
    for end, sign in ((0, 1), (1, -1)):
        steps.scatter_add_(1, spans[..., end].clamp(min=0), sign * there)
    return steps.cumsum(1)[:, :-1] > 0


class _Collator:
    """Picklable."""

    def __init__(
        self, collate: Callable[..., Any], reading: Reading, teacher: Answers | None
    ) -> None:
        self.collate, self.reading, self.teacher = collate, reading, teacher

    def __call__(self, features: Any) -> Any:
        made = [None] * len(features)
        if features and CONVERSATION in features[0]:
            features = [dict(row) for row in features]  # no collator knows the column
            made = [row.pop(CONVERSATION) for row in features]
        batch = self.collate(features)
        if batch.get("position_ids") is not None:
            raise ValueError(
                "cross_tokenizer with several texts in a row: expected --packing blocks or none."
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        there = torch.ones_like(ids) if mask is None else mask
        rows, ours, theirs = [], [], []
        for row, real, conversation in zip(ids, there.bool(), made, strict=True):
            told = self.reading(row[real].tolist(), conversation)
            # a token is told at the position before it, and the first of a sequence nowhere
            kept = (told.student_spans[:, 0] > 0) & (told.teacher_spans[:, 0] > 0)
            first = int(real.long().argmax())
            rows.append(torch.tensor(told.ids, dtype=torch.int64))
            ours.append(told.student_spans[kept] - 1 + first)
            theirs.append(told.teacher_spans[kept] - 1)
        batch[_IDS] = pad_sequence(rows, batch_first=True)
        batch[_MASK] = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch[_STUDENT], batch[_TEACHER] = pad_spans(ours), pad_spans(theirs)
        if self.teacher is not None:
            name, answers = _answers(self.teacher, rows)
            batch[name] = pad_sequence(answers, batch_first=True)
        return batch


def _answers(teacher: Answers, rows: list[Tensor]) -> tuple[str, list[Tensor]]:
    """What is known of each row's tokens, and its name in a batch."""
    asked = [row.numpy() for row in rows]
    if isinstance(teacher, TeacherCache) and teacher.hidden:
        return _STATES, [teacher.states(ids) for ids in asked]
    return _LOG_PROBS, list(map(torch.from_numpy, teacher.log_probs_of(asked)))
