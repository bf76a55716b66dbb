"""A teacher behind HTTP: what it says about a sequence, asked once and kept."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fusedkd.cache.actual import ActualLayout
from fusedkd.cache.answers import Target
from fusedkd.cache.keys import sequence_key, tokenizer_hash
from fusedkd.cache.layout import Layout
from fusedkd.cache.policy import ACTUAL, Policy
from fusedkd.cache.store import AnswerStore
from fusedkd.divergences import Divergence
from fusedkd.errors import as_user_error
from fusedkd.teachers.service import CONNECTIONS, Service, TeacherError

Ids = Sequence[int] | np.ndarray
Columns = dict[str, bytes]


class ServedTeacher:
    """The top entries of a teacher behind HTTP, sequence by sequence, as a
    :class:`fusedkd.cache.TeacherCache` gives them; or of each token nothing but how probable it
    was.

    Whatever a server answers is put into a store before it is used, in a cache's encoding, and read
    from there: so the first epoch trains on the same numbers as the second, and a run that is gone
    on with asks for nothing twice. Before anything is asked the server is probed
    (:mod:`fusedkd.teachers.probing`).

    Args:
        service: see there.
        tokenizer: of the student, which the server's must equal.
        answers: folder of the store, on a local disk.

    Raises:
        TeacherError: no server, another tokenizer or vocabulary, no such model, more entries than
            the server gives, a temperature that it ignores.
        CacheError: the folder has answers of another teacher, or to other questions.
    """

    sampled = False

    def __init__(self, service: Service, tokenizer: Any, answers: str | Path) -> None:
        with as_user_error("a served teacher needs `pip install fusedkd[served]`", ImportError):
            from fusedkd.teachers.client import Client
            from fusedkd.teachers.probing import check_same_teacher, probed
        size = len(tokenizer) if service.vocab_size is None else service.vocab_size
        self.service, self.folder = service, Path(answers)
        heats = (service.temperature,)
        probe = Layout(Policy("top", max(service.top_k, 1)), size, heats)
        self.layout = probe if service.top_k else ActualLayout(Policy(ACTUAL, 1), size, heats)
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.client = Client(service.urls, service.limits)
        self.served = probed(service, probe, tokenizer)
        facts = {
            "teacher": self.served.model,
            "tokenizer": self.tokenizer_hash,
            "vocab_size": size,
            "top_k": probe.k if service.top_k else 0,
            "temperature": service.temperature,
        }
        self.store = AnswerStore(self.folder, facts, self.layout)
        first = self.store.first("answers to the probe", self.served.fingerprint)
        check_same_teacher(f"when {self.folder} was begun", first, self.served.fingerprint)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    # ---- what a cache has ----

    def check_tokenizer(self, found: str) -> None:
        """Compare a :func:`~fusedkd.cache.keys.tokenizer_hash` with the one that was probed.

        Raises:
            TeacherError: it is another one.
        """
        if found != self.tokenizer_hash:
            raise TeacherError(
                "the tokenizer is another one than the teacher was asked with: ids mean other "
                "tokens. Expected one for both."
            )

    def check_loss(self, divergence: Divergence, temperature: float) -> None:
        """Whether a loss can be computed from the answers.

        Raises:
            TeacherError: they are at another temperature, or no distributions.
        """
        if self.actual:
            raise TeacherError(
                "the server is asked for the actual tokens' log-probabilities alone: expected "
                "entries (Service(top_k=...)), or --cross_tokenizer alm."
            )
        if temperature != self.service.temperature:
            raise TeacherError(
                f"teacher temperature {temperature:g}: the server is asked at "
                f"{self.service.temperature:g}. Expected the same."
            )

    def check_rows(self, name: str, rows: Iterable[Ids]) -> None:
        """Look at the lengths of a data set's sequences.

        Raises:
            TeacherError: the server takes none so long.
        """
        longest = max((len(ids) for ids in rows), default=0)
        if self.served.most_tokens is not None and longest > self.served.most_tokens:
            raise TeacherError(
                f"--teacher {','.join(self.service.urls)}: a sequence of the {name} data has "
                f"{longest:,} tokens, and the server takes {self.served.most_tokens:,} (its "
                "context less two). Expected shorter ones (--max_length, --block_size), or vllm "
                f"serve --max-model-len {longest + 2}."
            )

    @property
    def actual(self) -> bool:
        """Whether nothing but the log-probabilities of the tokens that are there is asked for."""
        return isinstance(self.layout, ActualLayout)

    def log_probs_of(self, sequences: Sequence[Ids]) -> list[np.ndarray]:
        """(L,) fp32 each: number n is the log-probability of token n + 1 given those up to n; the
        last is 0. They are asked for at the same time.

        Raises:
            TeacherError: no server gives a good answer to one of them.
        """
        assert isinstance(self.layout, ActualLayout)
        rows = zip(sequences, self.columns(sequences), strict=True)
        return [self.layout.log_probs(row, len(ids)) for ids, row in rows]

    def get(self, ids: Ids, temperature: float) -> Target:
        """The teacher's distributions after each of the tokens ``ids``, without padding.

        Raises:
            TeacherError: no server gives a good answer.
        """
        return self.get_many([ids], temperature)[0]

    def get_many(self, sequences: Sequence[Ids], temperature: float) -> list[Target]:
        """:meth:`get` of several, which are asked at the same time.

        Raises:
            TeacherError: no server gives a good answer to one of them.
        """
        rows = zip(sequences, self.columns(sequences), strict=True)
        return [self.layout.decode(row, len(ids), temperature) for ids, row in rows]

    def columns(self, sequences: Iterable[Ids]) -> Iterator[Columns]:
        """A cache's row for each sequence, in their order; no more are asked at a time than there
        are connections.

        Raises:
            TeacherError: no server gives a good answer to one of them.
        """
        waiting: deque[Future[Columns]] = deque()
        pool = self._here()
        try:
            for ids in sequences:
                if len(waiting) >= CONNECTIONS:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(self._row, np.asarray(ids, np.int64)))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    # ---- asking ----

    def _here(self) -> ThreadPoolExecutor:
        """This process' threads; connections and files are not shared over a fork."""
        if self._pool is None or self._pool[0] != os.getpid():
            self.client.here()
            self.store.here()
            self._pool = os.getpid(), ThreadPoolExecutor(CONNECTIONS, "teacher")
        return self._pool[1]

    def _row(self, ids: np.ndarray) -> Columns:
        key = sequence_key(ids, self.tokenizer_hash)
        kept = self.store.get(key, len(ids))
        if kept is not None:
            return kept
        from fusedkd.teachers.asking import ask, ask_actual

        asked = self.client, self.served.protocol, self.served.question
        if isinstance(self.layout, ActualLayout):
            columns = self.layout.encode_log_probs(ask_actual(*asked, ids))
        else:
            columns = self.layout.encode(ask(*asked, self.layout, ids))
        self.store.put(key, len(ids), columns)
        return columns

    def __str__(self) -> str:
        urls = ",".join(self.service.urls)
        return (
            f"{self.served.model}, {self.layout.policy}, from {urls} ({self.served.protocol.name})"
        )
