"""A divergence of one's own in Triton, or a row rule: rendered to a file, where Triton looks for
its source, and imported. A divergence is called as those of pointwise.py are, a rule by programs.py
and sparse.py.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from fusedkd.files import private_folder, replace_file
from fusedkd.formulas import MOST_PARAMETERS
from fusedkd.row_rules import STATISTICS
from fusedkd.tape import Tape

INFIX = {
    **dict(zip(("add", "sub", "mul", "div"), "+-*/", strict=True)),
    "eq": "==",
    "lt": "<",
    "le": "<=",
    "and": "&",
    "or": "|",
}
HEAD = """\
import triton
import triton.language as tl

from fusedkd.kernels.triton.elementwise import {names}


@triton.jit
def custom({arguments}, by):
"""
ENTRY = ("lp", "lq", "gap", "p", "q")


@functools.cache
def function(tape: Tape) -> Any:
    """The jitted function of a tape."""
    return _function(render(tape))


@functools.cache
def rule(tape: Tape) -> Any:
    """The same of a row rule."""
    return _function(render_rule(tape))


def _function(source: str) -> Any:
    name = f"fusedkd_custom_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    path = private_folder("triton") / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        replace_file(path, source)
    return _imported(name, path).custom


def _imported(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def render(tape: Tape) -> str:
    """The module's source."""
    last = f"value, grad = like(x{tape.value}, lp), like(x{tape.grad}, lp)"
    return _module(tape, ENTRY, (), [last, "return value, finite(grad)"])


def render_rule(tape: Tape) -> str:
    """The same of a row rule: a tape's first parameters are a row's statistics."""
    names = tuple(STATISTICS)
    return _module(tape, names, names, [f"return like(x{tape.value}, {names[0]})"])


def _module(
    tape: Tape, arguments: tuple[str, ...], parameters: tuple[str, ...], last: list[str]
) -> str:
    """``parameters``: the names of the first; the others come in a tuple."""
    names = sorted({FUNCTIONS[n.op] for n in tape.nodes if n.op in FUNCTIONS} | {"finite", "like"})
    more = [f"by[{i}]" for i in range(MOST_PARAMETERS)]
    inputs, size = [*parameters, *more], len(tape.nodes)
    lines = [f"x{i} = {_expression(tape, i, inputs, arguments[0])}" for i in range(size)]
    head = HEAD.format(names=", ".join(names), arguments=", ".join(arguments))
    return head + "".join(f"    {line}\n" for line in (*lines, *last))


FUNCTIONS = {op: op for op in ("sign", "expm1", "log1p", "sqrt", "tanh", "sigmoid", "logaddexp")}
FUNCTIONS |= {"pow": "power"}  # of elementwise.py
PLAIN = {"exp": "tl.exp", "log": "tl.log", "abs": "tl.abs"}
PLAIN |= {"minimum": "tl.minimum", "maximum": "tl.maximum", "where": "tl.where"}


def _expression(tape: Tape, position: int, parameters: list[str], shape: str) -> str:
    """``shape``: an argument that has the result's."""
    node = tape.nodes[position]
    if (entry := tape.entry(node)) is not None:
        return entry
    inputs = [f"x{i}" for i in node.inputs]
    if node.op == "parameter":
        return f"like({parameters[int(node.number)]}, {shape})"
    if node.op == "constant":
        finite = node.number - node.number == 0
        number = repr(node.number) if finite else f"float('{node.number}')"
        return f"like({number}, {shape})"
    if node.op in INFIX:
        return f"{inputs[0]} {INFIX[node.op]} {inputs[1]}"
    if node.op in ("neg", "detach", "not"):
        return {"neg": "-", "detach": "", "not": "~"}[node.op] + inputs[0]
    return f"{(FUNCTIONS | PLAIN)[node.op]}({', '.join(inputs)})"
