"""Where a teacher is served, and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusedkd.errors import UserError
from fusedkd.models.served import ServedArguments

PROTOCOLS = ("sglang", "trl", "vllm")
CONNECTIONS = 64  # of a process


class TeacherError(UserError, RuntimeError):
    """A server does not answer, or not as a teacher that can be used; the message says what to
    do."""


@dataclass(frozen=True)
class Limits:
    """Times in seconds.

    Args:
        timeout: for one answer, from the first byte sent to the last received.
        patience: for a good answer to one question, over all attempts and servers.
        backoff: of the first wait; each is twice as long, at most 10, and drawn at random below.
    """

    timeout: float = 120.0
    patience: float = 600.0
    backoff: float = 0.1

    def __post_init__(self) -> None:
        for name in ("timeout", "patience"):
            if not 0 < (value := getattr(self, name)) < 1e6:
                raise UserError(f"--teacher_{name} {value:g}: expected seconds above 0.")


def is_url(text: str | None) -> bool:
    """Whether a teacher is behind HTTP, and no folder or hub name."""
    return text is not None and text.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Service:
    """Where a teacher is served, and what is asked of it.

    Args:
        urls: one or more servers of the same model, such as ``http://a:8000``.
        top_k: entries of each token; 0: nothing but how probable the token is that is there.
        temperature: the teacher's. Servers that ignore it are refused.
        protocol: vllm, sglang or trl; None: told by the server.
        model: its name there; None: the only one.
        vocab_size: true vocabulary; None: the tokenizer's.
        ahead: batches that are asked for before training needs them, each by a worker of the data
            loader; 0: none, training waits.
        limits: seconds.
    """

    urls: tuple[str, ...]
    top_k: int = 64
    temperature: float = 1.0
    protocol: str | None = None
    model: str | None = None
    vocab_size: int | None = None
    ahead: int = 4
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.protocol not in (None, *PROTOCOLS):
            raise UserError(
                f"--teacher_protocol {self.protocol}: expected one of {', '.join(PROTOCOLS)}."
            )
        if self.top_k < 0 or (self.top_k == 0 and self.temperature != 1):
            raise UserError(
                f"--teacher_top_k {self.top_k} at temperature {self.temperature:g}: expected "
                "entries, or 0, the actual token's log-probability alone, at temperature 1."
            )
        if not 0 <= self.ahead <= 64:
            raise UserError(f"--teacher_ahead {self.ahead}: expected 0 to 64 batches.")

    @classmethod
    def of(cls, text: str, flags: ServedArguments, **others: Any) -> Service:
        """From addresses and flags."""
        return cls.at(
            text,
            protocol=flags.teacher_protocol,
            model=flags.teacher_model,
            ahead=flags.teacher_ahead,
            limits=Limits(flags.teacher_timeout, flags.teacher_patience),
            **others,
        )

    @classmethod
    def at(cls, text: str, **others: Any) -> Service:
        """From ``http://a:8000,http://b:8000``."""
        urls = tuple(url.strip().rstrip("/").removesuffix("/v1") for url in text.split(","))
        for url in urls:
            if not is_url(url):
                raise UserError(
                    f"--teacher {text}: {url!r} is no address of a server: expected "
                    "http://host:port, or several with commas between."
                )
        return cls(urls, **others)
