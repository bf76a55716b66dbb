"""What can be wrong with a cache, or with what is asked of it."""

from __future__ import annotations

from fusedkd.errors import UserError

__all__ = ["CacheError", "Damaged"]


class CacheError(UserError, ValueError):
    """A cache that does not fit what is asked of it; the message says what to do."""


class Damaged(CacheError):
    """Bytes on the disk are not those that were written; the message names the file."""
