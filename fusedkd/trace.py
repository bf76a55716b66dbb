"""From a Python function of two log-probabilities to a checked :class:`~fusedkd.tape.Tape`, and
what records the operations of any."""

from __future__ import annotations

import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkd.tape import LN2, Builder, Tape

Formula = Callable[..., Tensor]

# Where a formula is tried: both ends, the ranges in which fp32 and fp64 lose exp, and between.
LOGS = (
    *(-math.inf, -1e4, -746.0, -709.0, -104.0, -88.0, -60.0, -30.0, -10.0, -3.0, -1.0, -0.3),
    *(-1e-2, -1e-4, -1e-7, -1e-12, 0.0),
    *(-k / 8 for k in range(1, 41)),
)


def trace(formula: Formula, parameters: dict[str, float]) -> Tape:
    """What ``formula(lp, lq, **parameters)`` computes, the parameters being any numbers.

    Raises:
        ValueError: an operation that is not elementwise or not known, control flow on values, a
            result that is no tensor made of ``lq``; names the line.
    """
    recorder = Recorder(formula, "lp and lq", "vocabulary entry; kd_loss adds them up")
    numbers = recorder.numbers(parameters, range(len(parameters)))
    inputs = torch.full((2, 3), -1.0).unbind()
    for name, tensor in zip(("lp", "lq"), inputs, strict=True):
        recorder.know(tensor, recorder.builder.node(name))
    tape = recorder.builder.tape(recorder.run(inputs, numbers))
    if tape is None:
        raise ValueError(
            f"{place_of(formula)}: the result does not depend on lq, the student's "
            "log-probabilities."
        )
    return tape


def check(name: str, tape: Tape, parameters: Sequence[float]) -> None:
    """Whether the tape is total, and the divergence one.

    Raises:
        ValueError: NaN somewhere on [-inf, 0]^2, value or derivative, or an infinity where neither
            p nor q is 0; names the point and the remedy.

    Warns:
        UserWarning: not 0 at p = q, or negative for some p and q; says where.
    """
    for dtype in (torch.float64, torch.float32):
        logs = torch.tensor(LOGS, dtype=dtype)
        lp, lq = (x.flatten() for x in torch.meshgrid(logs, logs, indexing="ij"))
        smallest = torch.finfo(dtype).smallest_normal
        absent = (lp.exp() < smallest) | (lq.exp() < smallest)
        for what, result in zip(
            ("value", "derivative in lq"), tape(lp, lq, parameters), strict=True
        ):
            wrong = result.isnan() | (result.isinf() & ~absent)
            if wrong.any():
                at = int(wrong.nonzero()[0])
                point = f"lp = {lp[at].item():g}, lq = {lq[at].item():g}"
                raise ValueError(
                    f"{name}: the {what} is {result[at].item()} at {point} (p = "
                    f"{lp[at].exp().item():.3g}, q = {lq[at].exp().item():.3g}, in {dtype}): "
                    "expected a number. Guard it: torch.where(p > 0, ..., 0.0), p = lp.exp(), or "
                    "(q > 0) likewise."
                )
    _warn_unless_divergence(name, tape, parameters)


def _warn_unless_divergence(name: str, tape: Tape, parameters: Sequence[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 64, 9, generator=generator, dtype=torch.float64)
    lp, lq = logits.log_softmax(-1)
    same = tape(lp, lp, parameters)[0]
    if same.abs().max() > 1e-9:
        at = int(same.abs().argmax())
        warnings.warn(
            f"{name}: not 0 where p = q: {same.flatten()[at]:.3g} at p = q = "
            f"{lp.flatten()[at].exp():.3g}. As a loss it is taken as it is.",
            stacklevel=6,
        )
    sums = tape(lp, lq, parameters)[0].sum(-1)
    if sums.min() < -1e-9:
        row = int(sums.argmin())
        warnings.warn(
            f"{name}: {sums[row]:.3g}, less than 0, between p = {_short(lp[row])} and q = "
            f"{_short(lq[row])}: a divergence never is. As a loss it is taken as it is.",
            stacklevel=6,
        )


def _short(logs: Tensor) -> str:
    return "(" + ", ".join(f"{p:.2g}" for p in logs.exp().tolist()) + ")"


def place_of(formula: Formula) -> str:
    code = formula.__code__
    return f"{formula.__name__} ({code.co_filename}:{code.co_firstlineno})"


class Recorder(TorchDispatchMode):
    """Sees each operation as the formula makes it, while its line is on the stack."""

    def __init__(self, formula: Formula, inputs: str, each: str) -> None:
        """``inputs`` and ``each``: what it is made of, and for, as errors say it."""
        super().__init__()
        self.formula, self.inputs, self.each = formula, inputs, each
        self.builder = Builder()
        self.positions: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no id is used twice

    def numbers(self, parameters: dict[str, float], numbers: Iterable[int]) -> dict[str, Tensor]:
        """The formula's parameters, as it is called with them: the so-manieth of the tape."""
        made = {name: torch.tensor(value) for name, value in parameters.items()}
        for number, tensor in zip(numbers, made.values(), strict=True):
            self.know(tensor, self.builder.node("parameter", number=number))
        return made

    def run(self, inputs: Sequence[Tensor], parameters: dict[str, Tensor]) -> int:
        """Where the result is.

        Raises:
            ValueError: an operation that cannot be recorded; a result that is no tensor of inputs.
        """
        try:
            with torch.no_grad(), self:
                result = self.formula(*inputs, **parameters)
        except RuntimeError as error:  # of several numbers, of which torch makes no operation
            if "Boolean value of Tensor" not in str(error):
                raise
            frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
            line = self._line_of(list(frames)[-1])
            raise ValueError(f"{line}: {_refusal('is_nonzero', self.each)}") from None
        position = self.positions.get(id(result))
        if not isinstance(result, Tensor) or position is None:
            came = "a tensor made elsewhere" if isinstance(result, Tensor) else repr(result)
            where = place_of(self.formula)
            raise ValueError(f"{where}: expected a tensor made of {self.inputs}, and got {came}.")
        return position

    def know(self, tensor: Tensor, position: int) -> None:
        self.kept.append(tensor)
        self.positions[id(tensor)] = position

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        rule = RULES.get(name)
        if rule is None:
            raise ValueError(f"{self._line()}: {_refusal(name, self.each)}")
        given = [self._position(x) for x in args]
        named = {key: self._position(x) for key, x in (kwargs or {}).items()}
        position = rule(self.builder, *given, **named)
        if position is None:
            raise ValueError(f"{self._line()}: {_refusal(name, self.each)}")
        self.know(result, position)
        return result

    def _position(self, x: Any) -> Any:
        """Tensors and numbers as positions; all else (dtypes, sizes) as it is."""
        if isinstance(x, bool) or not isinstance(x, (Tensor, int, float)):
            return x
        if isinstance(x, (int, float)):
            return _Number(self.builder.constant(x))
        if id(x) not in self.positions:
            if x.dim():
                raise ValueError(
                    f"{self._line()}: a tensor of shape {tuple(x.shape)} comes from elsewhere: "
                    f"expected {self.inputs}, the parameters, and numbers."
                )
            with torch._C._DisableTorchDispatch():
                self.know(x, self.builder.constant(float(x)))
        return self.positions[id(x)]

    def _line(self) -> str:
        return self._line_of(sys._getframe(1))

    def _line_of(self, frame: Any) -> str:
        """The innermost line of the formula, or of what it calls in its file."""
        while frame and frame.f_code.co_filename != self.formula.__code__.co_filename:
            frame = frame.f_back
        line = frame.f_lineno if frame else self.formula.__code__.co_firstlineno
        return f"{self.formula.__name__} ({self.formula.__code__.co_filename}:{line})"


class _Number(int):
    """The position of a Python number."""


def _refusal(name: str, each: str) -> str:
    if name in ("_local_scalar_dense", "is_nonzero", "equal"):
        return (
            "control flow on values, or a tensor made a Python number: the formula is recorded "
            "once and runs everywhere, with every value of its parameters: use torch.where, "
            "and torch.log and the like instead of math.log."
        )
    if name.endswith("_") and name.rstrip("_") in RULES:
        return f"{name} writes in place: expected operations that make new tensors."
    known = ", ".join(sorted(set(RULES) - HIDDEN))
    return (
        f"torch's {name} is not known, or not elementwise (the result is one number for each "
        f"{each}): expected operations among {known}."
    )


# ----------------------------------------------------------------------------------------------
# torch's operations in those of the tape

Rule = Callable[..., "int | None"]


def _same(op: str) -> Rule:
    return lambda b, *inputs: b(op, *inputs)


def _plus(op: str, swap: bool = False) -> Rule:
    def rule(b: Builder, x: int, y: int, alpha: int | None = None) -> int:
        y = y if alpha is None else b("mul", alpha, y)
        return b(op, y, x) if swap else b(op, x, y)

    return rule


def _swapped(op: str) -> Rule:
    return lambda b, x, y: b(op, y, x)


def _not(rule: Rule) -> Rule:
    return lambda b, *inputs: b("not", rule(b, *inputs))


def _mask(b: Builder, x: int) -> int:
    return x if b.is_mask(x) else b("not", b("eq", x, b.constant(0)))


def _logic(op: str) -> Rule:
    return lambda b, *inputs: b(op, *(_mask(b, x) for x in inputs))


def _xor(b: Builder, x: int, y: int) -> int:
    x, y = _mask(b, x), _mask(b, y)
    return b("or", b("and", x, b("not", y)), b("and", y, b("not", x)))


def _where_rule(b: Builder, condition: int, x: int, y: int) -> int:
    if not (b.is_mask(x) and b.is_mask(y)):
        return b("where", condition, b.as_float(x), b.as_float(y))
    return b("or", b("and", condition, x), b("and", b("not", condition), y))


def _scaled(op: str, by: float) -> Rule:
    return lambda b, x: b(op, b("mul", x, b.constant(by)))


def _log_to(base: float) -> Rule:
    return lambda b, x: b("div", b("log", x), b.constant(math.log(base)))


def _clamp(b: Builder, x: int, min: int | None = None, max: int | None = None) -> int:
    x = x if min is None else b("maximum", x, min)
    return x if max is None else b("minimum", x, max)


def _div(b: Builder, x: int, y: int, rounding_mode: str | None = None) -> int | None:
    return None if rounding_mode else b("div", x, y)


def _xlogy(b: Builder, x: int, y: int) -> int:
    product = b("mul", x, b("log", y))
    return b("where", b("eq", x, b.constant(0)), b.constant(0), product)


def _cast(b: Builder, x: int, dtype: torch.dtype | None = None, **_: Any) -> int | None:
    """The formula is traced in fp32 and runs in what the rows are computed in."""
    if dtype == torch.bool:
        return _mask(b, x)
    return b.as_float(x) if dtype in (None, torch.float32) else None


def _constant(number: float) -> Rule:
    return lambda b, *_, **__: b.constant(number)


def _full(b: Builder, size: Any, value: int, **_: Any) -> int:
    return value


def _infinite(b: Builder, x: int) -> int:
    return b("eq", b("abs", x), b.constant(math.inf))


RULES: dict[str, Rule] = {
    **{name: _same(name) for name in ("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt")},
    **{name: _same(name) for name in ("tanh", "sigmoid", "sign", "detach", "mul", "pow")},
    **{name: _same(name) for name in ("minimum", "maximum", "logaddexp", "eq", "lt", "le")},
    "add": _plus("add"),
    "sub": _plus("sub"),
    "rsub": _plus("sub", swap=True),
    "div": _div,
    "ne": _not(_same("eq")),
    "gt": _swapped("lt"),
    "ge": _swapped("le"),
    "sgn": _same("sign"),
    "reciprocal": lambda b, x: b("div", b.constant(1), x),
    "rsqrt": lambda b, x: b("div", b.constant(1), b("sqrt", x)),
    "square": lambda b, x: b("mul", x, x),
    "exp2": _scaled("exp", LN2),
    "log2": _log_to(2),
    "log10": _log_to(10),
    "relu": lambda b, x: b("maximum", x, b.constant(0)),
    "clamp": _clamp,
    "clamp_min": lambda b, x, least: b("maximum", x, least),
    "clamp_max": lambda b, x, most: b("minimum", x, most),
    "lerp": lambda b, x, y, share: b("add", x, b("mul", share, b("sub", y, x))),
    "xlogy": _xlogy,
    "where": _where_rule,
    "masked_fill": lambda b, x, mask, number: b("where", mask, number, x),
    "isnan": lambda b, x: b("not", b("eq", x, x)),
    "isinf": _infinite,
    "isfinite": lambda b, x: b("lt", b("abs", x), b.constant(math.inf)),
    **{f"{prefix}_{op}": _logic(op) for prefix in ("logical", "bitwise") for op in ("and", "or")},
    **{f"{prefix}_not": _logic("not") for prefix in ("logical", "bitwise")},
    **{f"{prefix}_xor": _xor for prefix in ("logical", "bitwise")},
    "_to_copy": _cast,
    **{name: lambda b, x, **_: x for name in ("clone", "alias", "lift_fresh", "lift_fresh_copy")},
    "zeros_like": _constant(0),
    "ones_like": _constant(1),
    "full_like": lambda b, x, number, **_: number,
    "scalar_tensor": lambda b, number, **_: number,
    "full": _full,
    **{name: _constant(number) for name, number in (("new_zeros", 0), ("new_ones", 1))},
    "new_full": lambda b, x, size, number, **_: number,
}
HIDDEN = frozenset(("_to_copy", "alias", "lift_fresh", "lift_fresh_copy", "scalar_tensor", "sgn"))
