"""A conversation as each of two sides' own chat templates writes it, and which tokens of both are
the same bytes of its messages."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.alignment import Retelling, Retold, align, byte_offsets
from fusedkd.alignment.rows import OUTSIDE
from fusedkd.alignment.spelling import spelling
from fusedkd.data.chat import Message, as_messages

CONVERSATION = "conversation"  # a column: JSON of {"messages": [...], "tools": [...]}
_MARK = re.compile("\ue000([0-9]+)\ue001")  # of private use: in no template


class Reading:
    """Reads a student's rows to a teacher: a conversation by the teacher's own template, anything
    else, or where both have one template or the teacher none, by its bytes.

    Args:
        student_tokenizer, teacher_tokenizer: see :func:`fusedkd.alignment.byte_offsets`.
        max_length: tokens that the teacher reads at most; None: all.
    """

    def __init__(
        self, student_tokenizer: Any, teacher_tokenizer: Any, max_length: int | None = None
    ) -> None:
        self.student, self.teacher, self.max_length = (
            student_tokenizer,
            teacher_tokenizer,
            max_length,
        )
        self.retelling = Retelling(student_tokenizer, teacher_tokenizer, max_length)
        ours, theirs = (getattr(t, "chat_template", None) for t in (self.student, self.teacher))
        self.templates = bool(ours and theirs) and ours != theirs

    def __call__(self, ids: Sequence[int], conversation: str | None = None) -> Retold:
        """One row, without its padding.

        Args:
            ids: the student's; of a conversation all of them, or the first.
            conversation: what they were made from, as the column above.

        Raises:
            ValueError: no conversation, ids that the student's template does not make of it, or a
                template that writes its texts so that they cannot be found.
        """
        if not conversation or not self.templates:
            return self.retelling(ids)
        told = json.loads(conversation)
        turns, tools = as_messages(told["messages"]), told.get("tools") or None
        ours = written("student", self.student, turns, tools)
        theirs = written("teacher", self.teacher, turns, tools)
        if ours.ids[: len(ids)] != list(ids):
            raise ValueError(
                "a row's conversation: its tokens are not those that the student's chat template "
                "makes of it: expected rows that were made by it, or no column conversation."
            )
        student_spans, teacher_spans = align(ours.offsets, theirs.offsets)
        most = len(theirs.ids) if self.max_length is None else self.max_length
        kept = (student_spans[:, 1] <= len(ids)) & (teacher_spans[:, 1] <= most)
        return Retold(theirs.ids[:most], student_spans[kept], teacher_spans[kept])


class Written(NamedTuple):
    """A conversation in one side's tokens."""

    ids: list[int]
    offsets: Tensor  # (L, 2) bytes over the messages' texts alone; (-1, -1) outside of them


def written(side: str, tokenizer: Any, turns: list[Message], tools: Any = None) -> Written:
    """By a tokenizer's chat template.

    Raises:
        ValueError: a message's text is not to be found in what the template makes of it.
    """
    marked, contents = _marked(turns)
    text, pattern = (
        tokenizer.apply_chat_template(x, tools=tools, tokenize=False) for x in (turns, marked)
    )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    at = [0, *accumulate(len(letter.encode()) for letter in text)]
    base = [0, *accumulate(len(content.encode()) for content in contents)]
    places = iter(list(_places(side, text, pattern, contents)))
    special, place = spelling(tokenizer).special, next(places, None)
    offsets = []
    for number, (start, end) in zip(ids, byte_offsets(tokenizer, text, ids).tolist(), strict=True):
        while place is not None and at[place.end] < end:
            place = next(places, None)
        inside = place is not None and at[place.start] <= start and number not in special
        if place is None or not inside:
            offsets.append(OUTSIDE)
            continue
        before = len(contents[place.number][: place.skipped].encode())
        shift = base[place.number] + before - at[place.start]
        offsets.append((start + shift, end + shift))
    return Written(ids, torch.tensor(offsets, dtype=torch.int64).view(-1, 2))


def _marked(turns: list[Message]) -> tuple[list[Message], list[str]]:
    """The turns with a mark instead of each text, and the texts."""
    marked, contents = copy.deepcopy(turns), []
    for turn in marked:
        parts = turn["content"] if isinstance(turn.get("content"), list) else [turn]
        name = "content" if parts == [turn] else "text"
        for part in parts:
            if (part.get(name) or "").strip():  # a template asks whether there is a text
                contents.append(part[name])
                part[name] = f"\ue000{len(contents) - 1}\ue001"
    return marked, contents


@dataclass(frozen=True)
class _Place:
    """Where a rendering has a text, in characters; ``skipped`` of its first are not there."""

    number: int
    start: int
    end: int
    skipped: int


def _places(side: str, text: str, pattern: str, contents: list[str]) -> Iterator[_Place]:
    """Those that come in the order of the messages. What the template writes between two texts is
    known from the pattern, so that a text is not taken for a role of the same name."""
    pieces = _MARK.split(pattern)  # literal, number, literal, number, ..., literal
    if contents and len(pieces) == 1:
        raise ValueError(f"the {side}'s chat template writes no message's text: expected another.")
    at, last = 0, -1
    for n in range(1, len(pieces), 2):
        number, literal, follows = int(pieces[n]), pieces[n - 1], pieces[n + 1]
        ends = n + 2 == len(pieces)
        content = contents[number]
        answer = content.rpartition("</think>")[2]
        ways = dict.fromkeys(y for x in (content, answer) for y in (x, x.strip(), x.lstrip("\n")))
        start, said = _found(text, at, literal, follows, ends, list(ways))
        if start < 0:
            raise ValueError(
                f"the {side}'s chat template does not write the text of message {number + 1} as it "
                f"is, {content!r:.60}: expected a template that does (--chat_template is the "
                "student's; a teacher's lies with its tokenizer), or rows of input_ids."
            )
        at = start + len(said)
        if number > last and said:
            yield _Place(number, start, at, content.rindex(said))
            last = number


def _found(
    text: str, at: int, literal: str, follows: str, ends: bool, ways: list[str]
) -> tuple[int, str]:
    """Where one of these begins, before what follows it: right after the literal, or, where the
    template writes something else there for this text (a thought), later. Of what follows the first
    line is enough where the rest is another for the next text. -1: nowhere."""
    start = at + len(literal)
    line = "".join(follows.splitlines(keepends=True)[:1])
    after = [follows] if ends or line == follows else [follows, line]
    for rest in after if text.startswith(literal, at) else ():
        for said in ways:
            whole = not ends or len(text) == start + len(said) + len(rest)
            if whole and text.startswith(said + rest, start):
                return start, said
    for rest in after:
        for said in filter(None, ways if rest.strip() or ends else ()):
            start = text.find(said + rest, at)
            if ends:
                start = len(text) - len(said + rest) if text.endswith(said + rest) else -1
            if start >= at:
                return start, said
    return -1, ""
