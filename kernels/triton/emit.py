"""A divergence of one's own in Triton, or a row rule: rendered to a file, where Triton looks for
its source, and imported. ``custom`` is called as those of pointwise.py are, or, of a rule, by
programs.py and sparse.py; the others as those of lean.py.

The lean form is one of those of lean.py where the divergence is made of the same sums
(fusedkd.algebra). Else its terms are summed in a sweep: if it is homogeneous, seen from the larger
of p and q, in the hardware's own logarithms, which are right for what is then of the order of 1,
and without guards, so that sums that are not finite say that the row wants ``custom``; otherwise as
it is written, with what the statistics say at hand.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedkd.algebra import simplified
from fusedkd.algebra.derivatives import operations
from fusedkd.files import private_folder, replace_file
from fusedkd.formulas import MOST_PARAMETERS
from fusedkd.row_rules import STATISTICS
from fusedkd.tape import OPERATIONS, Node, Tape

from . import elementwise, lean

INFIX = {
    **dict(zip(("add", "sub", "mul", "div"), "+-*/", strict=True)),
    "eq": "==",
    "lt": "<",
    "le": "<=",
    "and": "&",
    "or": "|",
}
FUNCTIONS = {op: op for op in ("sign", "expm1", "log1p", "sqrt", "tanh", "sigmoid", "logaddexp")}
FUNCTIONS |= {"pow": "power"}  # of elementwise.py
FUNCTIONS |= {"exp": "tl.exp", "log": "tl.log", "abs": "tl.abs"}
FUNCTIONS |= {"minimum": "tl.minimum", "maximum": "tl.maximum", "where": "tl.where"}
# Operations of an entry, value and gradient, beyond which 128 registers are too few (found by
# compiling random formulas, tests/kernels/test_resources.py).
MANY = 40
# In lean forms: any, and homogeneous ones. The last are asked for a plan.
QUICK = {"exp": "exp_near", "sqrt": "tl.sqrt"}
QUICKEST = QUICK | {"log": "log2_near", "div": "divided"}
PLANNED = ("log2_near", "divided")
HEAD = """\
import triton
import triton.language as tl

from {package}.elementwise import {names}
from {package}.numerics import LN2, log2_near, scalar
"""
CAREFUL = """

@triton.jit
def custom({arguments}, by):
{lines}
    return {returned}
"""
LEAN = """

@triton.jit
def _numbers(by, plan: tl.constexpr):
{numbers}
    return ({returned},)


@triton.jit
def constants(of, pair, by, b, plan: tl.constexpr):
    return _numbers(by, plan)


@triton.jit
def terms(at, numbers, pair, plan: tl.constexpr):
    of_s, of_t = pair.student.over_sum, pair.teacher.over_sum
    lp, lq, gap, p, q, larger = {leaves}(at, pair, of_s, of_t)
    {unpacked}
{both}
    return {value_term}, {grad_term}


@triton.jit
def summed(first, second, sum_grad, by, b):
    return {summed}, second


@triton.jit
def factors(of, pair, sum_grad, kd, by, b, plan: tl.constexpr):
    of_s, of_t = kd * pair.student.over_sum, kd * pair.teacher.over_sum
    return _numbers(by, plan), kd, -(of_s * sum_grad), of_s, of_t


@triton.jit
def slope(at, by, pair, plan: tl.constexpr):
    numbers, of_s, of_t = by[0], by[3], by[4]
    lp, lq, gap, p, q, larger = {leaves}(at, pair, of_s, of_t)
    {unpacked}
{last}
    return {slope_term}
"""
ENTRY = ("lp", "lq", "gap", "p", "q")
OWN = [f"by[{i}]" for i in range(MOST_PARAMETERS)]


@functools.cache
def function(tape: Tape) -> Any:
    """The jitted function of a tape."""
    return _module(render(tape)).custom


@functools.cache
def rule(tape: Tape) -> Any:
    """The same of a row rule."""
    return _module(render_rule(tape)).custom


@functools.cache
def form(tape: Tape) -> lean.Lean:
    """Its lean form."""
    simple = simplified(tape)
    if simple.known is not None:
        return lean.FORMS[simple.known.name]
    made = _module(render(tape))
    return lean.Lean(
        made.factors,
        made.slope,
        None,
        made.constants,
        made.terms,
        made.summed,
        rest=True,
        heavy=True,
        emitted=True,
        large=operations(simple.tape) > MANY,
        doubted=simple.homogeneous,
    )


@functools.cache
def _module(source: str) -> Any:
    name = f"fusedkd_custom_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    path = private_folder("triton") / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        replace_file(path, source)
    return _imported(name, path)


def _imported(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def render(tape: Tape) -> str:
    """The module's source."""
    returned = f"like(x{tape.value}, lp), finite(like(x{tape.grad}, lp))"
    body = _careful(tape, ENTRY, [], returned)
    simple = simplified(tape)
    if simple.known is None:
        body += _lean(simple.tape, simple.homogeneous)
    return _with_head(body)


def render_rule(tape: Tape) -> str:
    """The same of a row rule: a tape's first parameters are a row's statistics."""
    names = list(STATISTICS)
    return _with_head(_careful(tape, names, names, f"like(x{tape.value}, {names[0]})"))


def _with_head(body: str) -> str:
    names = [name for name in vars(elementwise) if not name.startswith("_")]
    used = sorted(name for name in names if f"{name}(" in body)
    return HEAD.format(package=__package__, names=", ".join(used)) + body


def _careful(tape: Tape, arguments: Sequence[str], parameters: list[str], returned: str) -> str:
    """``parameters``: the names of the first; the others come in a tuple."""
    inputs = [*parameters, *OWN]
    lines = [_line(tape, i, FUNCTIONS, inputs, arguments[0]) for i in range(len(tape.nodes))]
    names = ", ".join(arguments)
    return CAREFUL.format(arguments=names, lines="\n".join(lines), returned=returned)


def _lean(tape: Tape, homogeneous: bool) -> str:
    """Of an entry only what differs from one to the next; the rest is ``_numbers``."""
    numeric = tape.numeric()
    wanted = {i for n, of in zip(tape.nodes, numeric, strict=True) if not of for i in n.inputs}
    wanted |= {tape.value, tape.grad}
    numbers = [i for i, of in enumerate(numeric) if of]
    returned = [i for i in numbers if i in wanted and tape.nodes[i].op != "constant"]
    unpacked = "".join(f"x{i}, " for i in returned)
    in_proportion = homogeneous and _in_proportion(tape)
    terms, slope = _Entry(tape, homogeneous), _Entry(tape, homogeneous, in_proportion)
    more = _beside_grad(tape) if homogeneous else None  # the sums are added, instead of the terms
    value, grad, last = (
        of.result(i)
        for of, i in (
            (terms, tape.value if more is None else more),
            (terms, tape.grad),
            (slope, tape.grad),
        )
    )
    return LEAN.format(
        numbers="\n".join(_number_line(tape, i) for i in numbers) or "    pass",
        returned=", ".join(f"x{i}" for i in returned) or "0.0",
        leaves="relative" if homogeneous else "absolute",
        unpacked=f"{unpacked}= numbers" if returned else "",
        both="\n".join(terms.lines) or "    pass",
        last="\n".join(slope.lines) or "    pass",
        value_term=value,
        grad_term=grad if homogeneous else f"finite({grad})",
        summed="first" if more is None else "first + second",
        slope_term=_slope(last, homogeneous, in_proportion),
    )


def _slope(grad: str, homogeneous: bool, in_proportion: bool) -> str:
    """(f, r) of lean.py."""
    if not homogeneous:
        return f"by[2], present(at, finite({grad})) * by[1]"
    return f"by[2] + {grad}, 0.0" if in_proportion else f"by[2], {grad}"


def _in_proportion(tape: Tape) -> bool:
    """Whether each term of a homogeneous derivative has q in front."""
    of, open_ones = _Entry(tape, True), [tape.grad]
    while open_ones:
        node = tape.nodes[at := open_ones.pop()]
        if not of.scalable[at] or tape.entry(node) == "p":
            return False
        if tape.entry(node) is None:
            inner = node.inputs if node.op in ("add", "sub") else node.inputs[:1]
            if node.op == "mul" and not of.scalable[node.inputs[0]]:
                inner = node.inputs[1:]
            open_ones += inner
    return True


def _beside_grad(tape: Tape) -> int | None:
    """What the value has beside the derivative, if it is a sum of the two."""
    node = tape.nodes[tape.value]
    if node.op != "add" or tape.grad not in node.inputs:
        return None
    return node.inputs[1] if node.inputs[0] == tape.grad else node.inputs[0]


class _Entry:
    """The lines of a lean form that compute something of an entry.

    In homogeneous tapes logarithms are those to base 2 as long as that is only a factor, and the
    result is ``larger`` times what is relative to it: products of p or q take those as they are,
    and numbers in front are multiplied with the normalisers, once a row.
    """

    def __init__(self, tape: Tape, homogeneous: bool, over_q: bool = False) -> None:
        """``over_q``: the exponential of q is left out."""
        self.tape, self.homogeneous, self.numeric = tape, homogeneous, tape.numeric()
        self.over_q = over_q
        self.calls = FUNCTIONS | (QUICKEST if homogeneous else QUICK)
        self.lines: list[str] = []
        self.names: dict[tuple[int, tuple[str, ...] | None], str] = {}
        self.scalable: list[bool] = []
        self.binary: list[bool] = []
        for node, numeric in zip(tape.nodes, self.numeric, strict=True):
            self.scalable.append(homogeneous and not numeric and self._scales(node))
            self.binary.append(homogeneous and not numeric and self._is_binary(node))

    def _scales(self, node: Node) -> bool:
        """Whether it is a sum of products with p or q."""
        if (entry := self.tape.entry(node)) is not None:
            return entry in ("p", "q")
        inner = [self.scalable[i] for i in node.inputs]
        if node.op in ("neg", "div"):
            return inner[0]
        return (node.op in ("add", "sub") and all(inner)) or (node.op == "mul" and any(inner))

    def _is_binary(self, node: Node) -> bool:
        """Whether it is a logarithm to base 2."""
        if (entry := self.tape.entry(node)) is not None:
            return entry in ("lp", "lq", "gap")
        inner = [self.binary[i] for i in node.inputs]
        if node.op in ("add", "sub", "minimum", "maximum", "neg", "detach", "abs"):
            return all(inner)
        if node.op == "mul" and any(self.numeric[i] for i in node.inputs):
            return any(inner)
        if node.op == "div" and self.numeric[node.inputs[1]]:
            return inner[0]
        return node.op == "log" or (node.op == "where" and all(inner[1:]))

    def result(self, position: int) -> str:
        if self.homogeneous:
            return self._scaled(position, ())
        return f"like({self._plain(position)}, gap)"

    def _scaled(self, position: int, factors: tuple[str, ...]) -> str:
        """``larger`` times a node, and times numbers."""
        if (position, factors) not in self.names:
            made = self._scaled_expression(position, factors)
            self.names[position, factors] = f"y{len(self.names)}"
            self.lines.append(f"    {self.names[position, factors]} = {made}")
        return self.names[position, factors]

    def _scaled_expression(self, position: int, factors: tuple[str, ...]) -> str:
        node = self.tape.nodes[position]
        if (entry := self.tape.entry(node)) in ("p", "q"):
            e, of = ("at.e_t", "of_t") if entry == "p" else ("at.e_s", "of_s")
            normaliser = f"({' * '.join([of, *factors])})"
            return normaliser if self.over_q else f"{e} * {normaliser}"
        if not self.scalable[position]:
            return " * ".join(["larger", self._natural(position), *factors])
        if node.op in ("add", "sub"):
            return f" {INFIX[node.op]} ".join(self._scaled(i, factors) for i in node.inputs)
        if node.op == "neg":
            return f"-{self._scaled(node.inputs[0], factors)}"
        inside, other = node.inputs
        if node.op == "mul" and not self.scalable[inside]:
            inside, other = other, inside
        if self.numeric[other]:
            over = "1.0 / " if node.op == "div" else ""
            return self._scaled(inside, (*factors, f"({over}{self._number(other)})"))
        if node.op == "div":
            return f"divided({self._scaled(inside, factors)}, {self._natural(other)}, plan)"
        if self.binary[other]:
            return f"{self._scaled(inside, (*factors, 'LN2'))} * {self._plain(other)}"
        return f"{self._scaled(inside, factors)} * {self._natural(other)}"

    def _number(self, position: int) -> str:
        node = self.tape.nodes[position]
        return _literal(node.number) if node.op == "constant" else f"x{position}"

    def _natural(self, position: int) -> str:
        """A node, whose logarithm is the natural one."""
        plain = self._plain(position)
        return f"({plain} * LN2)" if self.binary[position] else plain

    def _plain(self, position: int) -> str:
        if self.numeric[position] and self.tape.nodes[position].op != "constant":
            return f"x{position}"
        if (position, None) not in self.names:
            made = self._expression(position)
            self.names[position, None] = f"x{position}"
            self.lines.append(f"    x{position} = {made}")
        return self.names[position, None]

    def _expression(self, position: int) -> str:
        node = self.tape.nodes[position]
        if (entry := self.tape.entry(node)) is not None:
            return entry
        keeps = self.binary[position] or node.op in ("exp", "sign")
        if node.op in ("eq", "lt", "le"):  # of two of a kind, or of 0 or infinity
            keeps = all(self.binary[i] or self._is_end(i) for i in node.inputs)
        inputs = [self._plain(i) if keeps else self._natural(i) for i in node.inputs]
        if node.op == "exp" and self.binary[node.inputs[0]]:
            return f"tl.exp2({inputs[0]})"
        return _applied(self.tape, position, self.calls, inputs)

    def _is_end(self, position: int) -> bool:
        node = self.tape.nodes[position]
        return node.op == "constant" and node.number in (0.0, float("inf"), -float("inf"))


def _number_line(tape: Tape, position: int) -> str:
    """Of what is one number for all entries."""
    node = tape.nodes[position]
    if node.op == "parameter":
        return f"    x{position} = by[{int(node.number)}]"
    if node.op == "constant":
        return f"    x{position} = scalar({_literal(node.number)}, plan.acc)"
    return _line(tape, position, FUNCTIONS)


def _literal(number: float) -> str:
    return repr(number) if number - number == 0 else f"float('{number}')"


def _line(
    tape: Tape,
    position: int,
    calls: dict[str, str],
    parameters: Sequence[str] = OWN,
    shape: str = "lp",
) -> str:
    """``parameters``: what they are called; ``shape``: an argument that has the result's."""
    return f"    x{position} = {_expression(tape, position, calls, parameters, shape)}"


def _expression(
    tape: Tape, position: int, calls: dict[str, str], parameters: Sequence[str], shape: str
) -> str:
    node = tape.nodes[position]
    if (entry := tape.entry(node)) is not None:
        return entry
    if node.op == "parameter":
        return f"like({parameters[int(node.number)]}, {shape})"
    return _applied(tape, position, calls, [f"x{i}" for i in node.inputs], shape)


def _applied(
    tape: Tape, position: int, calls: dict[str, str], inputs: Sequence[str], shape: str = "lp"
) -> str:
    node = tape.nodes[position]
    if node.op == "constant":
        return f"like({_literal(node.number)}, {shape})"
    if node.op in INFIX and node.op not in calls:
        return f"{inputs[0]} {INFIX[node.op]} {inputs[1]}"
    if node.op in ("neg", "detach", "not"):
        return {"neg": "-", "detach": "", "not": "~"}[node.op] + inputs[0]
    assert node.op in OPERATIONS
    name = calls[node.op]
    return f"{name}({', '.join([*inputs, *(['plan'] if name in PLANNED else [])])})"
