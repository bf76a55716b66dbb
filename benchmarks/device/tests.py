"""Step: the project's own tests of the kernels, if pytest is there and time is left."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

from .journal import Item, Journal, Skip
from .orders import Orders, output_of

FILES = ("kernels/test_triton_gpu.py", "kernels/test_triton_rows.py")


def run(journal: Journal, orders: Orders) -> None:
    journal.item("pytest", _pytest, orders)


def _pytest(orders: Orders) -> Item:
    if not orders.root:
        raise Skip("not a checkout")
    if not importlib.util.find_spec("pytest"):
        raise Skip("pytest is not there")
    files = FILES[: 1 if orders.device == "cpu" else None]
    tests = Path(orders.root) / "tests"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", orders.root]
    command += ["-c", f"{orders.root}/pyproject.toml", *(str(tests / name) for name in files)]
    if importlib.util.find_spec("xdist") and orders.device == "cuda":
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    code, text = output_of(command, orders.left, PYTHONSAFEPATH="")
    said = [x for x in text.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", x)]
    last = (said or text.strip().splitlines() or ["no output"])[-1][:160]
    failed = [x[:160] for x in text.splitlines() if x.startswith(("FAILED", "ERROR"))][:12]
    item: Item = {"ok": code == 0, "said": last, "failed": failed}
    return item if code == 0 else {**item, "wrong": last}
