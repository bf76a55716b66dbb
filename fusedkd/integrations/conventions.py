"""What Liger and TRL mean by their words, and how a host's function is replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fusedkd import divergences
from fusedkd.divergences import Divergence


def generalized_jsd(beta: float) -> Divergence:
    """What Liger and TRL call JSD: forward KL at beta = 0, reverse KL at 1."""
    if beta in (0, 1):
        return divergences.reverse_kl() if beta else divergences.forward_kl()
    return divergences.jsd(float(beta))


def stand_in(module: ModuleType, name: str, ours: Callable[..., Any]) -> None:
    """Put ``ours`` in the place of the host's function ``name``, again and again with no effect.

    Raises:
        ImportError: the host has no such function, or one of another signature: a version that
            ours was not written for, whose calls would mean something else.
    """
    theirs = getattr(module, name, None)
    if theirs is ours:
        return
    where = f"{module.__name__}.{name}"
    if not callable(theirs):
        raise ImportError(f"{where} is not there: {_VERSION}")
    check_signature(where, theirs, ours)
    setattr(module, name, ours)


def check_signature(where: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """That a host's function takes what ours takes, in the same order.

    Raises:
        ImportError: it does not.
    """
    found, expected = (list(inspect.signature(f).parameters) for f in (theirs, ours))
    if found != expected:
        raise ImportError(f"{where} takes {found}, expected {expected}: {_VERSION}")


_VERSION = (
    "this version of the host is not the one that fusedkd.integrations was written for (the "
    "module's first lines name it). Install that one, or call fusedkd.kd_loss yourself."
)
