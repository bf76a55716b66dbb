"""What can be wrong with a cache, or with what is asked of it."""

from __future__ import annotations

from typing import Any

from fusedkd.errors import UserError


class CacheError(UserError, ValueError):
    """A cache that does not fit what is asked of it; the message says what to do."""


class Damaged(CacheError):
    """Bytes on the disk are not those that were written; the message names the file."""


def short(value: Any) -> str:
    """For messages: what anybody may have written, as a few characters that can be printed."""
    text = ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:40] + "..."
