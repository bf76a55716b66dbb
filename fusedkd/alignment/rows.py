"""A row of the student's tokens as the teacher's tokens of the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.alignment.offsets import byte_offsets
from fusedkd.alignment.spans import align
from fusedkd.alignment.spelling import spelling
from fusedkd.alignment.vocabulary import shared_special

OUTSIDE = (-1, -1)


class Retold(NamedTuple):
    """What :class:`Retelling` makes of a row."""

    ids: list[int]  # the teacher's
    student_spans: Tensor  # (M, 2)
    teacher_spans: Tensor  # (M, 2)


class Retelling:
    """Reads rows of one tokenizer's ids to another, by their bytes: whatever made the rows (text,
    conversations, blocks cut within a word or a character), both models get the same text.

    Special tokens become those of the same role. One that the teacher has not, as of a chat
    template, it reads as ordinary text, and no span goes over it; BOS, EOS, ... of the student's
    alone are left out.

    Args:
        student_tokenizer, teacher_tokenizer: as for :func:`fusedkd.alignment.byte_offsets`.
        max_length: tokens that the teacher reads at most; None: all.
    """

    def __init__(
        self, student_tokenizer: Any, teacher_tokenizer: Any, max_length: int | None = None
    ) -> None:
        self.student, self.teacher = student_tokenizer, teacher_tokenizer
        self.max_length = max_length
        ours, theirs = spelling(student_tokenizer), spelling(teacher_tokenizer)
        self._special = shared_special(ours, theirs)
        first = teacher_tokenizer("")["input_ids"][:1]
        self._begin = [x for x in first if x in (theirs.roles.get("bos"), theirs.roles.get("cls"))]

    def __call__(self, ids: Sequence[int]) -> Retold:
        """One row, without its padding.

        Raises:
            ValueError: WordPiece or WordLevel ids that no text becomes.
        """
        known, row = spelling(self.student), list(ids)
        offsets: list[tuple[int, int]] = []
        told: list[int] = []
        theirs: list[tuple[int, int]] = []
        at = 0
        if row and self._special.get(row[0]) not in self._begin:
            told, theirs = list(self._begin), [(0, 0)] * len(self._begin)
        for special, group in groupby(row, known.special.__contains__):
            if not special:
                own, data = self._bytes(list(group), at)
                offsets += own
                for start, text in texts(data):
                    self._tell(text, at + start, told, theirs)
                at += len(data)
                continue
            for number in group:
                counterpart = self._special.get(number)
                if counterpart is not None:
                    offsets.append((at, at + 1))  # one of its own is as good as a byte
                    told.append(counterpart)
                    theirs.append((at, at + 1))
                    at += 1
                elif number in known.roles.values():
                    offsets.append((at, at))
                else:
                    offsets.append(OUTSIDE)
                    text = known.tokens[number]
                    self._tell(text, at, told, theirs)
                    at += len(text.encode())
        student_spans, teacher_spans = align(_tensor(offsets), _tensor(theirs))
        kept = torch.ones(len(teacher_spans), dtype=torch.bool)
        if self.max_length is not None:
            told = told[: self.max_length]
            kept = teacher_spans[:, 1] <= self.max_length
        return Retold(told, student_spans[kept], teacher_spans[kept])

    def _tell(self, text: str, at: int, told: list[int], theirs: list[tuple[int, int]]) -> None:
        found = self.teacher(text, add_special_tokens=False, verbose=False)["input_ids"]
        told += found
        theirs += [(at + a, at + b) for a, b in byte_offsets(self.teacher, text, found).tolist()]

    def _bytes(self, ids: list[int], at: int) -> tuple[list[tuple[int, int]], bytes]:
        """What ordinary tokens cover, from a byte on, and the bytes."""
        known = spelling(self.student)
        if known.kind == "characters":
            text = known.plain.decode(ids)
            found = byte_offsets(self.student, text, ids).tolist()
            return [(at + a, at + b) for a, b in found], text.encode()
        pieces = [known.pieces.get(number) for number in ids]
        if known.prefix and pieces[0] and pieces[0][:1] == b" ":
            pieces[0] = pieces[0][1:]  # before a text it is added
        data = b"".join(piece or b"" for piece in pieces)
        there = bytearray(len(data) + 1)  # 1 where bytes are characters
        for start, text in texts(data):
            there[start : start + len(text.encode())] = b"\1" * len(text.encode())
        offsets, start = [], 0
        for piece in pieces:
            end = start + len(piece or b"")
            whole = piece is not None and all(there[start:end])
            offsets.append((at + start, at + end) if whole else OUTSIDE)
            start = end
        return offsets, data


def texts(data: bytes) -> Iterator[tuple[int, str]]:
    """The stretches of bytes that are UTF-8, and where they begin: what is cut within a character
    is none."""
    start = 0
    while start < len(data):
        try:
            text, skipped = data[start:].decode(), 0
        except UnicodeDecodeError as error:
            text, skipped = data[start : start + error.start].decode(), error.end - error.start
        if text:
            yield start, text
        start += len(text.encode()) + skipped


def _tensor(offsets: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int64).view(-1, 2)
