"""An elementwise function of log p and log q as a tape of operations, with its derivative; or one
of a row's statistics, which has none.

What :func:`fusedkd.divergences.custom` and :func:`fusedkd.row_rules.custom` record and the
backends' emitters render: one table of operations here, one small renderer a language there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)


class Node(NamedTuple):
    """One operation. Inputs are positions of earlier nodes."""

    op: str  # of OPERATIONS, or "lp", "lq", "parameter" (`number`-th), "constant" (`number`)
    inputs: tuple[int, ...] = ()
    number: float = 0.0


class Tape(NamedTuple):
    """``value`` and ``grad`` = d value / d log q are positions among the nodes; of a function of
    parameters alone, which are then a row's numbers, both are the value."""

    nodes: tuple[Node, ...]
    value: int
    grad: int

    @property
    def key(self) -> str:
        """The same for the same operations, in every process."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def entry(self, node: Node) -> str | None:
        """Which of the numbers lp, lq, gap = lp - lq, p, q it is, which the kernels have already,
        and to more digits.
        """
        inner = [self.nodes[i].op for i in node.inputs]
        if node.op == "exp" and inner[0] in ("lp", "lq"):
            return inner[0][1]
        if node.op == "sub" and inner == ["lp", "lq"]:
            return "gap"
        return node.op if node.op in ("lp", "lq") else None

    def numeric(self) -> list[bool]:
        """Of each node, whether it is made of parameters and constants alone."""
        found: list[bool] = []
        for node in self.nodes:
            found.append(node.op not in ("lp", "lq") and all(found[i] for i in node.inputs))
        return found

    def __call__(
        self, lp: Tensor, lq: Tensor, parameters: Sequence[float | Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Value and gradient, elementwise, in the dtype of ``lp`` and ``lq``."""
        leaves = {"lp": lp, "lq": lq}
        results: list[Tensor] = []
        for node in self.nodes:
            if node.op in leaves:
                results.append(leaves[node.op])
            elif node.op == "constant":
                results.append(lp.new_tensor(node.number))
            elif node.op == "parameter":
                number = parameters[int(node.number)]
                results.append(number if isinstance(number, Tensor) else lp.new_tensor(number))
            else:
                results.append(OPERATIONS[node.op].torch(*(results[i] for i in node.inputs)))
        shape = torch.broadcast_shapes(lp.shape, lq.shape)
        value, grad = results[self.value], results[self.grad]
        return value.to(lp.dtype).expand(shape), grad.to(lp.dtype).expand(shape)


class Builder:
    """Nodes in the making; the same operation on the same inputs is one node."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.positions: dict[Node, int] = {}

    def node(self, op: str, *inputs: int, number: float = 0.0) -> int:
        made = Node(op, inputs, float(number))
        key = made if number == number else Node(op, inputs)  # a NaN equals nothing
        if key not in self.positions:
            self.positions[key] = len(self.nodes)
            self.nodes.append(made)
        return self.positions[key]

    def constant(self, number: float) -> int:
        return self.node("constant", number=number)

    def is_mask(self, position: int) -> bool:
        return self.nodes[position].op in MASKS

    def number(self, position: int) -> float | None:
        node = self.nodes[position]
        return node.number if node.op == "constant" else None

    def __call__(self, op: str, *inputs: int) -> int:
        """An operation, in its simplest form."""
        a, b = (inputs + inputs)[:2]
        numbers = [self.number(i) for i in inputs]
        x, y = (numbers + numbers)[:2]
        if op in NUMERIC:  # True counts as 1
            floats = tuple(self.as_float(i) for i in inputs)
            if floats != inputs:
                return self(op, *floats)
        if op not in MASKS and None not in numbers:
            folded = OPERATIONS[op].torch(*(torch.tensor(n, dtype=torch.float64) for n in numbers))
            return self.constant(float(folded))
        if op == "mul" and (x == 1 or y == 1):
            return b if x == 1 else a
        if op == "mul" and (x == -1 or y == -1):
            return self("neg", b if x == -1 else a)
        if (op == "div" and y == 1) or (op in ("add", "sub") and y == 0):
            return a
        if op == "add" and x == 0:
            return b
        if op == "neg" and self.nodes[a].op == "neg":
            return self.nodes[a].inputs[0]
        if op == "where" and inputs[1] == inputs[2]:
            return inputs[1]
        if op == "pow":
            return self.power(a, b)
        return self.node(op, *inputs)

    def as_float(self, position: int) -> int:
        if not self.is_mask(position):
            return position
        return self.node("where", position, self.constant(1), self.constant(0))

    def power(self, base: int, exponent: int) -> int:
        """exp(x) ** y is exp(x y), which does not underflow on the way; small whole powers
        multiply.
        """
        if self.nodes[base].op == "exp":
            return self("exp", self("mul", self.nodes[base].inputs[0], exponent))
        number = self.number(exponent)
        if number == 0.5:
            return self("sqrt", base)
        if number is None or number != int(number) or not 1 <= abs(number) <= 8:
            return self.node("pow", base, exponent)
        product = base
        for bit in bin(int(abs(number)))[3:]:
            product = self("mul", product, product)
            if bit == "1":
                product = self("mul", product, base)
        return product if number > 0 else self("div", self.constant(1), product)

    def tape(self, value: int) -> Tape | None:
        """With its derivative in log q, made forwards; None where that is 0 everywhere."""
        value = self.as_float(value)
        slopes: list[int | None] = []
        for position, node in enumerate(list(self.nodes)):
            slope = self.constant(1) if node.op == "lq" else None
            inner = [slopes[i] for i in node.inputs]
            if any(s is not None for s in inner) and node.op not in MASKS:
                slope = OPERATIONS[node.op].slope(self, position, node.inputs, inner)
            slopes.append(slope)
        grad = slopes[value]
        return None if grad is None else pruned(self.nodes, value, grad)

    def constant_tape(self, value: int) -> Tape:
        """Without a derivative."""
        value = self.as_float(value)
        return pruned(self.nodes, value, value)


def pruned(nodes: Sequence[Node], value: int, grad: int) -> Tape:
    """What the two need, and nothing else."""
    wanted = {value, grad}
    for position in reversed(range(len(nodes))):
        if position in wanted:
            wanted.update(nodes[position].inputs)
    kept = sorted(wanted)
    places = {old: new for new, old in enumerate(kept)}
    renumbered = (
        nodes[old]._replace(inputs=tuple(places[i] for i in nodes[old].inputs)) for old in kept
    )
    return Tape(tuple(renumbered), places[value], places[grad])


# ----------------------------------------------------------------------------------------------
# the operations

Slopes = list["int | None"]
Rule = Callable[[Builder, int, tuple[int, ...], Slopes], "int | None"]


class Operation(NamedTuple):
    torch: Callable[..., Any]
    slope: Rule  # (builder, position, inputs, slopes of the inputs) -> slope of the result


def _chain(factor: Callable[[Builder, int, int], int]) -> Rule:
    """Of one argument: f'(x) times its slope."""

    def rule(b: Builder, out: int, inputs: tuple[int, ...], slopes: Slopes) -> int | None:
        assert slopes[0] is not None
        return b("mul", factor(b, out, inputs[0]), slopes[0])

    return rule


def _over(denominator: Callable[[Builder, int, int], int], factor: float = 1.0) -> Rule:
    """Of one argument: its slope over something. Not times 1 / that, which overflows first."""

    def rule(b: Builder, out: int, inputs: tuple[int, ...], slopes: Slopes) -> int | None:
        assert slopes[0] is not None
        top = b("mul", b.constant(factor), slopes[0])
        return b("div", top, denominator(b, out, inputs[0]))

    return rule


def _none(b: Builder, out: int, inputs: tuple[int, ...], slopes: Slopes) -> None:
    return None


def _sum(b: Builder, *terms: int | None) -> int | None:
    total: int | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else b("add", total, term)
    return total


def _times(b: Builder, slope: int | None, *factors: int) -> int | None:
    for factor in factors:
        slope = None if slope is None else b("mul", slope, factor)
    return slope


def _neg(b: Builder, x: int | None) -> int | None:
    return None if x is None else b("neg", x)


def _either(b: Builder, condition: int, x: int | None, y: int | None) -> int:
    zero = b.constant(0)
    return b("where", condition, zero if x is None else x, zero if y is None else y)


def _div(b: Builder, out: int, inputs: tuple[int, ...], slopes: Slopes) -> int | None:
    top = _sum(b, slopes[0], _neg(b, _times(b, slopes[1], out)))
    return None if top is None else b("div", top, inputs[1])


def _pow(b: Builder, out: int, inputs: tuple[int, ...], slopes: Slopes) -> int | None:
    x, y = inputs
    less = b("pow", x, b("sub", y, b.constant(1)))
    by_exponent = _times(b, slopes[1], out, b("log", x)) if slopes[1] is not None else None
    return _sum(b, _times(b, slopes[0], y, less), by_exponent)


def _extreme(less: str) -> Rule:
    """Of two that are equal the half each, as torch has it; of a constant and a variable all."""

    def rule(b: Builder, out: int, inputs: tuple[int, ...], slopes: Slopes) -> int | None:
        x, y = inputs
        if slopes[0] is None or slopes[1] is None:
            chosen = (y, x) if slopes[0] is None else (x, y)
            within = b("le", *chosen) if less == "lt" else b("le", *reversed(chosen))
            return _either(b, within, _sum(b, *slopes), None)
        tie = b("mul", b.constant(0.5), b("add", slopes[0], slopes[1]))
        first = b("lt", x, y) if less == "lt" else b("lt", y, x)
        return b("where", b("eq", x, y), tie, b("where", first, slopes[0], slopes[1]))

    return rule


def _logaddexp(b: Builder, out: int, inputs: tuple[int, ...], slopes: Slopes) -> int | None:
    x, y = inputs
    half, gap = b.constant(0.5), b("sub", x, y)
    tie = _times(b, _sum(b, *slopes), half)
    shares = (
        _times(b, slopes[0], b("sigmoid", gap)),
        _times(b, slopes[1], b("sigmoid", _minus(b, gap))),
    )
    return _either(b, b("eq", x, y), tie, _sum(b, *shares))


def _minus(b: Builder, x: int) -> int:
    return b("neg", x)


OPERATIONS: dict[str, Operation] = {
    "neg": Operation(torch.neg, lambda b, out, inputs, slopes: _neg(b, slopes[0])),
    "abs": Operation(torch.abs, _chain(lambda b, out, x: b("sign", x))),
    "sign": Operation(torch.sign, _none),
    "exp": Operation(torch.exp, _chain(lambda b, out, x: out)),
    "expm1": Operation(torch.expm1, _chain(lambda b, out, x: b("exp", x))),
    "log": Operation(torch.log, _over(lambda b, out, x: x)),
    "log1p": Operation(torch.log1p, _over(lambda b, out, x: b("add", b.constant(1), x))),
    "sqrt": Operation(torch.sqrt, _over(lambda b, out, x: out, 0.5)),
    "tanh": Operation(
        torch.tanh, _chain(lambda b, out, x: b("sub", b.constant(1), b("mul", out, out)))
    ),
    "sigmoid": Operation(
        torch.sigmoid, _chain(lambda b, out, x: b("mul", out, b("sigmoid", b("neg", x))))
    ),
    "detach": Operation(torch.detach, _none),
    "add": Operation(torch.add, lambda b, out, inputs, slopes: _sum(b, *slopes)),
    "sub": Operation(
        torch.sub, lambda b, out, inputs, slopes: _sum(b, slopes[0], _neg(b, slopes[1]))
    ),
    "mul": Operation(
        torch.mul,
        lambda b, out, inputs, slopes: _sum(
            b, _times(b, slopes[0], inputs[1]), _times(b, slopes[1], inputs[0])
        ),
    ),
    "div": Operation(torch.div, _div),
    "pow": Operation(torch.pow, _pow),
    "minimum": Operation(torch.minimum, _extreme("lt")),
    "maximum": Operation(torch.maximum, _extreme("gt")),
    "logaddexp": Operation(torch.logaddexp, _logaddexp),
    "where": Operation(
        torch.where, lambda b, out, inputs, slopes: _either(b, inputs[0], slopes[1], slopes[2])
    ),
    "eq": Operation(torch.eq, _none),
    "lt": Operation(torch.lt, _none),
    "le": Operation(torch.le, _none),
    "and": Operation(torch.logical_and, _none),
    "or": Operation(torch.logical_or, _none),
    "not": Operation(torch.logical_not, _none),
}
MASKS = frozenset(("eq", "lt", "le", "and", "or", "not"))  # the results are True or False
NUMERIC = frozenset(OPERATIONS) - {"where", "and", "or", "not", "detach"}  # what they take is not
