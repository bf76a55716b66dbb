"""What ``fusedkd warmup`` has compiled, a loss finds; and how it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedkd.cli.main import main

pytest.importorskip("triton", reason="triton is for Linux")
COMMAND = [sys.executable, "-m", "fusedkd.warmup", "--target", "sm_90", "--vocab", "999"]
SMALL = ["--rows", "140", "--temperature", "2", "--workers", "1"]
# On a GPU it would be the same call, with another driver.
CALL = """
import torch
from fusedkd import SparseTeacher, kd_loss
from fusedkd.kernels.triton.rehearsal import Rehearsal, target_of
rehearsal = Rehearsal(target_of("sm_90"))
rehearsal.begin(132)
logits = torch.randn(150, 999).bfloat16()
sparse = SparseTeacher(torch.tensor([[3, 7]]).expand(150, 2), torch.full((150, 2), -2.0))
labels = torch.arange(150)
for teacher in (logits, sparse):
    student = torch.randn_like(logits).requires_grad_()
    loss = kd_loss(student, teacher, labels, temperature=2.0, ce_weight=0.1, backend="triton")
    loss.backward()
print(len(rehearsal.compiled), rehearsal.launched)
"""


def _run(command: list[str], cache: Path) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_it_compiles_is_what_a_loss_launches(tmp_path: Path) -> None:
    said = _run([*COMMAND, *SMALL, "--form", "logits", "bucket"], tmp_path)
    assert "[2/2]" in said and str(tmp_path) in said
    compiled, launched = map(int, _run([sys.executable, "-c", CALL], tmp_path).split())
    assert (compiled, launched) == (0, 6)  # labels, rows, their sum, and scaling; rows and scaling


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--target", "h100"], "expected sm_80"),
        (["--target", "sm_90", "--divergence", "klg"], "klg"),
        (["--dtype", "int8"], "int8"),
        ([], "--target sm_90"),
    ],
)
def test_mistakes(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedkd.kernels.triton import device

    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(device, "unavailable", lambda: "no GPU")
    assert main(["warmup", "--vocab", "999", *flags]) == 2
    assert told in capsys.readouterr().err


def test_nothing_is_compiled_for_the_interpreter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedkd.kernels.triton import device

    monkeypatch.setattr(device, "INTERPRETED", True)
    assert main(["warmup", "--vocab", "999", "--target", "sm_90"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
