"""The Triton kernels in Triton's interpreter, which must be chosen before triton is imported: hence
a child process. Random calls there are `make test-slow`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = (
    "kernels/test_triton_rows",
    "loss/test_contract",
    "loss/test_precision",
    "loss/test_counted",
)


@pytest.mark.skipif("FUSEDKD_TEST_BACKEND" in os.environ, reason="already the child")
@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs in this process, on the GPU")
def test_the_kernels_in_the_interpreter() -> None:
    tests = Path(__file__).parents[1]
    environment = dict(os.environ, TRITON_INTERPRET="1", FUSEDKD_TEST_BACKEND="triton")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += ["-n", "2", "--dist", "loadfile"]  # the last test of all to end, on idle cores
    command += [str(tests / f"{name}.py") for name in FILES]
    done = subprocess.run(command, env=environment, cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
