"""Conversations to token ids and labels, by the tokenizer's chat template, which alone says where
texts begin and end: no token is added to what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

IGNORED = -100
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}  # ShareGPT's
_NO_PREFIX = (
    "the chat template writes {turn} differently once more follows, so that its tokens cannot be "
    "told: expected one whose renderings are prefixes of each other or that has "
    "{{% generation %}} (--chat_template FILE), --train_on last (the last answer only) or "
    "--train_on all."
)

Message = dict[str, Any]


def with_template(tokenizer: Any, path: str | None) -> Any:
    """The tokenizer, with another chat template where one is asked for.

    Raises:
        OSError: no such file.
    """
    if path is not None:
        tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
    return tokenizer


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


@dataclass(frozen=True)
class Chat:
    """Turns a conversation into ids and labels (-100 where a token carries none).

    A template with ``{% generation %}`` says itself what the assistant writes. From any other it is
    found by rendering the conversation up to each of its turns: what comes after the prompt, up to
    where the rendering with the turn ends.

    Args:
        tokenizer: with a chat template.
        train_on: which tokens carry a label, see :class:`~fusedkd.data.arguments.DataArguments`.

    Raises:
        ValueError: when called, for what is no conversation, a template that does not let turns be
            told apart, or none.
    """

    tokenizer: Any
    train_on: str = "assistant"

    def __call__(
        self, messages: Any, tools: Any = None, first: int = 0
    ) -> tuple[list[int], list[int]]:
        """Ids and labels; the ``first`` messages are a prompt, which carries none."""
        turns, tools = as_messages(messages), parsed(tools) or None
        markers = _MARKERS.search(self._template(tools)) is not None
        if self.train_on == "all":
            ids = self._ids(turns, tools)
            return ids, list(ids)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(self.tokenizer).__name__} does not say which characters a "
                "token is made of, which labels on the assistant's turns need: expected one of the "
                "tokenizers library, or --train_on all."
            )
        ids, mask = (self._marked if markers else self._told_by_prefix)(turns, tools)
        if first:
            prompt = self._ids(turns[:first], tools, add_generation_prompt=True)
            hidden = common_prefix(prompt, ids)
            mask = [False] * hidden + mask[hidden:]
        if self.train_on == "last" and markers:
            mask = _last_run(mask)
        return ids, [i if here else IGNORED for i, here in zip(ids, mask, strict=True)]

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """Ids up to where the assistant is to answer."""
        return self._ids(as_messages(messages), parsed(tools) or None, add_generation_prompt=True)

    def _template(self, tools: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path or type(self.tokenizer).__name__} has "
                "no chat template, which conversations need: expected a --tokenizer that has one, "
                "or --chat_template FILE."
            )
        return self.tokenizer.get_chat_template(tools=tools)

    def _ids(self, turns: list[Message], tools: Any, **more: Any) -> list[int]:
        self._template(tools)
        return list(
            self.tokenizer.apply_chat_template(turns, tools=tools, return_dict=True, **more)[
                "input_ids"
            ]
        )

    def _marked(self, turns: list[Message], tools: Any) -> tuple[list[int], list[bool]]:
        found = self.tokenizer.apply_chat_template(
            turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), list(map(bool, found["assistant_masks"]))

    def _told_by_prefix(self, turns: list[Message], tools: Any) -> tuple[list[int], list[bool]]:
        whole = _Rendered(self, turns, tools)
        spans = list(_Spans(self, turns, tools, whole))
        mask = [
            any(begin < stop and end > start for start, stop in spans)
            for begin, end in whole.offsets
        ]
        return whole.ids, mask


class _Rendered:
    """A conversation as text, and its tokens with the characters that each is made of."""

    def __init__(self, chat: Chat, turns: list[Message], tools: Any, **more: Any) -> None:
        self.tokenizer = chat.tokenizer
        self.text = chat.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **more)

    @cached_property
    def _encoded(self) -> Any:
        return self.tokenizer(
            self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )

    @property
    def ids(self) -> list[int]:
        return self._encoded["input_ids"]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return self._encoded["offset_mapping"]

    def shared(self, other: _Rendered) -> int:
        """Characters at the beginning that both have, and both cut into the same tokens."""
        tokens = common_prefix(self.ids, other.ids)
        return self.offsets[tokens - 1][1] if tokens else 0


@dataclass
class _Spans:
    """(start, end) in characters of the assistant's turns in the rendering of all."""

    chat: Chat
    turns: list[Message]
    tools: Any
    whole: _Rendered

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = [n for n, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        for place in places[-1:] if self.chat.train_on == "last" else places:
            yield self._span(place)

    def _span(self, place: int) -> tuple[int, int]:
        if not place:
            raise ValueError(
                "a conversation begins with the assistant: expected a message to answer before it, "
                "or a chat template with {% generation %} (--chat_template FILE)."
            )
        prompt = self.chat.tokenizer.apply_chat_template(
            self.turns[:place], tools=self.tools, tokenize=False, add_generation_prompt=True
        )
        if not self.whole.text.startswith(prompt):
            raise ValueError(_NO_PREFIX.format(turn="what comes before an answer"))
        start = len(prompt)
        if place == len(self.turns) - 1:
            return start, len(self.whole.text)
        return start, start + self._length(place, start)

    def _length(self, place: int, start: int) -> int:
        """Of the turn in the whole. Where it is the last one a template may end it with an end of
        text (Phi 3), or begin it with a thought that it drops later (Qwen 3)."""
        alone = _Rendered(self.chat, self.turns[: place + 1], self.tools)
        turn, rest = alone.text[start:], self.whole.text[start:]
        if rest.startswith(turn):
            return len(turn)
        shared = alone.shared(self.whole) - start
        said = _said(self.turns[place])
        if shared > 0 and said and all(text in turn[:shared] for text in said):
            return shared
        kept = next((n for n in range(1, len(turn)) if rest.startswith(turn[n:])), len(turn))
        if said and all(text in turn[kept:] for text in said):
            return len(turn) - kept
        raise ValueError(_NO_PREFIX.format(turn="an answer"))


def _said(turn: Message) -> list[str]:
    """What has to be in the rendering of a turn, whatever a template drops."""
    content = turn.get("content")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    said = [text.rpartition("</think>")[2].strip() for text in texts]
    calls = [call.get("function", call).get("name", "") for call in turn.get("tool_calls") or ()]
    return [text for text in (*said, *calls) if text]


def _last_run(mask: list[bool]) -> list[bool]:
    end = len(mask) - next((n for n, here in enumerate(reversed(mask)) if here), len(mask))
    start = next((n for n in range(end, 0, -1) if not mask[n - 1]), 0)
    return [start <= n < end for n in range(len(mask))]


def as_messages(value: Any) -> list[Message]:
    """A conversation as the template takes it; it may be JSON in text, or ShareGPT's.

    Raises:
        ValueError: it is something else.
    """
    messages = parsed(value)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{_short(value)} is no conversation: expected a list of messages.")
    return [_as_message(message) for message in messages]


def _as_message(message: Message) -> Message:
    message = _without_none(message)
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message = {"role": _ROLES.get(role, role), "content": message.pop("value", ""), **message}
    role, content = message.get("role"), message.get("content")
    parts = content if isinstance(content, list) else []
    texts = all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)
    fits = isinstance(content, str | list) or (content is None and "tool_calls" in message)
    if not isinstance(role, str) or not fits or not texts:
        raise ValueError(
            f"{_short(message)} is no message: expected a role and a content that is text."
        )
    return message


def _without_none(value: Any) -> Any:
    """Without the keys that other rows have: a table's columns are those of all its rows."""
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def parsed(value: Any) -> Any:
    """What may be JSON in text."""
    if not isinstance(value, str):
        return _without_none(value)
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{_short(value)}: expected JSON: {error}.") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
