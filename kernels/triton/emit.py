"""A divergence of one's own in Triton: rendered to a file, where Triton looks for its source, and
imported. It is called as those of pointwise.py are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from fusedkd.files import private_folder, replace_file
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
def custom(lp, lq, gap, p, q, by):
"""


@functools.cache
def function(tape: Tape) -> Any:
    """The jitted function of a tape."""
    source = render(tape)
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
    names = sorted({FUNCTIONS[n.op] for n in tape.nodes if n.op in FUNCTIONS} | {"finite", "like"})
    lines = [f"    x{i} = {_expression(tape, i)}" for i in range(len(tape.nodes))]
    lines.append(f"    value, grad = like(x{tape.value}, lp), like(x{tape.grad}, lp)")
    lines.append("    return value, finite(grad)")
    return HEAD.format(names=", ".join(names)) + "\n".join([*lines, ""])


FUNCTIONS = {op: op for op in ("sign", "expm1", "log1p", "sqrt", "tanh", "sigmoid", "logaddexp")}
FUNCTIONS |= {"pow": "power"}  # of elementwise.py
PLAIN = {"exp": "tl.exp", "log": "tl.log", "abs": "tl.abs"}
PLAIN |= {"minimum": "tl.minimum", "maximum": "tl.maximum", "where": "tl.where"}


def _expression(tape: Tape, position: int) -> str:
    node = tape.nodes[position]
    if (entry := tape.entry(node)) is not None:
        return entry
    inputs = [f"x{i}" for i in node.inputs]
    if node.op == "parameter":
        return f"like(by[{int(node.number)}], lp)"
    if node.op == "constant":
        finite = node.number - node.number == 0
        number = repr(node.number) if finite else f"float('{node.number}')"
        return f"like({number}, lp)"
    if node.op in INFIX:
        return f"{inputs[0]} {INFIX[node.op]} {inputs[1]}"
    if node.op in ("neg", "detach", "not"):
        return {"neg": "-", "detach": "", "not": "~"}[node.op] + inputs[0]
    return f"{(FUNCTIONS | PLAIN)[node.op]}({', '.join(inputs)})"
