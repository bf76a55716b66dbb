"""Where a visit takes place: the checkout made importable, caches, the GPU's name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

# pyproject's package-dir; what is not fusedkd/ itself lies beside it in a checkout
PACKAGES = {"kernels": "kernels", "benchmarks": "benchmarks"}


def checkout() -> Path | None:
    """The one that this file lies in; None: the package is installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").exists() else None


def environment(root: Path | None, state: Path, device: str) -> dict[str, str]:
    """Of the children: fusedkd importable, wheels in ``.whl/`` too, every cache in one place."""
    paths = [os.environ.get("PYTHONPATH", "")]
    if root is not None:
        paths = [
            str(_links(root, state / "links")),
            *_wheels(root / ".whl", state / "site"),
            *paths,
        ]
    made = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(state / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(state / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # sixteen processes compile already
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONSAFEPATH": "1",  # the root would hide Hugging Face's `kernels`
    }
    if device == "cpu":
        made |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return made


def _links(root: Path, folder: Path) -> Path:
    """A folder that holds ``fusedkd`` with kernels/ and benchmarks/ in it, as a wheel would."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "fusedkd"
    package.mkdir(parents=True)
    parts = {path.name: path for path in (root / "fusedkd").iterdir() if path.name != "__pycache__"}
    for name, path in (parts | {name: root / part for name, part in PACKAGES.items()}).items():
        (package / name).symlink_to(path)
    return folder


def _wheels(folder: Path, site: Path) -> list[str]:
    """Peers that lie there as wheels, unpacked; nothing is installed."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with contextlib.suppress(OSError, zipfile.BadZipFile):
            zipfile.ZipFile(wheel).extractall(site)
    return [str(site)] if wheels else []


def source_hash(root: Path | None) -> str:
    digest = hashlib.sha256()
    root = root or Path(__file__).resolve().parents[2]
    for folder in ("fusedkd", *PACKAGES) if (root / "fusedkd").is_dir() else (".",):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def smi(query: str) -> str:
    """What nvidia-smi says; asked only, nothing is set."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"[:100]
    return done.stdout.strip() or done.stderr.strip()[:100] or "nvidia-smi says nothing"
