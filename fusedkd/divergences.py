"""The divergences D(p, q) between a teacher distribution p and a student distribution q.

Each is one factory here, one function of the same name in ``kernels/triton/pointwise.py`` and one
in ``kernels/cpu/pointwise.h``; nothing else in the project knows which ones there are. The factory
checks the parameters' range and carries the formula in plain torch (``Divergence.value``), which
has no hand-written gradient and is what the kernels are tested against.

Conventions shared by the three files, for one vocabulary entry with lp = log p and lq = log q
(natural log):

* an entry with p = 0 contributes no p log p; one with q = 0 contributes no q log q;
* where the mathematics says infinity (forward KL with q = 0 < p, reverse KL with p = 0 < q) the
  value is infinite and the gradient stays finite: the infinite gap counts as 0 in it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedkd.formulas import Formula, called, defaults_of, finite_number, imported
from fusedkd.tape import Tape
from fusedkd.trace import check, trace
from fusedkd.values import split_call

__all__ = [
    "Divergence",
    "alpha",
    "alpha_beta",
    "custom",
    "forward_kl",
    "jsd",
    "mixed_kl",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]


@dataclass(frozen=True)
class Divergence:
    """A divergence and its parameters, as :func:`fusedkd.kd_loss` takes it.

    ``value(lp, lq)`` maps log-probabilities of one shape to the elementwise contributions; their
    sum over the vocabulary is the divergence in nats. Two are equal when name, key and parameters
    are.

    Make one of your own with :func:`custom`; one made by hand needs a name of its own, and runs on
    ``backend="reference"`` only.

    Attributes:
        key: what the kernels know the formula by, and :func:`make` too: the name of one of this
            module's factories, or of a recorded tape; None for one that is made by hand.
    """

    name: str
    params: tuple[float, ...] = ()
    value: Callable[[Tensor, Tensor], Tensor] = field(kw_only=True, compare=False, repr=False)
    tape: Tape | None = field(default=None, kw_only=True, compare=False, repr=False)
    key: str | None = field(default=None, init=False, repr=False)

    @property
    def builtin(self) -> bool:
        return self.key is not None and self.tape is None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.builtin:
            return make, (self.name, *self.params)  # closures do not pickle; their recipe does
        if self.tape is not None:
            return recorded, (self.name, self.params, self.tape)
        return _own, (self.name, self.params, self.value)


def recorded(name: str, params: tuple[float, ...], tape: Tape) -> Divergence:
    """The divergence that ``tape`` computes with these parameters."""
    value = functools.partial(_Recorded.apply, tape, params)
    made, key = Divergence(name, params, value=value, tape=tape), f"{name}#{tape.key}"
    object.__setattr__(made, "key", key)
    _TAPES[key] = name, tape
    return made


def recorded_tape(key: str) -> Tape | None:
    """Of a divergence that :func:`custom` made, by its key."""
    return _TAPES[key][1] if key in _TAPES else None


class _Recorded(torch.autograd.Function):
    """A tape with the derivative that was recorded, which is finite where autograd's may be NaN."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, params: tuple[float, ...], lp: Tensor, lq: Tensor) -> Tensor:
        value, grad = tape(lp, lq, params)
        ctx.save_for_backward(torch.where(grad.isinf(), 0.0, grad))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return None, None, None, upstream * grad


class Custom(Formula):
    """A formula of one's own: call it with its parameters for a :class:`Divergence`."""

    kind = "divergence"

    def __init__(self, formula: Callable[..., Tensor]) -> None:
        defaults = _defaults(formula)
        super().__init__(formula, defaults, trace(formula, defaults))

    def check(self, values: tuple[float, ...]) -> None:
        check(self.__name__, self.tape, values)

    def __call__(self, *positional: float, **named: float) -> Divergence:
        """The divergence with these parameters; the others have their defaults.

        Raises:
            TypeError: a parameter that it does not have.
            ValueError: one that is no finite number, or with which the formula is not total.
        """
        return recorded(self.__name__, self.values(positional, named), self.tape)


def _defaults(formula: Callable[..., Tensor]) -> dict[str, float]:
    """The parameters of a formula: numbers with defaults behind ``*``."""
    where = f"divergences.custom: {formula.__name__}{inspect.signature(formula)}"
    parameters = list(inspect.signature(formula).parameters.values())
    first, rest = parameters[:2], parameters[2:]
    keywords = all(p.kind is p.KEYWORD_ONLY for p in rest)
    if len(first) < 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in first) or not keywords:
        raise TypeError(f"{where}: expected (lp, lq, *, parameter=default, ...).")
    return defaults_of(formula, where, rest)


def custom(formula: Callable[..., Tensor]) -> Custom:
    """A decorator: a divergence of your own, at the speed of those here.

    >>> @divergences.custom
    ... def tsallis(lp, lq, *, order=0.5):
    ...     p, q = lp.exp(), lq.exp()
    ...     return (order * p + (1 - order) * q - p**order * q**(1 - order)) / (order * (1 - order))
    >>> loss = kd_loss(student, teacher, divergence=tsallis(order=0.7))

    ``formula(lp, lq, *, parameter=default, ...)`` gets log p and log q of the vocabulary's entries
    as tensors of one shape, in [-inf, 0], and returns each entry's contribution; their sum is the
    divergence. It is recorded once, as the elementwise torch operations that it makes, and
    differentiated in lq; each backend turns them into the code that its own divergences are made
    of. The first call on a CPU compiles for some seconds, into ``$FUSEDKD_CACHE`` (the user's
    cache folder); parameters are numbers at run time and compile nothing.

    Raises:
        TypeError: a signature of another kind.
        ValueError: an operation that is not known or not elementwise, or control flow on values, in
            which line; NaN at some point of [-inf, 0]^2, an infinity where p and q are positive, of
            the value or its derivative; a name that is taken.

    Warns:
        UserWarning: not 0 at p = q, or negative for some p and q.
    """
    if not callable(formula) or not hasattr(formula, "__code__"):
        raise TypeError(f"divergences.custom({formula!r}): expected a Python function.")
    if formula.__name__ in _FACTORIES:
        raise ValueError(
            f"divergences.custom: {formula.__name__!r} is the name of one of ours, which "
            "kd_loss(divergence=...) takes as a string: expected another."
        )
    return Custom(formula)


def _own(name: str, params: tuple[float, ...], value: Callable[..., Tensor]) -> Divergence:
    return Divergence(name, params, value=value)


def _builtin(name: str, *params: float, value: Callable[[Tensor, Tensor], Tensor]) -> Divergence:
    made = Divergence(name, params, value=value)
    object.__setattr__(made, "key", name)
    return made


def names() -> list[str]:
    """The names that ``kd_loss(divergence=...)`` takes as strings."""
    return list(_FACTORIES)


def make(name: str, *params: float) -> Divergence:
    """The divergence that ``name`` describes, with its default parameters unless they are given.

    Args:
        name: ``"jsd"``; or with its parameters as a command line or a recipe writes them,
            ``"jsd(beta=0.3)"``, ``"jsd(0.3)"``, ``"jsd:0.3"``. Nothing is evaluated. One of your
            own is ``"my_module:tsallis(order=0.7)"``: **the module is imported**.
        params: the parameters, where the name has none.

    Raises:
        TypeError: not a string.
        ValueError: an unknown name or parameter, or a parameter outside its range; a module that
            cannot be imported, or has no such :func:`custom` divergence.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"divergence={name!r}: expected a name or an object from fusedkd.divergences, such as "
            '"forward_kl" or divergences.jsd(beta=0.3) (called, not the function itself).'
        )
    if name in _FACTORIES:
        return _FACTORIES[name](*params)
    if name in _TAPES:
        title, tape = _TAPES[name]
        return recorded(title, tuple(params), tape)
    module, text = split_module(name)
    call = split_call("divergence", text, "'forward_kl' or 'jsd(beta=0.3)'")
    if module:
        factory = imported("divergence", name, module, call[0], Custom, "@divergences.custom")
    elif (factory := _FACTORIES.get(call[0])) is None:
        near = difflib.get_close_matches(call[0], names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"divergence={name!r}: expected one of {', '.join(names())}.{hint}")
    made: Divergence = called("divergence", name, call, factory, params)
    return made


def split_module(name: str) -> tuple[str, str]:
    """``"my_module:tsallis(order=0.7)"`` as ``("my_module", "tsallis(order=0.7)")``; no module is
    ``""``, as in ``"jsd:0.3"``.
    """
    match = re.fullmatch(r"\s*([A-Za-z_][\w.]*):([A-Za-z_]\w*\s*(?:[(:].*)?)", name)
    return (match[1], match[2]) if match and match[1] not in _FACTORIES else ("", name)


def resolve(divergence: str | Divergence) -> Divergence:
    """What a caller gives as ``divergence``, as an object.

    Raises:
        TypeError, ValueError: as :func:`make`; or a hand-made object with the name of one of these,
            whose formula the kernels would run instead of its own.
    """
    made = divergence if isinstance(divergence, Divergence) else make(divergence)
    if made.name in _FACTORIES and not made.builtin:
        raise ValueError(
            f"divergence={made!r} is hand-made, but {made.name!r} is the name of "
            f"divergences.{made.name}(), whose formula the kernels would run: expected a name of "
            "its own; @divergences.custom makes one that the kernels run."
        )
    return made


# ----------------------------------------------------------------------------------------------
# between measures


@functools.cache
def measure_term(divergence: Divergence) -> float:
    """c such that f(log p, log q) + c (q - p) is the divergence between two *measures*: 0 where p =
    q and positive elsewhere, whatever they sum to (for forward KL it is 1: Minka 2005,
    MSR-TR-2005-173, sec. 2).

    It takes away the slope that f has at p = q, -c q.

    Raises:
        ValueError: a divergence of one's own that has no such form.
    """
    lp, lq = torch.meshgrid(*[_GRID.clone(), _GRID.clone()], indexing="ij")
    with torch.inference_mode(False), torch.enable_grad():
        lq = lq.clone().requires_grad_()
        value = divergence.value(lp, lq)
        (slope,) = torch.autograd.grad(value.sum(), lq)
    c = -float(slope[-1, -1])  # where both are 1
    if not divergence.builtin:
        gap = value.detach() + c * (lq.detach().exp() - lp.exp())
        flat = torch.stack([gap.diagonal(), slope.diagonal() + c * _GRID.exp()])
        if not (gap > -1e-9).all() or not (flat.abs() < 1e-9).all():
            raise ValueError(
                f"divergence={divergence.name!r} is none between measures, and tail='generalized' "
                "compares such: with c (q - p) added it would have to be 0 at p = q and nowhere "
                "negative. Use tail='bucket' or 'conditional'."
            )
    return c


_GRID = torch.linspace(-12.0, 0.0, 25, dtype=torch.float64, device="cpu")

# ----------------------------------------------------------------------------------------------
# helpers of the formulas


def _unit(where: str, name: str, value: float, remedy: str, *, zero: bool, one: bool) -> float:
    """Check that ``value`` lies in the unit interval, with or without its ends."""
    value = finite_number(where, name, value)
    if not 0.0 <= value <= 1.0 or (value == 0.0 and not zero) or (value == 1.0 and not one):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{where}({name}={value:g}): {name} must lie in {interval}. {remedy}")
    return value


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor, and 0 where weight is 0 whatever the factor (a NaN weight stays NaN)."""
    return weight * torch.where(weight == 0, torch.zeros_like(factor), factor)


def _log_positive(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x).log()


def _exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x), and where it is infinite; there it is 0 instead and passes no gradient."""
    infinite = x.detach().exp() == math.inf
    return torch.where(infinite, -math.inf, x).exp(), infinite


# ----------------------------------------------------------------------------------------------
# the divergences


def forward_kl() -> Divergence:
    """KL(p || q) = sum p (log p - log q), the loss of Hinton et al. 2015 (arXiv 1503.02531), sec.
    2.

    Covers every mode of the teacher; its gradient in the student's logits is (q - p) / T.
    """

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        return _times(lp.exp(), lp - lq)

    return _builtin("forward_kl", value=value)


def reverse_kl() -> Divergence:
    """KL(q || p) = sum q (log q - log p): mode-seeking, as in MiniLLM (Gu et al. 2024, arXiv
    2306.08543).
    """

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        q, absent = lq.exp(), lp == -math.inf
        finite = _times(q, lq - torch.where(absent, lq.detach(), lp))
        return torch.where(absent & (q > 0), finite + math.inf, finite)

    return _builtin("reverse_kl", value=value)


def mixed_kl(weight: float = 0.5) -> Divergence:
    """weight * KL(p || q) + (1 - weight) * KL(q || p), weight in [0, 1].

    0.5 is half of the symmetric Jeffreys divergence. The ends are exactly :func:`reverse_kl` (0)
    and :func:`forward_kl` (1).
    """
    weight = _unit(
        "mixed_kl", "weight", weight, "It is the share of forward KL.", zero=True, one=True
    )
    if weight in (0.0, 1.0):
        return forward_kl() if weight else reverse_kl()
    forward, reverse = forward_kl().value, reverse_kl().value

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        return weight * forward(lp, lq) + (1 - weight) * reverse(lp, lq)

    return _builtin("mixed_kl", weight, value=value)


def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta)
    q.

    Agarwal et al. 2024 (GKD, arXiv 2306.13649), eq. 1. ``beta`` in (0, 1). At both ends the
    divergence vanishes identically; libraries that answer with a KL there are discontinuous in
    beta, so this one raises.
    """
    remedy = (
        "Its limits are 0: use forward_kl() instead of beta=0 and reverse_kl() instead of beta=1."
    )
    beta = _unit("jsd", "beta", beta, remedy, zero=False, one=False)

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        p, q = lp.exp(), lq.exp()
        lm = _log_positive(beta * p + (1 - beta) * q)
        return beta * _times(p, lp - lm) + (1 - beta) * _times(q, lq - lm)

    return _builtin("jsd", beta, value=value)


def skew_forward_kl(lam: float = 0.1) -> Divergence:
    """KL(p || m), m = lam p + (1 - lam) q, lam in [0, 1): DistiLLM (Ko et al. 2024, arXiv
    2402.03898), sec. 3.1.

    lam = 0 is exactly :func:`forward_kl`.
    """
    remedy = "At lam=1 the divergence is identically 0."
    lam = _unit("skew_forward_kl", "lam", lam, remedy, zero=True, one=False)
    if lam == 0.0:
        return forward_kl()

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        p, q = lp.exp(), lq.exp()
        return _times(p, lp - _log_positive(lam * p + (1 - lam) * q))

    return _builtin("skew_forward_kl", lam, value=value)


def skew_reverse_kl(lam: float = 0.1) -> Divergence:
    """KL(q || m), m = lam q + (1 - lam) p, lam in [0, 1): DistiLLM (Ko et al. 2024, arXiv
    2402.03898), sec. 3.1.

    lam = 0 is exactly :func:`reverse_kl`.
    """
    remedy = "At lam=1 the divergence is identically 0."
    lam = _unit("skew_reverse_kl", "lam", lam, remedy, zero=True, one=False)
    if lam == 0.0:
        return reverse_kl()

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        p, q = lp.exp(), lq.exp()
        return _times(q, lq - _log_positive(lam * q + (1 - lam) * p))

    return _builtin("skew_reverse_kl", lam, value=value)


def total_variation() -> Divergence:
    """sum |p - q| / 2, in [0, 1]: f-DISTILL (Wen et al. 2023, arXiv 2307.15190). The gradient is 0
    at ties.
    """

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        return (lp.exp() - lq.exp()).abs() / 2

    return _builtin("total_variation", value=value)


def alpha(alpha: float = 0.5) -> Divergence:
    """Amari's alpha-divergence (sum p^a q^(1-a) - 1) / (a (a - 1)), a finite and neither 0 nor 1.

    Amari 2016, *Information Geometry and Its Applications*, ch. 2. The limits are
    :func:`reverse_kl` (a -> 0) and :func:`forward_kl` (a -> 1); a = 0.5 is four times the squared
    Hellinger distance. Outside [0, 1] it is infinite where one side has an entry that the other
    lacks.
    """
    a = finite_number("alpha", "alpha", alpha)
    if a in (0.0, 1.0):
        raise ValueError(
            f"alpha(alpha={a:g}): the limit is {'forward_kl()' if a else 'reverse_kl()'}, use that."
        )

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        p, q = lp.exp(), lq.exp()
        neither = (lp == -math.inf) & (lq == -math.inf)
        cross, infinite = _exp(torch.where(neither, -math.inf, a * lp + (1 - a) * lq))
        finite = (cross - a * p - (1 - a) * q) / (a * (a - 1))
        return torch.where(infinite, finite + math.inf, finite)

    return _builtin("alpha", a, value=value)


def alpha_beta(alpha: float = 0.2, beta: float = 0.7) -> Divergence:
    """-(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b), summed; a, b and a + b not 0.

    ABKD (Wang et al. 2025, arXiv 2505.04560), after Cichocki et al. 2011 (*Entropy* 13), eq. 19. a
    = 1, b -> 0 is forward KL; a -> 0, b = 1 reverse KL; a + b = 1 is :func:`alpha`.
    """
    a, b = finite_number("alpha_beta", "alpha", alpha), finite_number("alpha_beta", "beta", beta)
    if a == 0.0 or b == 0.0 or a + b == 0.0:
        remedy = "(1, 0) is forward_kl() and (0, 1) is reverse_kl()."
        raise ValueError(
            f"alpha_beta(alpha={a:g}, beta={b:g}): neither they nor their sum may be 0. {remedy}"
        )

    def value(lp: Tensor, lq: Tensor) -> Tensor:
        absent_p, absent_q = lp == -math.inf, lq == -math.inf
        neither = absent_p & absent_q
        terms, infinite = [], torch.zeros_like(neither)
        for exponent in (a * lp + b * lq, (a + b) * lp, (a + b) * lq):
            term, over = _exp(torch.where(neither, -math.inf, exponent))
            terms.append(term)
            infinite = infinite | over
        cross, power_p, power_q = terms
        finite = -(cross - a / (a + b) * power_p - b / (a + b) * power_q) / (a * b)
        return torch.where(infinite, finite + math.inf, finite)

    return _builtin("alpha_beta", a, b, value=value)


_TAPES: dict[str, tuple[str, Tape]] = {}  # by key: what torch.compile's graphs name
_FACTORIES: dict[str, Callable[..., Divergence]] = {
    name: globals()[name] for name in __all__ if name not in ("Divergence", "custom")
}
