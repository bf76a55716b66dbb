"""Which backends the tests run on, and the helpers they share.

Tests that take a ``backend`` argument run once per backend that works in this process:
``reference`` and ``cpu`` on any machine, ``triton`` on a GPU. Without a GPU, triton needs its
interpreter, which must be chosen before triton is imported: ``loss/test_interpreter.py`` starts
child processes with ``TRITON_INTERPRET=1`` and ``FUSEDKD_TEST_BACKEND=triton`` for its share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fusedkd import backends

ONLY = os.environ.get("FUSEDKD_TEST_BACKEND")


def unavailable(name: str) -> str | None:
    """Why a backend cannot be tested in this process."""
    if ONLY and name != ONLY:
        return f"FUSEDKD_TEST_BACKEND={ONLY}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "triton" and not interpreted and not torch.cuda.is_available():
        return "no GPU: triton's share runs in one child process, in its interpreter"
    return backends.load(name).unavailable()


BACKENDS = [name for name in backends.NAMES if unavailable(name) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors live: triton's on the GPU, unless it is interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cuda" if backend == "triton" and not interpreted else "cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of tiny models: where other work shares the cores, two threads wait for each other
    at every product (7.5 ms for 24 x 24, 2026-11-24, 2 cores with a load of 4)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
