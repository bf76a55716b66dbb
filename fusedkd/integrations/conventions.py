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
    theirs_of(module, name, ours)
    setattr(module, name, ours)


def theirs_of(module: ModuleType, name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """The host's function ``name``, which ``ours`` can take the place of, or has taken.

    Raises:
        ImportError: as :func:`stand_in`.
    """
    theirs, where = getattr(module, name, None), f"{module.__name__}.{name}"
    if not callable(theirs):
        raise ImportError(f"{where} is not there: {_VERSION}")
    check_signature(where, theirs, ours)
    return theirs


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
