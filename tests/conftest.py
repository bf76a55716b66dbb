"""Which backends the tests run on, and the helpers they share.

Tests that take a ``backend`` argument run once per backend that works in this process:
``reference`` and ``cpu`` on any machine, ``triton`` on a GPU. Without a GPU, triton needs its
interpreter, which must be chosen before triton is imported: ``loss/test_interpreter.py`` starts
child processes with ``TRITON_INTERPRET=1`` and ``FUSEDKD_TEST_BACKEND=triton`` for its share.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

from fusedkd import backends

ONLY = os.environ.get("FUSEDKD_TEST_BACKEND")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton's interpreter takes longest for these: make test has it try each n-th of their
# cases, make test-slow (FUSEDKD_TEST_ALL) each.
EVERY = {
    "test_a_heads_gradients_are_rounded_once": 2,
    "test_a_masked_label_has_an_infinite_loss_and_a_finite_gradient": 3,
    "test_a_row_in_pieces": 3,
    "test_a_support_is_never_negative": 5,
    "test_all_entries_are_the_dense_teacher": 4,
    "test_around_a_tile": 3,
    "test_beside_a_sparse_teacher": 2,
    "test_beside_each_divergence": 4,
    "test_bits_are_those_of_the_packed_call": 4,
    "test_bitwise_repeatable": 3,
    "test_bucket_close_to_the_teacher": 3,
    "test_each_keyword": 3,
    "test_extreme_temperatures_and_gaps": 3,
    "test_finite_masks": 3,
    "test_fp16_does_not_overflow": 3,
    "test_fp16_keeps_what_a_loss_scale_would": 2,
    "test_heads": 2,
    "test_heads_in_chunks": 2,
    "test_masked_entries": 3,
    "test_masked_on_both_sides_is_finite": 3,
    "test_masks_with_the_lowest_number": 5,
    "test_nan_is_hidden_only_where_it_does_not_count": 2,
    "test_never_negative_in_bf16": 2,
    "test_no_mass_left_for_the_tail": 4,
    "test_no_size_changes_the_answer": 2,
    "test_one_head_alone_is_bounded_too": 3,
    "test_ours_as_yours": 5,
    "test_plus_infinity_is_a_nan_as_in_torch": 3,
    "test_rows_in_pieces": 3,
    "test_the_ratio_is_exactly_1": 5,
    "test_where_a_graph_is_captured_all_are_multiplied": 2,
}


def unavailable(name: str) -> str | None:
    """Why a backend cannot be tested in this process."""
    if ONLY and name != ONLY:
        return f"FUSEDKD_TEST_BACKEND={ONLY}"
    if name == "triton" and not INTERPRETED and not torch.cuda.is_available():
        return "no GPU: triton's share runs in one child process, in its interpreter"
    return backends.load(name).unavailable()


BACKENDS = [name for name in backends.NAMES if unavailable(name) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETED or "FUSEDKD_TEST_ALL" in os.environ:
        return
    tests = [item.nodeid.partition("[")[0] for item in items]
    cases, seen = Counter(tests), Counter[str]()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item, test in zip(items, tests, strict=True):
        every = EVERY.get(test.rpartition("::")[2], 1)
        first = crc32(test.encode()) % min(every, cases[test])  # not always the same divergences
        (left_out if (seen[test] - first) % every else kept).append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors live: triton's on the GPU, unless it is interpreted."""
    return torch.device("cuda" if backend == "triton" and not INTERPRETED else "cpu")


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
