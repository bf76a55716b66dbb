"""``--teacher NAME=SOURCE`` on a command line. Imports nothing that takes its time."""

from __future__ import annotations

import re
from collections.abc import Sequence

NAMED = re.compile(r"([A-Za-z_][\w-]*)=(\S+)")


def joined(words: Sequence[str]) -> list[str]:
    """The words of a command line, of which ``--teacher NAME=SOURCE`` given several times is one
    flag. As of any other flag, the last of those without a name counts."""
    kept: list[str] = []
    named: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != "--teacher":
            kept.append(word)
            continue
        value = value if equals else next(rest, "")
        if NAMED.fullmatch(value):
            named.append(value)
        else:
            kept += [flag, value]
    return [*kept, "--teacher", " ".join(named)] if named else kept
