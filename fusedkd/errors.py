"""The one exception that the command line shows without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Something that the user can put right. The message says what came, what was expected."""


class NotFinite(UserError, ArithmeticError):
    """A loss, or a model's answers, are NaN or infinite; the message says whose, where, and why."""


@contextmanager
def as_user_error(about: str = "", of: type[Exception] | None = None) -> Iterator[None]:
    """What libraries raise about paths, files and values, as a :class:`UserError`.

    To be put around the reading and checking of what a user gave, not around the work: there the
    same exceptions are bugs and want their traceback.

    Args:
        about: what was read or checked, for the message.
        of: what is caught instead; ``Exception`` where a file of somebody's is handed to a library
            as it is, which raises whatever it likes about it.
    """
    kinds: Any = of or (ValueError, TypeError, LookupError, ArithmeticError, OSError, ImportError)
    try:
        yield
    except kinds as error:
        said = " ".join(str(error).split())  # one paragraph
        if not said or isinstance(error, KeyError):  # whose text is only what was looked for
            said = f"{type(error).__name__}: {said}"
        raise UserError(f"{about}: {said}" if about else said) from error


def of_the_machine(error: BaseException) -> str | None:
    """What an exception says about the disk or the memory, without the full stop; None if it is
    about something else. safetensors and torch have their own for what the system says."""
    said = str(error).rstrip(".")
    if isinstance(error, OSError):
        return said
    if type(error).__name__ == "SafetensorError" and "os error" in said:
        return said
    if isinstance(error, RuntimeError) and "inline_container.cc" in said:
        return "torch could not write all of a file: perhaps the disk is full"
    memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and memory):
        return f"there is not enough memory ({said.splitlines()[0] if said else 'MemoryError'})"
    return None
