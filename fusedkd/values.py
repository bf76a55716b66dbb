"""``name(value, key=value)`` as a command line or a recipe writes it. Nothing is evaluated."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_CALL = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<call>[^()]*)\)|:(?P<colon>[^()]*))?\s*")


def split_call(what: str, text: str, example: str) -> tuple[str, list[str], dict[str, str]]:
    """``"f(1, a=2)"`` or ``"f:1, a=2"`` as ``("f", ["1"], {"a": "2"})``.

    Raises:
        ValueError: not of this form.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{what}={text!r}: expected a name with optional values, such as {example}."
        )
    positional: list[str] = []
    named: dict[str, str] = {}
    for part in filter(str.strip, (match["call"] or match["colon"] or "").split(",")):
        key, equals, value = part.rpartition("=")
        if equals:
            named[key.strip()] = value.strip()
        else:
            positional.append(value.strip())
    return match["name"], positional, named


def bind_call(
    what: str, text: str, name: str, factory: Callable[..., Any], args: list[Any], named: Any
) -> Any:
    """``factory(*args, **named)``; arguments that it does not have are named.

    Raises:
        ValueError: too many, or an unknown one.
    """
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(*args, **named)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise ValueError(
            f"{what}={text!r}: {error}; the parameters of {name} are: {known}."
        ) from None
    return factory(*bound.args, **bound.kwargs)


def number(what: str, text: str, value: str) -> float:
    """``value``, a part of ``text``, as a number.

    Raises:
        ValueError: it is none.
    """
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{what}={text!r}: expected a number, not {value.strip()!r}.") from None
