"""Command lines: parsers that answer a mistake with one sentence."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from fusedkd.errors import UserError

__all__ = ["OneSentence", "Parser", "near", "number"]


class OneSentence(argparse.ArgumentParser):
    """A parser whose complaint comes without the usage, which may be 200 flags."""

    def error(self, message: str) -> NoReturn:
        """Argparse's hook.

        Raises:
            UserError: always.
        """
        if unknown := re.search(r"unrecognized arguments: (\S+)", message):
            self.refuse(unknown[1])
        text = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1: ", message)  # a flag by one name
        text = re.sub(r"^(\S+): (?=\S+: expected)", r"\1 ", text)  # --flag value: ...
        text = text if len(text) < 300 else text[:300] + "..."
        raise UserError(f"{text} (see {self.prog} --help)")

    def refuse(self, flag: str) -> NoReturn:
        """
        Raises:
            UserError: that there is no such flag, and which there is.
        """
        known = [name for name in self._option_string_actions if name.startswith("--")]
        raise UserError(f"{flag[:80]}: not a flag{near(flag, known, self.prog)}")


class Parser(OneSentence):
    """Of one command; its ``name`` is what comes after ``fusedkd``."""

    def __init__(self, name: str, about: str, epilog: str | None = None, **more: Any) -> None:
        super().__init__(
            prog=f"fusedkd {name}",
            description=about,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )


def number(least: float, most: float = 2**31 - 1, kind: type = int) -> Any:
    """An argument's ``type``: a number from ``least`` to ``most``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:  # NaN is not
            raise argparse.ArgumentTypeError(f"{text}: expected {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def near(word: str, known: Sequence[str], command: str) -> str:
    """A hint for a flag that is none."""
    found = difflib.get_close_matches(word[:80], known, n=1)
    return f"; did you mean {found[0]!r}?" if found else f" (see {command} --help)."
