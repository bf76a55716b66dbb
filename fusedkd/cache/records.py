"""Answers of other tools, sequence by sequence: read, and checked before anything is made of them.

Files of strangers may hold anything. A record either is what it should be or an error that names
the row, the column and the token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedkd.cache.errors import CacheError, short

KNOWN_COLUMNS = (  # of ids and of log-probabilities
    ("target_token_ids", "target_logprobs"),
    ("top_k_ids", "top_k_logprobs"),
    ("topk_ids", "topk_logprobs"),
    ("topk_indices", "topk_logprobs"),
    ("indices", "logprobs"),
)
Spot = Callable[[int], str]  # the row, column and token of the n-th list, for messages

MOST = 1e308  # integers beyond are no float64
EXCESS = 1e-3  # how far above 1 probabilities may sum: what softmaxes in half precision leave


class Record(NamedTuple):
    """One sequence: its token ids, and for each of them the distribution of the *next* token, as
    (ids, natural log-probabilities), in any order; nothing where it is not known.

    A log-probability of -inf is a probability of 0, which vLLM writes for what has been masked:
    such an entry is left out. It belongs to no tail either, for it has no mass.
    """

    where: str  # for messages: file and line, or row
    input_ids: Sequence[int] | np.ndarray
    entries: Sequence[tuple[Any, Any]]
    columns: tuple[str, str, str] = ("input_ids", "ids", "log-probabilities")  # for messages


# ---- reading -----------------------------------------------------------------------------------


def read_vllm(path: Path) -> Iterator[Record]:
    """vLLM's answers, one JSON object per line, with ``prompt_token_ids`` and ``prompt_logprobs``
    at the top or in ``choices[0]``.

    ``prompt_logprobs[n]`` is what was expected *of* token n, so it belongs to token n - 1; the
    first is null, and what follows the last token is unknown.

    Raises:
        CacheError: a line is something else.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _vllm_record(f"{path} line {number}", line)


def _vllm_record(where: str, line: bytes) -> Record:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
        if "prompt_logprobs" not in row:
            row = {**row, **row["choices"][0]}
        ids, steps = row["prompt_token_ids"], row["prompt_logprobs"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CacheError(
            f"{where}: expected an object with prompt_token_ids and prompt_logprobs, as vLLM "
            f"answers with prompt_logprobs=K ({type(error).__name__}: {error})."
        ) from None
    if not isinstance(steps, list):
        raise CacheError(f"{where}, prompt_logprobs: {_named(steps)}: expected a list.")
    entries = [_vllm_entries(f"{where}, token {n}", step) for n, step in enumerate(steps)][1:]
    columns = ("prompt_token_ids", "prompt_logprobs", "prompt_logprobs")
    return Record(where, ids, [*entries, ([], [])] if steps else [], columns)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [key for key, _ in pairs]
        raise ValueError(f"{short(max(twice, key=twice.count))} is there twice")
    return found


def _vllm_entries(where: str, step: Any) -> tuple[list[Any], list[Any]]:
    if not isinstance(step, dict | None):
        raise CacheError(
            f"{where}, prompt_logprobs: {_named(step)}: expected null, or an object of ids and "
            "log-probabilities."
        )
    step = step or {}
    ids = [int(key) if key.isdigit() and key.isascii() and len(key) < 20 else key for key in step]
    return ids, [v.get("logprob") if isinstance(v, dict) else v for v in step.values()]


def read_columns(
    rows: Iterable[Mapping[str, Any]], names: tuple[str, str] | None, of_token: bool
) -> Iterator[Record]:
    """A data set with ``input_ids`` and, per token, lists of ids and of log-probabilities.

    Args:
        rows: one mapping per sequence.
        names: of the two columns; None tries the usual ones.
        of_token: entry n is what was expected of token n, not what was expected after it.

    Raises:
        CacheError: a column is missing or has another length.
    """
    for number, row in enumerate(rows):
        where = f"row {number}"
        columns = ("input_ids", *(names or _guess(row)))
        for name in columns:
            if name not in row:
                raise CacheError(f"{where}: no column {name!r}, only {', '.join(row)}.")
        ids, tokens, values = (row[name] for name in columns)
        for name in columns:
            if not _is_list(row[name]):
                raise CacheError(f"{where}, {name}: {_named(row[name])}: expected a list.")
        if len(tokens) != len(values):
            raise CacheError(
                f"{where}: {columns[1]} has {len(tokens)} lists and {columns[2]} {len(values)}: "
                "expected one of each for a token."
            )
        entries = [
            ([] if i is None else i, [] if v is None else v)
            for i, v in zip(tokens, values, strict=True)
        ]
        entries = entries[1:] if of_token and len(entries) == len(ids) else entries
        if len(entries) == len(ids) - 1:
            entries.append(([], []))
        yield Record(where, ids, entries, columns)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _guess(row: Mapping[str, Any]) -> tuple[str, str]:
    for pair in KNOWN_COLUMNS:
        if set(pair) <= set(row):
            return pair
    raise CacheError(
        f"the columns are {', '.join(row)}: say which hold the ids and the log-probabilities with "
        "--ids-column and --logprobs-column."
    )


# ---- checking ----------------------------------------------------------------------------------


class Flat(NamedTuple):
    """A record that was looked at: ``ids`` (int64) and ``logs`` (float64, finite) of all tokens one
    after the other, and ``counts``, how many of them each token has."""

    input_ids: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    logs: np.ndarray


def checked(record: Record, vocab_size: int) -> Flat:
    """
    Raises:
        CacheError: it is not what it should be; the message has the row, the column and the token.
    """
    where, input_ids, entries, (first, *others) = record
    tokens, _ = _ids([input_ids], lambda n: f"{where}, {first}", vocab_size)
    if len(entries) != len(tokens):
        raise CacheError(
            f"{where}: {len(tokens)} tokens but {len(entries)} distributions in {others[0]}."
        )
    spots = [lambda n, c=column: f"{where}, token {n}, {c}" for column in others]
    ids, counts = _ids([pair[0] for pair in entries], spots[0], vocab_size)
    logs, given = _logs([pair[1] for pair in entries], spots[1])
    if (counts != given).any():
        n = int((counts != given).argmax())
        raise CacheError(f"{spots[1](n)}: {counts[n]} ids but {given[n]} log-probabilities.")
    of = np.repeat(np.arange(len(counts)), counts)  # the token of each entry
    _check_distinct(of * vocab_size + ids, vocab_size, spots[0])
    _check_mass(of, logs, spots[1])
    there = logs > -np.inf
    return Flat(tokens, np.bincount(of[there], minlength=len(tokens)), ids[there], logs[there])


def _check_distinct(keys: np.ndarray, vocab_size: int, spot: Spot) -> None:
    keys.sort()
    twice = keys[1:] == keys[:-1]
    if twice.any():
        token, number = divmod(int(keys[1:][twice][0]), vocab_size)
        raise CacheError(f"{spot(token)}: the id {number} is there twice.")


def _check_mass(of: np.ndarray, logs: np.ndarray, spot: Spot) -> None:
    with np.errstate(over="ignore"):
        mass = np.bincount(of, np.exp(logs))
    if (mass > 1 + EXCESS).any():
        token = int((mass > 1 + EXCESS).argmax())
        raise CacheError(
            f"{spot(token)}: the probabilities sum to {mass[token]:.4f}: expected natural "
            "log-probabilities of a softmax, which sum to 1 at most."
        )


def _ids(lists: list[Any], spot: Spot, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    flat, counts = _joined(lists, spot, (int, np.integer), "whole numbers")
    if flat and not 0 <= min(flat) <= max(flat) < vocab_size:
        odd = next(n for n, value in enumerate(flat) if not 0 <= value < vocab_size)
        raise CacheError(
            f"{spot(_list_of(counts, odd))}: the id {short(flat[odd])} is outside 0 to "
            f"{vocab_size - 1}, the vocabulary."
        )
    return np.array(flat, np.int64), counts


def _logs(lists: list[Any], spot: Spot) -> tuple[np.ndarray, np.ndarray]:
    kinds = (int, float, np.integer, np.floating)
    flat, counts = _joined(lists, spot, kinds, "natural log-probabilities")
    fits = (-MOST < value <= 1 or value == -np.inf for value in flat)  # NaN does not
    odd = next((n for n, fit in enumerate(fits) if not fit), None)
    if odd is not None:
        raise CacheError(
            f"{spot(_list_of(counts, odd))}: {short(flat[odd])}: expected natural "
            "log-probabilities, which are 0 at most."
        )
    return np.array(flat, np.float64), counts


def _joined(
    lists: list[Any], spot: Spot, kinds: tuple[type, ...], what: str
) -> tuple[list[Any], np.ndarray]:
    """(all entries, how many each list has) of lists whose entries are of these kinds."""
    lists = [value.tolist() if isinstance(value, np.ndarray) else value for value in lists]
    if (odd := _odd(lists, (list, tuple))) is not None:
        raise CacheError(f"{spot(odd)}: {_named(lists[odd])}: expected a list.")
    counts = np.array([len(value) for value in lists], np.int64)
    flat = list(chain.from_iterable(lists))
    if (odd := _odd(flat, kinds)) is not None:
        place = spot(_list_of(counts, odd))
        raise CacheError(f"{place}: {_named(flat[odd])}: expected {what}.")
    return flat, counts


def _odd(values: list[Any], kinds: tuple[type, ...]) -> int | None:
    """Where the first one is that is of none of these kinds; True and False are of none."""
    fits = {kind: issubclass(kind, kinds) and kind is not bool for kind in set(map(type, values))}
    if all(fits.values()):
        return None
    return next(n for n, value in enumerate(values) if not fits[type(value)])


def _list_of(counts: np.ndarray, place: int) -> int:
    return int(np.searchsorted(counts.cumsum(), place, side="right"))


def _named(value: Any) -> str:
    return f"{short(value)} is a {type(value).__name__}"
