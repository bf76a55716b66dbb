"""A divergence of one's own in C++: rendered, compiled once for this machine, kept, loaded.

The library has the rows of dense.h and sparse.h around the rendered formula, so that whatever goes
with a built-in divergence goes with it. It is plain C++, without torch's headers.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from fusedkd.files import private_folder
from fusedkd.tape import MASKS, Node, Tape

HERE = Path(__file__).parent
FLAGS = (  # setup.py's
    *("-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"),
    *("-fvisibility=hidden", "-Wno-psabi"),
)


# ----------------------------------------------------------------------------------------------
# rendering

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "lt": "<", "le": "<="}
CALLS = {  # (of vectors, of numbers)
    **{op: (op, f"::{op}") for op in ("exp", "expm1", "log1p", "sqrt", "tanh", "pow")},
    "log": ("log_of", "::log"),
    "abs": ("abs", "::fabs"),
    "minimum": ("min", "::fmin"),
    "maximum": ("max", "::fmax"),
    "sign": ("sign", "number_sign"),
    "sigmoid": ("sigmoid", "number_sigmoid"),
    "logaddexp": ("logaddexp", "number_logaddexp"),
}
HEAD = """\
namespace {
[[maybe_unused]] double number_sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : x * 0; }
[[maybe_unused]] double number_sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
[[maybe_unused]] double number_logaddexp(double a, double b) {
  return a == b ? a + ::log(2.0) : ::fmax(a, b) + ::log1p(::exp(-::fabs(a - b)));
}
}  // namespace

struct custom {
  template <class V>
  FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, [[maybe_unused]] const double* w) {
"""


def render(tape: Tape) -> str:
    """The struct that pointwise.h includes."""
    lines = []
    numeric = tape.numeric()  # computed once a row, in fp64
    for position, node in enumerate(tape.nodes):
        kind = "auto" if node.op in MASKS else "double" if numeric[position] else "V"
        lines.append(f"    const {kind} x{position} = {_expression(tape, position, numeric)};")
    value, grad = (_operand(tape, i, numeric, vector=True) for i in (tape.value, tape.grad))
    lines.append(f"    const V value = {value}, grad = {grad};")
    # as everywhere, an infinite gradient counts as 0
    lines.append("    return {value, abs(grad) == splat<V>(kInfinity) ? V{} : grad};")
    return HEAD + "\n".join(lines) + "\n  }\n};\n"


def _expression(tape: Tape, position: int, numeric: list[bool]) -> str:
    node = tape.nodes[position]
    vector = not numeric[position]
    if leaf := _leaf(tape, node):
        return leaf
    inputs = [_operand(tape, i, numeric, vector) for i in node.inputs]
    if node.op in INFIX:
        return f"{inputs[0]} {INFIX[node.op]} {inputs[1]}"
    if node.op == "where":
        return f"{inputs[0]} ? {inputs[1]} : {inputs[2]}"
    if node.op in ("and", "or"):
        return f" {'&' if node.op == 'and' else '|'} ".join(inputs)
    if node.op == "not":
        return f"{'~' if vector else '!'}{inputs[0]}"
    if node.op in ("neg", "detach"):
        return f"{'-' if node.op == 'neg' else ''}{inputs[0]}"
    return f"{CALLS[node.op][not vector]}({', '.join(inputs)})"


def _leaf(tape: Tape, node: Node) -> str | None:
    if entry := tape.entry(node):
        return f"e.{entry}"
    if node.op == "parameter":
        return f"w[{int(node.number)}]"
    if node.op == "constant":
        number = node.number
        finite = number - number == 0
        return float.hex(number) if finite else f"{'-' * (number < 0)}{_name(number)}"
    return None


def _name(number: float) -> str:
    return "kInfinity" if abs(number) > 0 else '__builtin_nan("")'


def _operand(tape: Tape, position: int, numeric: list[bool], vector: bool) -> str:
    if not vector or not numeric[position]:
        return f"x{position}"
    mask = tape.nodes[position].op in MASKS
    return f"every_lane<V>(x{position})" if mask else f"splat<V>(x{position})"


# ----------------------------------------------------------------------------------------------
# without a compiler

MASK_STEPS = {"and": "both", "or": "either", "not": "no"}
STEPS = (  # the order of kernel.h's TapeOp
    *("lp", "lq", "p", "q", "gap", "constant", "parameter", "neg", "abs", "sign", "exp", "expm1"),
    *("log", "log1p", "sqrt", "tanh", "sigmoid", "detach", "add", "sub", "mul", "div", "pow"),
    *("minimum", "maximum", "logaddexp", "where", "eq", "lt", "le", "both", "either", "no"),
)
MOST_STEPS = 256


class _Step(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_int),
        ("inputs", ctypes.c_int * 3),
        ("number", ctypes.c_double),
    )


class _Tape(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("value", ctypes.c_int64),
        ("grad", ctypes.c_int64),
        ("steps", _Step * MOST_STEPS),
    )


def assemble(tape: Tape) -> _Tape:
    """The tape as tape.h runs it.

    Raises:
        RuntimeError: more operations than there is room for.
    """
    if len(tape.nodes) > MOST_STEPS:
        raise RuntimeError(
            f"{len(tape.nodes)} operations: expected at most {MOST_STEPS} in a row rule, and in a "
            "divergence where there is no C++ compiler"
        )
    made = _Tape(len(tape.nodes), tape.value, tape.grad)
    for step, node in zip(made.steps, tape.nodes, strict=False):
        name = tape.entry(node) or MASK_STEPS.get(node.op, node.op)
        step.op, step.number = STEPS.index(name.removeprefix("-")), node.number
        step.inputs = (*node.inputs, 0, 0, 0)[:3]
    return made


# ----------------------------------------------------------------------------------------------
# compiling


def unit(instruction_set: str, formula: str) -> str:
    """The whole library's source; ``formula`` is the file that holds :func:`render`'s."""
    return (
        f'#define FUSEDKD_POINTWISE "{formula}"\n'
        f'#include "isa_{instruction_set}.cpp"\n'
        '#define FUSEDKD_EXPORT extern "C" __attribute__((visibility("default")))\n'
        "FUSEDKD_EXPORT const void* fusedkd_set() {\n"
        f"  return &fusedkd::{instruction_set}_set();\n"
        "}\n"
        "FUSEDKD_EXPORT const int64_t* fusedkd_layout(int* n) {\n"
        "  return *n = sizeof fusedkd::kLayout / sizeof(int64_t), fusedkd::kLayout;\n"
        "}\n"
    )


def load(tape: Tape, instruction_set: str, register: Callable[[str, int, list[int]], None]) -> str:
    """Make the tape's rows known to the extension, under the name that this returns.

    Raises:
        RuntimeError: no compiler, or it failed; says what it said.
    """
    source = render(tape)
    name = f"custom_{_key(source, instruction_set)}"
    path = private_folder("cpu") / f"{name}.so"
    if not path.exists():
        with open(path.with_suffix(".lock"), "w") as lock:  # torchrun's other processes wait
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                compile_(source, instruction_set, path)
    library = ctypes.CDLL(str(path))
    library.fusedkd_set.restype = ctypes.c_void_p
    library.fusedkd_layout.restype = ctypes.POINTER(ctypes.c_int64)
    count = ctypes.c_int()
    layout = library.fusedkd_layout(ctypes.byref(count))[: count.value]
    register(name, library.fusedkd_set(), list(layout))
    return name


def _key(source: str, instruction_set: str) -> str:
    said = "\n".join((source, instruction_set, *FLAGS, compiler() or "", _headers()))
    return hashlib.sha256(said.encode()).hexdigest()[:24]


@functools.cache
def _headers() -> str:
    """What the library shares with the extension."""
    files = sorted([*HERE.glob("*.h"), *HERE.glob("isa_*.cpp")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def compiler() -> str | None:
    """``$CXX``, or the first of the usual ones; None where there is none."""
    candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def compile_(source: str, instruction_set: str, path: Path) -> None:
    """Compile to ``path``, which is there whole or not at all."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler (set CXX, or install g++ or clang)")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as build:
        formula, whole, library = (Path(build) / name for name in ("formula.h", "unit.cpp", "so"))
        formula.write_text(source)
        whole.write_text(unit(instruction_set, str(formula)))
        command = [cxx, *FLAGS, "-shared", "-fPIC", f"-I{HERE}", str(whole), "-o", str(library)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            said = run.stderr.strip()[:2000]
            raise RuntimeError(f"{' '.join(command)} failed ({run.returncode}): {said}")
        os.replace(library, path)
