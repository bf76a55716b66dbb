"""Command lines: parsers that answer a mistake with one sentence."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from fusedkd.errors import UserError, as_user_error

Kind = TypeVar("Kind")


class OneSentence(argparse.ArgumentParser):
    """A parser whose complaint comes without the usage, which may be 200 flags."""

    def error(self, message: str) -> NoReturn:
        """Argparse's hook.

        Raises:
            UserError: always.
        """
        if unknown := re.search(r"unrecognized arguments: (\S+)", message):
            self.refuse(unknown[1])
        text = re.sub(r"^argument (\S+): ", _names, message)
        text = re.sub(r"^(\S+): (?=\S+: expected)", r"\1 ", text)  # --flag value: ...
        text = text if len(text) < 300 else text[:300] + "..."
        raise UserError(f"{text} (see {self.prog} --help)")

    def refuse(self, flag: str) -> NoReturn:
        """
        Raises:
            UserError: that there is no such flag, and which there is.
        """
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        raise UserError(f"{flag[:80]}: not a flag{near(flag, flags, self.prog)}")


def _names(match: re.Match[str]) -> str:
    """A flag by one name, and by its older one; not again with dashes for underscores."""
    spelt = {name.replace("-", "_"): name for name in reversed(match[1].split("/"))}
    *older, name = spelt.values()
    return f"{name} ({older[-1]}): " if older else f"{name}: "


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


def add_fields(parser: argparse.ArgumentParser, kind: Any, leave_out: Sequence[str] = ()) -> None:
    """Flags for the fields of a dataclass, spelt as transformers' ``HfArgumentParser`` spells them,
    which is slow to import."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.name in leave_out:
            continue
        listed = get_origin(hints[field.name]) is list
        inner = (*get_args(hints[field.name]), hints[field.name])[0]
        how: dict[str, Any] = {"type": inner, "nargs": "+" if listed else None}
        if inner is bool:
            how = {"type": _truth, "nargs": "?", "const": True}
        dashed = f"--{field.name.replace('_', '-')}"
        how["metavar"] = field.name.rpartition("_")[2].upper()
        names = dict.fromkeys([f"--{field.name}", dashed, *field.metadata.get("aliases", ())])
        default = field.default if field.default is not MISSING else []
        parser.add_argument(*names, default=default, help=field.metadata["help"], **how)


def of_fields(kind: type[Kind], args: argparse.Namespace, **more: Any) -> Kind:
    """The dataclass of what was parsed; its fields leave ``args``.

    Raises:
        UserError: what it checks itself.
    """
    names = [field.name for field in fields(kind) if field.name in args]  # type: ignore[arg-type]
    values = {name: args.__dict__.pop(name) for name in names}
    with as_user_error():
        return kind(**values, **more)


def _truth(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text}: expected true or false")
    return words[text.lower()]


def near(word: str, words: Sequence[str], command: str) -> str:
    """A hint for a flag that is none."""
    matches = difflib.get_close_matches(word[:80], words, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f" (see {command} --help)."


def printable(text: str) -> str:
    """Files of strangers may hold what terminals obey."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
