"""Asking servers over HTTP, until one gives a good answer or it is clear that none will.

Faults are of two kinds. A server that cannot (503, 429, a stall, a connection that breaks) is asked
again, later or elsewhere, for as long as patience lasts; each server has a circuit breaker. An
answer that is wrong (cut JSON, another sequence's, NaN) is asked for again a few times only.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import orjson
from tenacity import RetryCallState, Retrying, retry_if_exception_type
from tenacity.wait import wait_exponential

from fusedkd.teachers.service import CONNECTIONS, Limits, TeacherError

KEY = "FUSEDKD_TEACHER_API_KEY"  # of the environment: what servers want as a bearer token
MOST_WRONG = 10  # answers to one question that are wrong, one after the other
FAILURES = 5  # of a server, one after the other, that open its circuit
REST = 30.0  # seconds that an open circuit stays so, at most
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
Read = TypeVar("Read")
_DICE = random.Random()  # the global generator is the training's


class Busy(Exception):
    """The server could not. ``after``: seconds that it asks one to wait."""

    after = 0.0


class Wrong(Exception):
    """The server answered, but not what it was asked."""


class Refused(Exception):
    """The server says that the question itself is wrong; asking again changes nothing."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status, self.said = status, said


@dataclass
class _Server:
    """One of them, and its circuit breaker: after some failures in a row nobody asks it for a
    while; then one question tries it."""

    url: str
    in_flight: int = 0
    failures: int = 0
    opens_at: float = 0.0
    said: str = "nothing"  # when it last failed

    def admits(self, now: float) -> bool:
        tried = self.failures >= FAILURES and self.in_flight > 0
        return now >= self.opens_at and not tried

    def done(self, failure: str | None, limits: Limits) -> None:
        self.in_flight -= 1
        self.failures = 0 if failure is None else self.failures + 1
        self.said = failure or self.said
        if self.failures >= FAILURES:
            rest = min(REST, limits.patience / 4, limits.backoff * 2 ** min(self.failures, 20))
            self.opens_at = time.monotonic() + rest * _DICE.uniform(0.5, 1.0)


class Client:
    """Questions to any of some servers that hold the same model. Safe to use from many threads, and
    in processes that were forked or started afresh.

    Args:
        urls: such as ``http://a:8000``.
        limits: see there.
    """

    def __init__(self, urls: Sequence[str], limits: Limits) -> None:
        self.urls, self.limits = tuple(urls), limits
        self._of_parents: list[httpx2.Client] = []  # not to be closed by a child
        self._open()

    def _open(self) -> None:
        self._process: int = os.getpid()
        self._lock = threading.Lock()
        self._servers = [_Server(url) for url in self.urls]
        token = os.environ.get(KEY)
        self._http = httpx2.Client(
            timeout=httpx2.Timeout(self.limits.timeout, connect=min(10.0, self.limits.timeout)),
            limits=httpx2.Limits(max_connections=CONNECTIONS),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {token}"} if token else {}),
        )

    def here(self) -> None:
        """To be called by the first thread of a process that may have been forked: connections are
        not to be shared."""
        if self._process != os.getpid():
            self._of_parents.append(self._http)
            self._open()

    def __reduce__(self) -> tuple[Callable[..., Client], tuple[Any, ...]]:
        return Client, (self.urls, self.limits)

    def ask(self, path: str, body: Any, read: Callable[[bytes], Read], about: str) -> Read:
        """A good answer from any server.

        Args:
            read: makes something of its bytes, or raises :class:`Wrong`.
            about: what is asked, for messages.

        Raises:
            TeacherError: there was none in time, or the question was refused.
        """
        try:
            return self._persist(path, orjson.dumps(body), read, about)
        except Refused as error:
            raise TeacherError(
                f"--teacher {','.join(self.urls)}: {about} is refused: {error}."
            ) from error

    def tell(self, path: str, body: Any = None) -> Any:
        """The JSON that a server has there; asked by GET where there is no ``body``.

        Raises:
            TeacherError: there was none in time.
            Refused: there is nothing there.
        """
        content = None if body is None else orjson.dumps(body)
        return self._persist(path, content, _json, path)

    def _persist(
        self, path: str, content: bytes | None, read: Callable[[bytes], Read], about: str
    ) -> Read:
        wrong = 0

        def enough(state: RetryCallState) -> bool:
            nonlocal wrong
            error = state.outcome.exception() if state.outcome else None
            wrong = wrong + 1 if isinstance(error, Wrong) else 0
            return wrong >= MOST_WRONG or (state.seconds_since_start or 0) > self.limits.patience

        attempts = Retrying(
            retry=retry_if_exception_type((Busy, Wrong)),
            stop=enough,
            wait=self._wait,
            reraise=True,
        )
        try:
            return attempts(self._once, path, content, read)
        except (Busy, Wrong) as error:
            tried = attempts.statistics["attempt_number"]
            raise TeacherError(
                f"--teacher {','.join(self.urls)}: no good answer to {about} in {tried} attempts; "
                f"the last: {error}. Answers so far are kept: once the server is well, the same "
                "command goes on (fusedkd distill with --resume_from_checkpoint last)."
            ) from error

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        longest = wait_exponential(multiplier=self.limits.backoff, max=10.0)(state)
        asked = min(getattr(error, "after", 0.0), REST, self.limits.patience / 4)
        return max(longest * _DICE.random(), asked)

    def _once(self, path: str, content: bytes | None, read: Callable[[bytes], Read]) -> Read:
        server = self._choose()
        failure = None  # an answer that is wrong is none of the server's
        try:
            return read(self.send(server.url, path, content))
        except Busy as error:
            failure = str(error)
            raise
        finally:
            with self._lock:
                server.done(failure, self.limits)

    def _choose(self) -> _Server:
        """The server with the fewest questions."""
        now = time.monotonic()
        with self._lock:
            ready = [server for server in self._servers if server.admits(now)]
            if ready:
                chosen = min(ready, key=lambda server: (server.in_flight, _DICE.random()))
                chosen.in_flight += 1
                return chosen
            first = min(self._servers, key=lambda server: server.opens_at)
        busy = Busy(
            f"{first.said} (after {first.failures} failures in a row, all servers are left "
            "alone for a while)"
        )
        busy.after = max(0.0, first.opens_at - now)
        raise busy

    def send(self, url: str, path: str, content: bytes | None = None) -> bytes:
        """The body of one answer of one server; without ``content`` it is a GET.

        Raises:
            Busy: it cannot answer now.
            Refused: it says that what was asked is wrong.
        """
        method = "GET" if content is None else "POST"
        ends = time.monotonic() + self.limits.timeout
        parts = []
        try:
            with self._http.stream(method, url + path, content=content) as answer:
                for part in answer.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > ends:
                        raise Busy(f"{url} was not done after {self.limits.timeout:g} s")
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise TeacherError(f"--teacher {url}: {error}.") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise Busy(f"{url}: {type(error).__name__}: {error}") from error
        body = b"".join(parts)
        if answer.status_code in AGAIN:
            busy = Busy(f"{url}: HTTP {answer.status_code}: {_said(body)}")
            busy.after = _seconds(answer.headers.get("retry-after"))
            raise busy
        if answer.status_code != 200:
            raise Refused(answer.status_code, _said(body))
        return body


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except ValueError as error:
        raise Wrong(f"{len(body):,} bytes that are no JSON ({error})") from None


def _said(body: bytes) -> str:
    """What a server's error says, in one line."""
    try:
        told = orjson.loads(body)
        told = told.get("error", told.get("detail", told)) if isinstance(told, dict) else told
        told = told.get("message", told) if isinstance(told, dict) else told
    except ValueError:
        told = body.decode(errors="replace")
    return " ".join(str(told).split())[:300]


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date
        return 1.0
