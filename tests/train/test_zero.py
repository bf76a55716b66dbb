"""DeepSpeed's ZeRO-3, in real processes over gloo. `make test-zero` installs DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import byte_llama as tiny
import processes
import pytest
import torch

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make test-zero`")


@pytest.mark.parametrize(
    ("teacher_too", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
)
def test_gradients_of_a_model_in_parts(
    teacher_too: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Heads, tokens on two processes: loss and gradients of one."""
    ranks = processes.run("workers_zero.py", "gradients", 2, tmp_path, teacher_too, dtype)
    # bf16 gradients are rounded on each process, and their sum
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-4}
    )
    for got, want in ranks:
        assert all(gradient is not None for gradient in want[1].values())
        torch.testing.assert_close(got, want, **tolerance)


def test_the_trainer_on_models_that_were_loaded_in_parts(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for seed, name in enumerate(("student", "teacher"), 1):
        tiny.build(seed).save_pretrained(folder / name)
    want = processes.run("workers_zero.py", "losses", 1, tmp_path / "one", str(folder), False)[0]
    assert len(want) == 3 and want[2] < want[0]
    for got in processes.run("workers_zero.py", "losses", 2, tmp_path / "two", str(folder), True):
        assert got == pytest.approx(want, rel=1e-5)
