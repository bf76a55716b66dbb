"""Hundreds of random calls against the oracle: loss, metrics and every gradient, on each backend.

The budget is the error of the same formula in eager PyTorch at fp32, plus rounding to the output's
dtype.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from budget import check, plain_case
from random_calls import DTYPES, random_case, sparse_case

from fusedkd import backends, divergences

SEEDS = int(os.environ.get("FUSEDKD_TEST_SEEDS", "300"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_call(backend: str, device: torch.device, seed: int) -> None:
    """Any form, dtype, layout and keyword."""
    check(random_case(seed, device), backend, metrics=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_sparse_call(backend: str, device: torch.device, seed: int) -> None:
    few = backend == "triton" and device.type == "cpu"
    check(sparse_case(seed, device, 6 if few else 12), backend, metrics=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_support(backend: str, device: torch.device, seed: int) -> None:
    """The tails for which a support need not be the teacher's top."""
    few = backend == "triton" and device.type == "cpu"
    tail = ("generalized", "conditional")[seed % 2]
    check(sparse_case(seed, device, 6 if few else 12, tail), backend, metrics=seed % 3 == 0)


WIDTHS = (1023, 1024, 1025, 2049, 4095, 4096, 4097, 8191, 8193, 16385, 50257)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", WIDTHS)
def test_widths_around_block_sizes(
    backend: str, device: torch.device, v: int, dtype: torch.dtype
) -> None:
    """Rows below, at and above what a kernel holds at once; odd ones are misaligned from row 1."""
    if backend == "triton" and device.type == "cpu" and v > 9000 and dtype != torch.bfloat16:
        pytest.skip("slow in the interpreter; bf16 covers these widths")
    which = divergences.names()[WIDTHS.index(v) % len(divergences.names())]
    check(plain_case(v, device, 3, v, dtype, divergence=which), backend, metrics=True)


@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_divergence_alone(
    backend: str, device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """No divergence depends on the luck of the random calls."""
    check(plain_case(1, device, 5, 131, dtype, divergence=name), backend)
    check(plain_case(2, device, 4, 64, dtype, divergence=name, ce_weight=0.0), backend)


@pytest.mark.parametrize("name", divergences.names())
def test_many_small_tokens(backend: str, device: torch.device, name: str) -> None:
    """More rows than threads or programs, in several chunks of work."""
    n = 70 if backend == "triton" and device.type == "cpu" else 700
    check(plain_case(3, device, n, 19, torch.float32, divergence=name), backend)


@pytest.mark.parametrize("name", backends.NAMES)
def test_backend_is_tested(name: str, request: pytest.FixtureRequest) -> None:
    """Says why a backend has no tests here."""
    conftest = request.config.pluginmanager.get_plugin(
        str(Path(__file__).parents[1] / "conftest.py")
    )
    if reason := conftest.unavailable(name):
        pytest.skip(f"{name}: {reason}")
