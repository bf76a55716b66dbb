"""Whether what a server sent is an answer to what it was asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedkd.cache.answers import Answers
from fusedkd.cache.importers import ranked
from fusedkd.cache.layout import Layout
from fusedkd.cache.records import EXCESS
from fusedkd.teachers.client import Client, Wrong
from fusedkd.teachers.decoding import Entries
from fusedkd.teachers.protocols import Protocol, Question
from fusedkd.teachers.service import TeacherError

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


def entries_of(protocol: Protocol, content: bytes) -> Entries:
    """
    Raises:
        Wrong: the bytes are something else.
    """
    try:
        return protocol.read(content)
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
    _check_echo(entries.echo, ids)
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
    if np.isnan(entries.logs).any() or entries.logs.max(initial=0.0) > EXCESS:
        raise Wrong("log-probabilities that are NaN or above 0")
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


def _check_echo(echo: Any, ids: np.ndarray) -> None:
    asked = np.append(ids, ids[-1])
    known = echo >= 0 if len(echo) == len(asked) else np.zeros(1, bool)
    if len(echo) != len(asked) or (echo != asked)[known].any():
        raise Wrong("the answer to another sequence")
