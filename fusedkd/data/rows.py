"""Documents of each kind to rows of token ids and labels, one row per document."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from fusedkd.data.chat import IGNORED, Chat, as_messages, common_prefix, parsed
from fusedkd.data.columns import column_names, kind_of
from fusedkd.data.two_templates import CONVERSATION

# What is known of a row beside its ids and labels: its tokens before it was truncated, and how
# many of those left have a label, and one that counts (the first token is nobody's next one).
# Rows where none counts are left out.
LENGTH, LABELLED, COUNTED = "length", "labelled", "counted"


def mapped(
    rows: Any,
    fn: Callable[..., Any],
    desc: str,
    *,
    batch_size: int = 1000,
    processes: int | None = None,
    **how: Any,
) -> Any:
    """``rows.map`` over batches, of a data set or a stream; its old columns go."""
    names = column_names(rows)
    more = {"desc": desc, "num_proc": processes} if isinstance(rows, Dataset) else {}
    return rows.map(
        fn, batched=True, batch_size=batch_size, remove_columns=names, fn_kwargs=how, **more
    )


def encode(
    rows: Any, encoder: Encoder, processes: int | None = None, kept: str | None = None
) -> Any:
    """``input_ids``, ``labels``, ``length``, ``labelled`` and ``counted`` of every document, and
    the column ``kept``.

    Raises:
        ValueError: a row that is no document of its kind.
    """
    kind = kind_of(column_names(rows))
    how: dict[str, Any] = {"encoder": encoder, "kind": kind, "kept": kept}
    return mapped(rows, _encode, "Tokenizing", processes=processes, **how)


def with_labels(rows: Any) -> Any:
    """Those of the encoded rows in which something counts."""
    return rows.filter(_counts, input_columns=COUNTED, batched=True)


def _counts(numbers: list[int]) -> list[bool]:
    return [number > 0 for number in numbers]


def encoder_for(
    tokenizer: Any, packing: str, train_on: str, max_length: int, conversations: bool = False
) -> Encoder:
    """Of documents packed so: what is cut into blocks is one text, and nowhere truncated."""
    blocks = packing == "blocks"
    most = None if blocks else max_length
    return Encoder(tokenizer, train_on, most, joined=blocks, conversations=conversations)


def _encode(
    rows: dict[str, list[Any]], encoder: Encoder, kind: str, kept: str | None
) -> dict[str, list[Any]]:
    beside = {} if kept is None else {kept: rows[kept]}
    pairs = getattr(encoder, kind)({name: rows[name] for name in rows if name != kept})
    names = ("input_ids", "labels", LENGTH, LABELLED, COUNTED)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for ids, labels in pairs:
        found[LENGTH].append(len(ids))
        if encoder.max_length is not None:
            ids, labels = ids[: encoder.max_length], labels[: encoder.max_length]
        found["input_ids"].append(ids)
        found["labels"].append(labels)
        found[LABELLED].append(sum(label != IGNORED for label in labels))
        # a prompt counts as a whole, and cut it would be another
        whole = found[LENGTH][-1] == len(ids)
        found[COUNTED].append(int(whole) if kind == "prompt" else _counted(labels))
    if encoder.conversations:
        beside[CONVERSATION] = _conversations(rows, kind)
    return found | beside


def _conversations(rows: dict[str, list[Any]], kind: str) -> list[str]:
    """As JSON; nothing of rows that are none."""
    names = {"messages": ("messages",), "completion": ("prompt", "completion")}.get(kind, ())
    count = len(next(iter(rows.values())))
    if not names or any(isinstance(rows[name][0], str) for name in names if kind != "messages"):
        return [""] * count
    tools = rows.get("tools", [None] * count)
    parts = zip(*(rows[name] for name in names), strict=True)
    turns = [[turn for part in row for turn in as_messages(part)] for row in parts]
    pairs = zip(turns, tools, strict=True)
    return [json.dumps({"messages": a, "tools": parsed(b) or None}) for a, b in pairs]


def _counted(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


Pairs = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Encoder:
    """One method for each kind of rows, from a batch of them to pairs of ids and labels.

    Args:
        tokenizer: None where rows have ids.
        train_on: see :class:`~fusedkd.data.arguments.DataArguments`.
        max_length: where rows are truncated; None: nowhere.
        joined: whether documents become one text: no special tokens then stand before them.
        conversations: whether a row keeps the conversation that it was made from.
    """

    tokenizer: Any
    train_on: str = "assistant"
    max_length: int | None = None
    joined: bool = False
    conversations: bool = False

    def input_ids(self, rows: dict[str, list[Any]]) -> Pairs:
        """Ids and labels as they are; or the labels of TRL's masks. Without padding."""
        names = [name for name in rows if name != "input_ids"]
        columns = zip(rows["input_ids"], *(rows[name] for name in names), strict=True)
        return [_given(ids, dict(zip(names, beside, strict=True))) for ids, *beside in columns]

    def text(self, rows: dict[str, list[Any]]) -> Pairs:
        """All of it, and the end of text after it."""
        ids = self._tokenized(rows["text"], begin=not self.joined)
        return [(row, row) for row in map(self._ended, ids)]

    def messages(self, rows: dict[str, list[Any]]) -> Pairs:
        """Labels on the assistant's turns."""
        chat = Chat(self.tokenizer, self.train_on)
        tools = rows.get("tools", [None] * len(rows["messages"]))
        return [chat(*pair) for pair in zip(rows["messages"], tools, strict=True)]

    def completion(self, rows: dict[str, list[Any]]) -> Pairs:
        """Labels on the completion, of text or of messages."""
        tools = rows.get("tools", [None] * len(rows["prompt"]))
        triples = zip(rows["prompt"], rows["completion"], tools, strict=True)
        return [self._completion(*triple) for triple in triples]

    def prompt(self, rows: dict[str, list[Any]]) -> Pairs:
        """No labels: the student is to write."""
        tools = rows.get("tools", [None] * len(rows["prompt"]))
        pairs = zip(rows["prompt"], tools, strict=True)
        ids = [self._prompt(prompt, listed) for prompt, listed in pairs]
        return [(row, [IGNORED] * len(row)) for row in ids]

    def _completion(self, prompt: Any, completion: Any, tools: Any) -> tuple[list[int], list[int]]:
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("prompt and completion: expected both as text or both as messages.")
        if not isinstance(prompt, str):
            before, after = as_messages(prompt), as_messages(completion)
            return Chat(self.tokenizer, self.train_on)([*before, *after], tools, len(before))
        begin = not self.joined
        ids = self._ended(self._tokenized([prompt + completion], begin)[0])
        if self.train_on == "all":
            return ids, ids
        hidden = common_prefix(self._without_end(self._tokenized([prompt], begin)[0]), ids)
        return ids, [IGNORED] * hidden + ids[hidden:]

    def _prompt(self, prompt: Any, tools: Any) -> list[int]:
        if not isinstance(prompt, str):
            return Chat(self.tokenizer, self.train_on).prompt(prompt, tools)
        return self._without_end(self._tokenized([prompt], begin=not self.joined)[0])

    def _tokenized(self, texts: list[Any], begin: bool) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{text!r:.80}: expected text.")
        encoded = self.tokenizer(
            texts, add_special_tokens=begin, return_attention_mask=False, verbose=False
        )
        if not begin:
            return list(encoded["input_ids"])
        bos, end = self.tokenizer.bos_token_id, self._end()
        return [_once(ids, bos, end) for ids in encoded["input_ids"]]

    def _end(self) -> int | None:
        eos = self.tokenizer.eos_token_id
        return self.tokenizer.sep_token_id if eos is None else eos

    def _without_end(self, ids: list[int]) -> list[int]:
        """A prompt goes on: without what some tokenizers put after every text."""
        return ids[:-1] if ids and ids[-1] == self._end() else ids

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._end()
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _given(ids: list[int], beside: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    if not beside:
        return ids, ids
    for name, column in beside.items():
        if len(column) != len(ids):
            raise ValueError(
                f"a row has {len(ids)} input_ids and {len(column)} {name}: expected one per token "
                "(labels of -100 where it does not count; nothing is shifted)."
            )
    real = beside.pop("attention_mask", [1] * len(ids))
    labels = beside.pop("labels", ids)
    told = [list(column) for column in beside.values()]  # masks
    labels = [x if all(column[n] for column in told) else IGNORED for n, x in enumerate(labels)]
    there = [n for n, here in enumerate(real) if here]
    return [ids[n] for n in there], [labels[n] for n in there]


def _once(ids: list[int], bos: int | None, end: int | None) -> list[int]:
    """Without a second beginning or end: a text may have been saved with the one that the tokenizer
    adds."""
    ids = ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
    return ids[:-1] if end is not None and ids[-2:] == [end, end] else ids
