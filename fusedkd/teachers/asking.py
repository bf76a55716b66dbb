"""Whether what a server sent is an answer to what it was asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from fusedkd.cache.answers import Answers
from fusedkd.cache.importers import ranked
from fusedkd.cache.layout import Layout
from fusedkd.cache.records import EXCESS
from fusedkd.teachers.client import Client, Wrong
from fusedkd.teachers.decoding import Entries
from fusedkd.teachers.protocols import Protocol, Question
from fusedkd.teachers.service import TeacherError

Read = TypeVar("Read")
MASKED = -9998.0  # vLLM writes -inf as -9999


def ask(
    client: Client, protocol: Protocol, question: Question, layout: Layout, ids: np.ndarray
) -> Answers:
    """What the teacher says after each of the tokens, from whichever server.

    Raises:
        TeacherError: no server gives a good answer.
    """
    body = protocol.ask([*ids.tolist(), int(ids[-1])], question)

    def read(content: bytes) -> Answers:
        return judged(entries_of(protocol, content), ids, layout)

    return client.ask(protocol.path, body, read, f"a sequence of {len(ids):,} tokens")


def ask_actual(
    client: Client, protocol: Protocol, question: Question, ids: np.ndarray
) -> np.ndarray:
    """(L,) how probable the teacher thinks the token after each, and 0 for the last.

    Raises:
        TeacherError: no server gives a good answer.
    """
    if len(ids) < 2:
        return np.zeros(len(ids))

    def read(content: bytes) -> np.ndarray:
        logs, echo = _read(protocol, protocol.actual, content)
        _check_echo(echo, ids)
        if len(logs) != len(ids) - 1:
            raise Wrong(f"{len(logs)} log-probabilities of {len(ids)} tokens")
        _check_logs(logs)
        return np.append(np.minimum(logs, 0.0), 0.0)

    body = protocol.ask(ids.tolist(), question)
    return client.ask(protocol.path, body, read, f"a sequence of {len(ids):,} tokens")


def entries_of(protocol: Protocol, content: bytes) -> Entries:
    """
    Raises:
        Wrong: the bytes are something else.
    """
    return _read(protocol, protocol.read, content)


def _read(protocol: Protocol, read: Callable[[bytes], Read], content: bytes) -> Read:
    try:
        return read(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:120]
        raise Wrong(
            f"{len(content):,} bytes that are no answer as {protocol.name} gives them "
            f"({type(error).__name__}: {said})"
        ) from None


def judged(entries: Entries, ids: np.ndarray, layout: Layout) -> Answers:
    """The answers, ready for a cache.

    Raises:
        Wrong: they are to another sequence, of another number, NaN, or no distribution.
        TeacherError: the server knows more tokens than the tokenizer.
    """
    _check_echo(entries.echo, np.append(ids, ids[-1]))
    if len(entries.counts) != len(ids) or entries.counts.min(initial=layout.k) < layout.k:
        raise Wrong(
            f"{len(entries.counts)} tokens with at least {entries.counts.min(initial=0)} entries, "
            f"for {len(ids)} with {layout.k}"
        )
    if entries.ids.min(initial=0) < 0 or entries.ids.max(initial=0) >= layout.vocab_size:
        raise TeacherError(
            f"the server names a token {int(entries.ids.max())}, and the vocabulary has "
            f"{layout.vocab_size:,}: expected the teacher's tokenizer, or its --vocab_size."
        )
    _check_logs(entries.logs)
    numbers, logs = entries.matrices()
    order = np.argsort(numbers, axis=1, kind="stable")  # ties do not depend on the server's order
    numbers, logs = (np.take_along_axis(part, order, 1) for part in (numbers, logs))
    if ((numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] >= 0)).any():
        raise Wrong("a token that is there twice")
    masked = logs < MASKED
    numbers[masked], logs[masked] = -1, -np.inf
    mass = np.exp(logs).sum(1)
    if mass.max(initial=0.0) > 1 + EXCESS:
        raise Wrong(f"probabilities that sum to {mass.max():.4f}")
    return ranked(numbers, logs, layout)


def _check_logs(logs: np.ndarray) -> None:
    if np.isnan(logs).any() or logs.max(initial=0.0) > EXCESS:
        raise Wrong("log-probabilities that are NaN or above 0")


def _check_echo(echo: Any, asked: np.ndarray) -> None:
    known = echo >= 0 if len(echo) == len(asked) else np.zeros(1, bool)
    if len(echo) != len(asked) or (echo != asked)[known].any():
        raise Wrong("the answer to another sequence")
