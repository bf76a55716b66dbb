"""The Triton kernels in Triton's interpreter, which must be chosen before triton is imported: hence
a child process. All of them, and random calls, are `make test-slow`."""

import os

import children
import pytest
import torch

FILES = (
    "kernels/test_triton_parts",
    "kernels/test_triton_rows",
    "kernels/test_triton_tokens",
    "loss/test_contract",
    "loss/test_counted",
    "loss/test_custom",
    "loss/test_cut",
    "loss/test_head_ids",
    "loss/test_precision",
    "loss/test_row_rule",
    "loss/test_sampled",
    "loss/test_sparse",
    "loss/test_token_log_probs",
    "loss/test_top_k",
    "loss/test_z_loss",
)
TRITON = {"TRITON_INTERPRET": "1", "FUSEDKD_TEST_BACKEND": "triton"}

pytestmark = pytest.mark.skipif(
    "FUSEDKD_TEST_BACKEND" in os.environ or torch.cuda.is_available(),
    reason="already the child, or triton runs in this process, on the GPU",
)


def test_the_kernels_in_the_interpreter() -> None:
    paths = [f"{name}.py" for name in FILES]
    # two processes: this is the last test of all to end, on idle cores
    words = ("-m", "not slow", "-n", "2", "--dist", "worksteal", "-k", "triton")
    assert "passed" in children.tests(*paths, *words, **TRITON)


@pytest.mark.slow
def test_all_cases_in_the_interpreter() -> None:
    paths = [f"{name}.py" for name in FILES]
    assert "passed" in children.tests(*paths, "-k", "triton", FUSEDKD_TEST_ALL="1", **TRITON)


@pytest.mark.slow
def test_random_calls_in_the_interpreter() -> None:
    """Triton's share of these files."""
    probe = "from fusedkd.backends import load; print(load('triton').unavailable())"
    if (reason := children.python(probe, **TRITON).strip()) != "None":
        pytest.skip(f"triton: {reason}")
    paths = [f"loss/test_{name}.py" for name in ("kd_loss", "contract", "sparse", "precision")]
    seeds = os.environ.get("FUSEDKD_TEST_TRITON_SEEDS", "60")
    children.tests(*paths, FUSEDKD_TEST_SEEDS=seeds, **TRITON)
