"""The losses as a kernel that Hugging Face's ``kernels`` loads: ``python -m fusedkd.hub``.

Such a kernel is a folder of modules that is imported by a name of its own, and may be loaded twice,
or beside an installed fusedkd. So its imports are relative, and its operators have a namespace of
their own in torch. Its variants, as ``kernels`` 0.17 names them:

* ``torch-cuda``: Triton, for every torch and NVIDIA GPU;
* ``torch-stable-abi211-cpu-<machine>-<system>``: with the C++ extension, for torch 2.11 or later.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from fusedkd import backends, kernels
from fusedkd.errors import UserError, as_user_error
from fusedkd.parser import Parser

STABLE_ABI = "211"  # setup.py's
VERSION = 1  # what get_kernel(version=) asks for: another where a call has to be changed
# Of the C++ backend: the library, and the sources that a divergence of one's own is compiled with.
NATIVE = ("_native*.so", "*.h", "*.cpp")
# The namespaces of operators, in Python's sources and in the library.
OPERATORS, NATIVE_OPERATORS = ('"fusedkd::', "torch.ops.fusedkd."), "fusedkd_cpu"
# Where the modules of a package are; that of a room beside it comes first.
HOMES = {"fusedkd.kernels": Path(kernels.__file__).parent, "fusedkd": Path(__file__).parent}
CARD = """\
---
library_name: kernels
license: apache-2.0
tags: [kernels, distillation]
---
# fusedkd

Fused, memory-saving knowledge-distillation losses for large vocabularies: the functions of the
Python package `fusedkd`, without its trainer.

    from kernels import get_local_kernel

    fusedkd = get_local_kernel(path)  # or get_kernel(repository, version={version})
    loss = fusedkd.kd_loss(student_logits, teacher_logits, labels, temperature=2.0)

The `torch-cuda` variant is Triton. The other is C++, for tensors on a CPU; where torch was built
for a GPU, `backend="cpu"` asks for it. numpy has to be there.
"""


def main(argv: list[str] | None = None) -> int:
    """``python -m fusedkd.hub``; the exit code."""
    parser = Parser(
        "hub", "Write what `kernels.get_local_kernel` loads, and a Hub repository holds."
    )
    parser.prog = "python -m fusedkd.hub"
    parser.add_argument("--output", type=Path, default=Path("build/hub"), help="(build/hub)")
    try:
        folder = parser.parse_args(argv).output
        with as_user_error(f"--output {folder}", of=OSError):
            print(*build(folder), sep="\n")
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def build(folder: Path) -> list[Path]:
    """Write the variants to a folder; what it has of them is replaced.

    Returns:
        The folder of each.

    Raises:
        UserError: there is no C++ extension.
    """
    modules = {}
    for name in needed():
        own, place = _path(name), Path(*name.split(".")[1:])
        package = own.name == "__init__.py"
        modules[place / own.name if package else place.with_suffix(".py")] = own.read_bytes()
    home = HOMES["fusedkd.kernels"] / "cpu"
    native = [file for pattern in NATIVE for file in sorted(home.glob(pattern))]
    if not any(file.suffix == ".so" for file in native):
        raise UserError("there is no C++ extension: install a C++ compiler, then `make setup`.")
    extension = {Path("kernels/cpu", file.name): file.read_bytes() for file in native}
    machine = f"{platform.machine()}-{platform.system().lower()}"
    written = [
        _write(folder / "build" / "torch-cuda", "cuda", modules),
        _write(
            folder / "build" / f"torch-stable-abi{STABLE_ABI}-cpu-{machine}",
            "cpu",
            modules | extension,
        ),
    ]
    (folder / "README.md").write_text(CARD.format(version=VERSION))
    return written


def needed() -> set[str]:
    """The modules that the losses import, whenever they do."""
    found: set[str] = set()
    waiting = ["fusedkd", *(f"fusedkd.kernels.{name}" for name in backends.NAMES)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [name.rpartition(".")[0] or name, *_imports(name)]
    return found


def _write(folder: Path, backend: str, files: dict[Path, bytes]) -> Path:
    """One variant, and what ``kernels`` reads of it."""
    content = b"".join(str(path).encode() + data for path, data in sorted(files.items()))
    key = hashlib.sha256(backend.encode() + content).hexdigest()
    own = f"_fusedkd_{backend}_{key[:12]}"
    # as long as the one in the library, which is compiled
    native = f"kd{key}"[: len(NATIVE_OPERATORS)]
    shutil.rmtree(folder, ignore_errors=True)
    for path, data in files.items():
        if path.suffix == ".py":
            text = _relative(path, data.decode()).replace(NATIVE_OPERATORS, native)
            for start in OPERATORS:
                text = text.replace(start, start.replace("fusedkd", own))
            data = text.encode()
        elif path.suffix == ".so":
            data = data.replace(f"{NATIVE_OPERATORS}\0".encode(), f"{native}\0".encode())
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    metadata = {
        "name": "fusedkd",
        "id": own,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def _relative(path: Path, text: str) -> str:
    """A module whose imports of the package are relative."""
    lines = text.splitlines(keepends=True)
    dots = "." * len(path.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(r"from fusedkd(?:\.|(?= ))", f"from {dots}", line)
    return "".join(lines)


def _imports(module: str) -> Iterator[str]:
    """The package's modules that one imports.

    Raises:
        UserError: it does so in a way that is not made relative.
    """
    path = _path(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import) and any(a.name.startswith("fusedkd") for a in node.names):
            raise UserError(f"{path} line {node.lineno}: expected `from fusedkd import ...`.")
        if isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if base.partition(".")[0] == "fusedkd":
                inner = (f"{base}.{alias.name}" for alias in node.names)
                yield from (name if _path(name).exists() else base for name in inner)


def _path(module: str) -> Path:
    """The file of a module, if there is one of that name."""
    room = next(room for room in HOMES if f"{module}.".startswith(f"{room}."))
    place = HOMES[room].joinpath(*module.removeprefix(room).split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


if __name__ == "__main__":
    sys.exit(main())
