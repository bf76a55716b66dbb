"""The one exception that the command line shows without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "as_user_error", "of_the_disk"]


class UserError(Exception):
    """Something that the user can put right. The message says what came, what was expected."""


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
    kinds = (ValueError, TypeError, KeyError, OSError, ImportError) if of is None else of
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        said = str(error) or type(error).__name__
        raise UserError(f"{about}: {said}" if about else said) from error


def of_the_disk(error: BaseException) -> str | None:
    """What an exception says about the disk, without the full stop; None if it is about something
    else. safetensors and torch have their own for what the system says while they write."""
    if isinstance(error, OSError):
        return str(error).rstrip(".")
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return str(error).rstrip(".")
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
        return "torch could not write all of a file; is the disk full?"
    return None
