"""Python in a process of its own: for what is chosen before an import, or must not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def python(code: str, *arguments: str, **environment: str) -> str:
    """What ``code`` prints.

    Raises:
        AssertionError: it failed; with the end of what it said.
    """
    return _run("-c", code, *arguments, **environment)


def tests(*words: str, **environment: str) -> str:
    """What pytest prints, started in tests/ with ``words``.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    return _run("-m", "pytest", "-x", "-p", "no:cacheprovider", *words, **environment)


def _run(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, **environment}, cwd=TESTS,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout
