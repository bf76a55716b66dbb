"""What :func:`fusedkd.divergences.custom` and :func:`fusedkd.row_rules.custom` make of a Python
function, and how a command line names one."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fusedkd.tape import Tape
from fusedkd.values import bind_call, number

# kernels/cpu has room for eight numbers, and keeps one for itself; a row kernel of Triton has seven
MOST_PARAMETERS = 7


class Formula:
    """A function of tensors whose parameters are numbers, with defaults, behind ``*``: recorded on
    a tape, and checked with its defaults."""

    kind = "formula"

    def __init__(
        self, formula: Callable[..., Tensor], defaults: dict[str, float], tape: Tape
    ) -> None:
        self.formula, self.defaults, self.tape = formula, defaults, tape
        self.__name__, self.__doc__ = formula.__name__, formula.__doc__
        self.__module__ = formula.__module__
        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(n, either, default=x) for n, x in defaults.items()]
        self.__signature__ = inspect.Signature(parameters)
        self.check(tuple(defaults.values()))

    def check(self, values: tuple[float, ...]) -> None:
        """Raise unless the tape is right with these parameters."""
        raise NotImplementedError

    def values(self, positional: Sequence[float], named: dict[str, float]) -> tuple[float, ...]:
        """Of all parameters; the others have their defaults.

        Raises:
            TypeError: one that it does not have.
            ValueError: one that is no finite number, or with which :meth:`check` raises.
        """
        bound = self.__signature__.bind(*positional, **named)
        bound.apply_defaults()
        values = tuple(finite_number(self.__name__, *item) for item in bound.arguments.items())
        if values != tuple(self.defaults.values()):
            self.check(values)
        return values

    def __repr__(self) -> str:
        return f"<{self.kind} {self.__module__}.{self.__name__}{self.__signature__}>"


def defaults_of(
    formula: Callable[..., Tensor], where: str, parameters: Sequence[inspect.Parameter]
) -> dict[str, float]:
    """Of the parameters behind ``*``.

    Raises:
        TypeError: one has no number as its default, or there are too many.
    """
    for p in parameters:
        if isinstance(p.default, bool) or not isinstance(p.default, (int, float)):
            raise TypeError(f"{where}: {p.name} needs a number as its default.")
    if len(parameters) > MOST_PARAMETERS:
        raise TypeError(f"{where}: expected at most {MOST_PARAMETERS} parameters.")
    return {p.name: finite_number(formula.__name__, p.name, p.default) for p in parameters}


def finite_number(where: str, name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"{where}({name}={value!r}): expected a finite number.")
    return float(value)


def imported(what: str, text: str, module: str, name: str, kind: type, decorator: str) -> Any:
    """``name`` of a module, as the argument ``what`` asks for it in ``text``.

    Raises:
        ValueError: the module cannot be imported, or has none that ``decorator`` made.
    """
    here = os.getcwd()
    try:
        sys.path.insert(0, here)  # as `python -m` has it; a console script has its own folder
        made = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(
            f"{what}={text!r}: {error}; expected a module that Python finds from here."
        ) from error
    finally:
        sys.path.remove(here)
    if not isinstance(made, kind):
        raise ValueError(f"{what}={text!r}: {module} has no {name} that {decorator} made.")
    return made


def called(
    what: str,
    text: str,
    call: tuple[str, list[str], dict[str, str]],
    factory: Callable[..., Any],
    more: Sequence[float] = (),
) -> Any:
    """What ``factory`` makes of the parameters in ``call``, as :func:`split_call` gives it."""
    name, positional, named = call
    given = [*(number(what, text, x) for x in positional), *more]
    keywords = {key: number(what, text, x) for key, x in named.items()}
    return bind_call(what, text, name, factory, given, keywords)
