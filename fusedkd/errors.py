"""The one exception that the command line shows without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "as_user_error"]


class UserError(Exception):
    """Something that the user can put right. The message says what came, what was expected."""


@contextmanager
def as_user_error(about: str = "") -> Iterator[None]:
    """What libraries raise about paths, files and values, as a :class:`UserError`.

    To be put around the reading and checking of what a user gave, not around the work: there the
    same exceptions are bugs and want their traceback.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise UserError(f"{about}: {error}" if about else str(error)) from error
