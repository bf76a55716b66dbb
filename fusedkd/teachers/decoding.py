"""Servers' answers as arrays. 4,096 tokens with 64 entries are 5 to 20 MB of JSON, of which parsers
make half a million objects. The scans make none. vLLM's answers are maps of maps: entries are
found by the bytes that begin one, and the numbers around them read as columns. Lists of numbers are
CSV, once their brackets are line breaks, and Arrow refuses whatever else they hold. What a scan
does not know goes to a parser."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]

# An entry is `"123":{"logprob":-1.5,"rank":2,"decoded_token":" x"}`. No string holds the mark:
# within one its quotes have a backslash before them.
_MARK = b':{"logprob":'
_BEGIN, _ECHO = b'"prompt_logprobs":[null,{', b'"prompt_token_ids":['
_OPEN, _ZERO, _QUOTE = b'{0"'
_COMMAS, _ONES, _HIGHS = (np.uint64(0x0101010101010101 * byte) for byte in (0x2C, 1, 0x80))
_MARK_8, _MARK_12 = (np.frombuffer(_MARK[part], "<u8")[0] for part in (slice(8), slice(4, 12)))
_ID = 8  # bytes, one more than an id has
_WORDS = 3  # of 8 bytes, more than a float32 has digits
_POWERS = 10.0 ** np.arange(_ID - 1, -1, -1)
_FLOAT, _INT = pa.float64(), pa.int64()
_LIST = ord("[")
_LINES, _COLUMN = bytes.maketrans(b"[", b"\n"), bytes.maketrans(b",", b"\n")


class Entries(NamedTuple):
    """The entries of all tokens, one after the other: ``ids`` (int64) and ``logs`` (float64), how
    many each token has, ``counts``; and ``echo``, the ids that the server says it was asked."""

    ids: Array
    logs: Array
    counts: Array
    echo: Array

    def matrices(self) -> tuple[Array, Array]:
        """ids (L, K) int64 with -1 for nothing, logs (L, K) with -inf."""
        shape = len(self.counts), max(1, self.counts.max(initial=0))
        if self.ids.size == shape[0] * shape[1]:
            return self.ids.reshape(shape), self.logs.reshape(shape)
        there = np.arange(shape[1]) < self.counts[:, None]
        ids, logs = np.full(shape, -1, np.int64), np.full(shape, -np.inf)
        ids[there], logs[there] = self.ids, self.logs
        return ids, logs


class Actual(NamedTuple):
    """What is said of the tokens that were asked, but the first: ``logs`` (float64), nan for null;
    and ``echo``, as above, of all."""

    logs: Array
    echo: Array


def read_vllm(content: bytes) -> Entries:
    """Of ``POST /v1/completions`` with ``prompt_logprobs``; those of the first token, which are
    null, left out.

    Raises:
        ValueError: it is something else.
        LookupError: as above.
        TypeError: as above.
    """
    return scan_vllm(content) or parse_vllm(content)


def scan_vllm(content: bytes) -> Entries | None:
    """:func:`read_vllm`, some ten times as fast; None where the JSON is not laid out as vLLM's."""
    echo = content.rfind(_ECHO)
    if echo < 0 or _BEGIN not in content or not content.rstrip().endswith(b"}"):
        return None
    echo += len(_ECHO) - 1
    asked = orjson.loads(content[echo : content.index(b"]", echo) + 1])
    raw = np.frombuffer(content, np.uint8)
    at = _marks(raw)
    if not at.size:
        return None
    try:
        ids, first = _ids(raw, at)
        logs = _logs(raw, at + len(_MARK))
    except ValueError:  # Arrow's is one: null, say
        return None
    starts = np.flatnonzero(first)
    if not starts.size or starts[0] != 0:
        return None
    return Entries(ids, logs, np.diff(starts, append=len(ids)), np.array(asked, np.int64))


def _marks(raw: Array) -> Array:
    """Where the mark begins."""
    at = np.flatnonzero(raw == _OPEN) - 1
    at = at[(at > _ID + 2) & (at + len(_MARK) + 8 * _WORDS < raw.size)]
    eight = sliding_window_view(raw, 8)
    both = (eight[at].view("<u8") == _MARK_8) & (eight[at + 4].view("<u8") == _MARK_12)
    return at[both.ravel()]


def _ids(raw: Array, at: Array) -> tuple[Array, Array]:
    """The digits before a mark's quote, and whether a map begins with them."""
    digits = sliding_window_view(raw, _ID)[at - 1 - _ID] - np.uint8(_ZERO)
    there = np.logical_and.accumulate((digits < 10)[:, ::-1], axis=1)[:, ::-1]
    quote = at - 2 - there.sum(1)
    if (raw[quote] != _QUOTE).any():
        raise ValueError("a key that is no id")
    return ((digits * there) @ _POWERS).astype(np.int64), raw[quote - 1] == _OPEN


def _logs(raw: Array, at: Array) -> Array:
    """The numbers that begin there and end before a comma, which and all after it become 0: of a
    word of eight bytes, those from the first on whose difference from a comma borrows (Mycroft
    1987)."""
    text = sliding_window_view(raw, 8 * _WORDS)[at].view("<u8")
    ended = np.zeros(len(text), bool)
    for word in text.T:
        apart = word ^ _COMMAS
        commas = (apart - _ONES) & ~apart & _HIGHS
        first = commas & (~commas + np.uint64(1))
        word &= np.where(ended, np.uint64(0), (first >> np.uint64(7)) - np.uint64(1))
        ended |= commas != 0
    if not ended.all():
        raise ValueError("a number that is too long")
    strings = pa.array(text.view(f"S{8 * _WORDS}").ravel(), pa.binary()).cast(pa.string())
    return np.asarray(pc.cast(strings, pa.float64()))


def parse_vllm(content: bytes) -> Entries:
    choice = orjson.loads(content)["choices"][0]
    steps = choice["prompt_logprobs"][1:]
    entries = [(int(key), entry["logprob"]) for step in steps for key, entry in step.items()]
    logs = [np.nan if value is None else value for _, value in entries]
    counts = np.array([len(step) for step in steps], np.int64)
    ids = np.array([number for number, _ in entries], np.int64)
    return Entries(ids, np.array(logs, np.float64), counts, _echoed(choice["prompt_token_ids"]))


def read_sglang(content: bytes) -> Entries:
    """Of ``POST /generate`` with ``top_logprobs_num``: the flat base64 form of July 2026
    (sglang#31960), or else lists of (log-probability, id, text); those of the first token, which
    are null, left out.

    Raises:
        ValueError: it is something else.
        LookupError: as above.
        TypeError: as above.
    """
    return scan_sglang(content) or parse_sglang(content)


def scan_sglang(content: bytes) -> Entries | None:
    """:func:`read_sglang` of the lists; None where the JSON is not laid out as SGLang's."""
    steps = _between(content, b'"input_top_logprobs":[null,', b"]]]")
    asked = _between(content, b'"input_token_logprobs":[', b"]]")
    if steps is None or asked is None:
        return None
    try:
        logs, ids = _triples(steps)
        echo = _triples(asked)[1]
    except ValueError:  # Arrow's is one: texts, say
        return None
    raw = np.frombuffer(steps, np.uint8)
    opens = np.flatnonzero(raw[:-1] == _LIST)
    first = np.flatnonzero(raw[opens + 1] == _LIST)  # of a step, before that of a triple
    counts = np.diff(first, append=len(opens)) - 1
    return Entries(ids, logs, counts, echo)


def _triples(text: bytes) -> list[Array]:
    """The log-probabilities and ids of `[-1.5,17,null],[...`, whose nulls and ends go."""
    return _columns(text.translate(_LINES, b"]nul") + b",", _FLOAT, _INT, pa.null(), pa.null())[:2]


def parse_sglang(content: bytes) -> Entries:
    told = orjson.loads(content)["meta_info"]
    echo = _echoed([triple[1] for triple in told["input_token_logprobs"]])
    if "input_top_logprobs_val_flat_b64" in told:
        ids, logs = (_flat(told, f"input_top_logprobs_{part}_flat_b64") for part in ("idx", "val"))
        tokens, k = told["input_top_logprobs_shape"]
        counts = np.full(tokens - told["input_top_logprobs_null_prefix"], k)
        return Entries(ids.astype(np.int64), logs.astype(np.float64), counts, echo)
    steps = told["input_top_logprobs"][1:]
    flat = [triple for step in steps for triple in step]
    values = [np.nan if triple[0] is None else triple[0] for triple in flat]
    numbers = np.array([triple[1] for triple in flat], np.int64)
    return Entries(numbers, np.array(values, np.float64), np.array(list(map(len, steps))), echo)


def _flat(told: dict[str, Any], name: str) -> Array:
    import base64

    kind = np.dtype(told[f"{name}_dtype"]).newbyteorder("<")
    return np.frombuffer(base64.b64decode(told[name], validate=True), kind)


def read_trl(content: bytes) -> Entries:
    """Of ``POST /get_sequence_logprobs/`` with a prompt of one token; the first token, which it
    does not echo, is taken as asked (-1).

    Raises:
        ValueError: it is something else.
        LookupError: as above.
        TypeError: as above.
    """
    return scan_trl(content) or parse_trl(content)


def scan_trl(content: bytes) -> Entries | None:
    """:func:`read_trl`; None where the JSON is not laid out as TRL's."""
    names = b"logprob_token_ids", b"logprobs", b"actual_token_ids"
    ids, logs, actual = (_between(content, b'"%s":[[[' % name, b"]]]") for name in names)
    if ids is None or logs is None or actual is None:
        return None
    counts, others, ones = (
        [row.count(b",") + 1 for row in rows.split(b"],[")] for rows in (ids, logs, actual)
    )
    if counts != others or set(ones) != {1}:
        return None
    try:
        numbers, values, echo = (
            _columns(rows.translate(_COLUMN, b"[]"), kind)[0]
            for rows, kind in ((ids, _INT), (logs, _FLOAT), (actual, _INT))
        )
    except ValueError:
        return None
    if not sum(counts) == len(numbers) == len(values):
        return None
    return Entries(numbers, values, np.array(counts), np.insert(echo, 0, -1))


def _between(content: bytes, begin: bytes, end: bytes) -> bytes | None:
    """What is between the two, within one JSON object."""
    start = content.find(begin) + len(begin)
    stop = content.find(end, start)
    there = start >= len(begin) and stop >= 0 and content.rstrip().endswith(b"}")
    return content[start:stop] if there else None


def _columns(text: bytes, *kinds: pa.DataType) -> list[Array]:
    """A number a line, or several with commas between; nothing is nan, and an error for an id.

    Raises:
        ValueError: they are something else.
    """
    types = {str(n): kind for n, kind in enumerate(kinds)}
    table = pa.csv.read_csv(
        pa.py_buffer(text),
        pa.csv.ReadOptions(use_threads=False, column_names=list(types), block_size=len(text) + 1),
        pa.csv.ParseOptions(quote_char=False),
        pa.csv.ConvertOptions(column_types=types, null_values=["", "null"]),
    )
    if any(column.type == _INT and column.null_count for column in table.columns):
        raise ValueError("no id")
    return [column.to_numpy() for column in table.columns]


def parse_trl(content: bytes) -> Entries:
    told = orjson.loads(content)
    (ids,), (logs,), (actual,) = (
        told[name] for name in ("logprob_token_ids", "logprobs", "actual_token_ids")
    )
    if any(len(a) != len(b) for a, b in zip(ids, logs, strict=True)):
        raise ValueError("ids and log-probabilities differ in number")
    flat = [np.nan if value is None else value for row in logs for value in row]
    counts = np.array([len(row) for row in ids], np.int64)
    numbers = np.array([number for row in ids for number in row], np.int64)
    echo = _echoed([-1, *(row[0] for row in actual)])
    return Entries(numbers, np.array(flat, np.float64), counts, echo)


def _echoed(ids: Any) -> Array:
    return np.array(ids, np.int64)


# ----------------------------------------------------------------------------------------------
# the tokens that are there: one number each


def actual_vllm(content: bytes) -> Actual:
    """As :func:`read_vllm`."""
    choice = orjson.loads(content)["choices"][0]
    ids, steps = choice["prompt_token_ids"], choice["prompt_logprobs"]
    logs = [step[str(i)]["logprob"] for i, step in zip(ids[1:], steps[1:], strict=True)]
    return _actual(logs, ids)


def actual_sglang(content: bytes) -> Actual:
    """As :func:`read_sglang`."""
    triples = orjson.loads(content)["meta_info"]["input_token_logprobs"]
    return _actual([triple[0] for triple in triples[1:]], [triple[1] for triple in triples])


def actual_trl(content: bytes) -> Actual:
    """As :func:`read_trl`."""
    told = orjson.loads(content)
    (logs,), (ids,) = told["actual_logprobs"], told["actual_token_ids"]
    return _actual([row[0] for row in logs], [-1, *(row[0] for row in ids)])


def _actual(logs: list[Any], ids: list[Any]) -> Actual:
    values = [np.nan if value is None else value for value in logs]
    return Actual(np.array(values, np.float64), _echoed(ids))
