"""``fusedkd doctor --run``: a healthy run has nothing, and each fault its sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusedkd.cli import main
from fusedkd.cli.diagnosis import CHECKS, Run, diagnose, read_run

Log = list[dict[str, Any]]
NAN = float("nan")


def healthy(steps: int = 8) -> Log:
    log: Log = []
    for n in range(steps + 1):
        part = n / steps
        if n:
            log.append({
                "loss": 2.0 - part, "grad_norm": 1.0 - part / 2, "learning_rate": 1e-3 * (1 - part),
                "kd": 2.0 - part, "student_entropy": 2.5 - part / 2, "teacher_entropy": 2.0,
                "step": n,
            })  # fmt: skip
        if n in (0, steps):
            log.append({
                "eval_loss": 4.0 - part, "eval_kd": 2.0 - part, "eval_student_entropy": 2.5,
                "eval_teacher_entropy": 2.0, "step": n, "eval_perplexity": 50.0,
                **({} if n else {"eval_teacher_loss": 2.8}),
            })  # fmt: skip
    return log


def every(**values: Any) -> Callable[[Log], Any]:
    """Set values of every log that has the name; of a list one after the other."""

    def change(log: Log) -> None:
        for name, value in values.items():
            having = [entry for entry in log if name in entry]
            for n, entry in enumerate(having):
                entry[name] = value[n % len(value)] if isinstance(value, list) else value

    return change


def overfit(log: Log) -> None:
    log.insert(-2, {**log[-1], "eval_loss": 2.5, "step": 6})


FAULTS: dict[str, tuple[Callable[[Log], Any], str, str]] = {
    "nothing logged": (lambda log: log.clear(), "Nothing was logged", "--logging_steps"),
    "NaN": (every(kd=NAN), "was NaN", "--teacher_dtype"),
    "stopped": (
        lambda log: log.append({"stopped": "step 9: NaN. --teacher_dtype float32", "step": 8}),
        "stopped at step 9", "--teacher_dtype",
    ),
    "infinite": (every(eval_kd=float("inf")), "eval_kd was NaN or infinite", "--learning_rate"),
    "no labels": (every(loss=0.0), "no token carries a label", "--train_on"),
    "no rate": (every(learning_rate=0.0), "The learning rate was 0", "--learning_rate"),
    "norms explode": (
        every(grad_norm=[1.0, 1.0, 1.0, 1.0, 2.0, 9.0, 50.0, 900.0]), "norms grew",
        "--warmup_steps",
    ),
    "norms are NaN": (every(grad_norm=NAN), "8 of 8 logged gradient norms", "bf16"),
    "loss rises": (every(loss=[1.0 + n for n in range(8)]), "loss rose", "--learning_rate"),
    "collapsed": (every(student_entropy=0.01), "entropy collapsed", "forward_kl"),
    "flat": (
        every(student_entropy=9.0, eval_kd=2.0), "not become sure", "--learning_rate",
    ),
    "bad teacher": (every(eval_teacher_loss=4.5), "no better than the student", "better teacher"),
    "no gain": (every(eval_loss=4.0, eval_kd=2.0), "no better than before", "tenfold"),
    "gap": (every(eval_loss=[4.0, 3.98]), "not closing: 2%", "--ce_weight"),
    "overfits": (overfit, "lowest at step 6", "fewer epochs"),
}  # fmt: skip


def write(folder: Path, log: Log, card: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    if card is not None:
        (folder / "distillation.json").write_text(json.dumps(card))
    return folder


def test_a_healthy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write(tmp_path / "out", healthy(), {"verdict": "The student learned."})
    assert main(["doctor", "--run", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nothing wrong in the log of 8 steps" in said and "The student learned." in said


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_remedy(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said, remedy = FAULTS[fault]
    log = healthy()
    change(log)
    assert main(["doctor", "--run", str(write(tmp_path, log))]) == 1
    sentences = capsys.readouterr().out.splitlines()
    assert any(said in line and remedy in line for line in sentences), sentences
    assert len(sentences) < 4


def test_every_check_finds_something() -> None:
    seen = set()
    for change, *_ in FAULTS.values():
        log = healthy()
        change(log)
        train, evals = ([e for e in log if name in e] for name in ("loss", "eval_loss"))
        stopped = next((entry["stopped"] for entry in log if "stopped" in entry), "")
        run = Run(train, evals, {}, stopped)
        seen |= {check for check in CHECKS if list(check(run))}
        assert diagnose(run)
    assert seen == set(CHECKS)


def test_a_run_that_goes_on_or_was_killed(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-9", healthy(4))
    write(tmp_path / "checkpoint-10", healthy(8))
    assert read_run(tmp_path).train[-1]["step"] == 8
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert read_run(tmp_path).train[-1]["step"] == 4


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"log_history": 7}', b"\xff"])
def test_no_run(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "trainer_state.json").write_bytes(content)
    assert main(["doctor", "--run", str(tmp_path)]) == 2
    assert "expected the --output_dir" in capsys.readouterr().err


def test_it_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
from fusedkd.cli import main
assert main(["doctor", "--run", {str(write(tmp_path, healthy()))!r}]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
