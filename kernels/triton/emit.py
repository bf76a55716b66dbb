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

from fusedkd.algebra import operations, simplified
from fusedkd.files import private_folder, replace_file
from fusedkd.formulas import MOST_PARAMETERS
from fusedkd.row_rules import STATISTICS
from fusedkd.tape import OPERATIONS, Tape

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
# Of the lean forms; those of the second line are asked for a plan.
# Operations of an entry, value and gradient, beyond which 128 registers are too few (found by
# compiling random formulas, tests/kernels/test_resources.py).
MANY = 40
QUICK = {"exp": "exp_near", "sqrt": "tl.sqrt"}
QUICKEST = QUICK | {"log": "log_near", "div": "divided"}
PLANNED = ("log_near", "divided")
HEAD = """\
import triton
import triton.language as tl

from fusedkd.kernels.triton.elementwise import {names}
from fusedkd.kernels.triton.numerics import scalar
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
    lp, lq, gap, p, q, of_p, of_q, larger = {leaves}(at, pair, of_s, of_t)
    {unpacked}
{both}
    return {value_term}, {grad_term}


@triton.jit
def summed(first, second, sum_grad, by, b):
    return first, second


@triton.jit
def factors(of, pair, sum_grad, kd, by, b, plan: tl.constexpr):
    of_s, of_t = kd * pair.student.over_sum, kd * pair.teacher.over_sum
    return _numbers(by, plan), kd, -(of_s * sum_grad), of_s, of_t


@triton.jit
def slope(at, by, pair, plan: tl.constexpr):
    lp, lq, gap, p, q, of_p, of_q, larger = {leaves}(at, pair, by[3], by[4])
    numbers = by[0]
    {unpacked}
{last}
    return by[2], {slope_term}
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
    return HEAD.format(names=", ".join(used)) + body


def _careful(tape: Tape, arguments: Sequence[str], parameters: list[str], returned: str) -> str:
    """``parameters``: the names of the first; the others come in a tuple."""
    inputs = [*parameters, *OWN]
    lines = [_line(tape, i, FUNCTIONS, inputs, arguments[0]) for i in range(len(tape.nodes))]
    names = ", ".join(arguments)
    return CAREFUL.format(arguments=names, lines="\n".join(lines), returned=returned)


def _lean(tape: Tape, homogeneous: bool) -> str:
    """Of an entry only what differs from one to the next; the rest is ``_numbers``."""
    numeric = tape.numeric()
    calls = FUNCTIONS | (QUICKEST if homogeneous else QUICK)
    outside, both, last = [], [], []
    wanted = {i for n, of in zip(tape.nodes, numeric, strict=True) if not of for i in n.inputs}
    wanted |= {tape.value, tape.grad}
    returned = [
        i for i, n in enumerate(tape.nodes) if numeric[i] and i in wanted and n.op != "constant"
    ]
    of_grad = _needs(tape, tape.grad)
    for i, node in enumerate(tape.nodes):
        if numeric[i]:
            outside.append(_number_line(tape, i))
        if not numeric[i] or node.op == "constant":
            both.append(_line(tape, i, calls))
            if i in of_grad:
                last.append(both[-1])
    value, grad = f"like(x{tape.value}, gap)", f"like(x{tape.grad}, gap)"
    leaves = "relative" if homogeneous else "absolute"
    unpacked = "".join(f"x{i}, " for i in returned)
    return LEAN.format(
        numbers="\n".join(outside) or "    pass",
        returned=", ".join(f"x{i}" for i in returned) or "0.0",
        leaves=leaves,
        unpacked=f"{unpacked}= numbers" if returned else "",
        both="\n".join(both),
        last="\n".join(last),
        value_term=_scaled(tape, tape.value) if homogeneous else value,
        grad_term=_scaled(tape, tape.grad) if homogeneous else f"finite({grad})",
        slope_term=_scaled(tape, tape.grad)
        if homogeneous
        else f"present(at, finite({grad})) * by[1]",
    )


def _scaled(tape: Tape, position: int) -> str:
    """``larger`` times what is relative to it; of_p and of_q are that of p and q."""
    node = tape.nodes[position]
    if (entry := tape.entry(node)) in ("p", "q"):
        return f"of_{entry}"
    if entry is None and _scalable(tape, position):
        inner = [_scaled(tape, i) if _scalable(tape, i) else f"x{i}" for i in node.inputs]
        if node.op == "neg":
            return f"-{inner[0]}"
        if node.op == "mul" and _scalable(tape, node.inputs[0]):
            inner[1] = f"x{node.inputs[1]}"
        if node.op == "div":
            return f"divided({inner[0]}, x{node.inputs[1]}, plan)"
        return f"({inner[0]} {INFIX[node.op]} {inner[1]})"
    return f"larger * x{position}"


def _scalable(tape: Tape, position: int) -> bool:
    """Whether a sum of products of p and q."""
    node = tape.nodes[position]
    if tape.entry(node) is not None:
        return tape.entry(node) in ("p", "q")
    inner = (_scalable(tape, i) for i in node.inputs)
    if node.op in ("neg", "div"):
        return next(inner)
    if node.op in ("add", "sub"):
        return all(inner)
    return node.op == "mul" and any(inner)


def _needs(tape: Tape, position: int) -> set[int]:
    found, open_ones = set(), [position]
    while open_ones:
        at = open_ones.pop()
        if at not in found:
            found.add(at)
            if tape.entry(tape.nodes[at]) is None:
                open_ones += tape.nodes[at].inputs
    return found


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
    inputs = [f"x{i}" for i in node.inputs]
    if node.op == "parameter":
        return f"like({parameters[int(node.number)]}, {shape})"
    if node.op == "constant":
        return f"like({_literal(node.number)}, {shape})"
    if node.op in INFIX and node.op not in calls:
        return f"{inputs[0]} {INFIX[node.op]} {inputs[1]}"
    if node.op in ("neg", "detach", "not"):
        return {"neg": "-", "detach": "", "not": "~"}[node.op] + inputs[0]
    assert node.op in OPERATIONS
    name = calls[node.op]
    return f"{name}({', '.join([*inputs, *(['plan'] if name in PLANNED else [])])})"
