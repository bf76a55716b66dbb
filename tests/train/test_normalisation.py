"""One optimizer step gives one loss and one gradient, however it is cut into micro-batches and
processes. Real processes over gloo."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("two")
    return processes.run("workers_trainers.py", "everything", 2, out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    out = tmp_path_factory.mktemp("one")
    return processes.run("workers_trainers.py", "steps", 1, out)[0]


@pytest.mark.parametrize("counts", ["uneven", "one row", "none"])
@pytest.mark.parametrize("kind", ["fusedkd", "sampled", "mixin", "gkd", "gold"])
def test_one_step_is_one_step(
    kind: str, counts: str, alone: dict[Any, Any], ranks: list[Any]
) -> None:
    want_loss, want = alone[kind, counts, (4, 1)]
    assert want and (counts == "none") == (want_loss == 0)
    for steps in (alone, *(rank["steps"] for rank in ranks)):
        for key, (loss, gradients) in steps.items():
            if key[:2] == (kind, counts):
                assert loss == pytest.approx(want_loss, rel=1e-5, abs=1e-7), key
                torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layers", [False, True])
def test_fsdp2(layers: bool, ranks: list[Any]) -> None:
    """Layers and head sharded on their own, or only the whole model; the teacher too."""
    for rank in ranks:
        got, want = rank["sharded"][layers]
        assert all(gradient is not None for gradient in want[1].values())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
