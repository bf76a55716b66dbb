"""``name(value, key=value)`` as a command line or a recipe writes it. Nothing is evaluated."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from fusedkd import divergences

__all__ = ["bind_call", "parse_divergence", "split_call"]

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


def parse_divergence(text: str) -> divergences.Divergence:
    """The divergence that ``text`` describes, as a command line or a recipe writes it.

    ``"forward_kl"``, ``"jsd(beta=0.3)"``, ``"jsd(0.3)"`` and ``"jsd:0.3"`` are all understood;
    parameters that are not given have the default of the factory in :mod:`fusedkd.divergences`.
    Nothing is evaluated.

    Raises:
        ValueError: not of this form, an unknown name or parameter, or a parameter outside its
            range.
    """
    name, positional, named = split_call("divergence", text, "'forward_kl' or 'jsd(beta=0.3)'")
    if name not in divergences.names():
        divergences.make(name)  # raises, naming the alternatives
    return bind_call(
        "divergence",
        text,
        name,
        getattr(divergences, name),
        [_number(text, value) for value in positional],
        {key: _number(text, value) for key, value in named.items()},
    )


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"divergence={text!r}: expected a number, not {value.strip()!r}."
        ) from None
