"""``fusedkd plan``: what it says of memory is what a step takes; what it cannot plan it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from fusedkd import cli
from fusedkd.cut import gpu_budget
from fusedkd.plan.losses import EAGER, HEADS
from fusedkd.plan.measured import PAIRS, compare
from fusedkd.plan.watch import Watch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for role, width in (("student", 32), ("teacher", 64)):
        config = tf.LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        config.save_pretrained(tmp_path / role)
    return ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["plan", "--json", "--seq", "64", *words]) == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


@pytest.mark.parametrize(
    "pair, way",
    [
        pytest.param(pair, way, marks=[] if (pair, way) == ("llama", HEADS) else pytest.mark.slow)
        for pair in PAIRS
        for way in (HEADS, EAGER)
    ],
)
def test_a_step_takes_what_was_planned(pair: str, way: str) -> None:
    made, measured = compare(pair, way)
    assert made == pytest.approx(measured, rel=0.1)


def test_numbers(folders: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "plan.png"
    made = planned(capsys, *folders, "--gpu", "rtx4090", "--output", str(plot))
    config = tf.AutoConfig.from_pretrained(folders[1])
    numbers = sum(x.numel() for x in tf.AutoModelForCausalLM.from_config(config).parameters())
    ours = made["losses"][HEADS]["plain"]
    assert made["student"]["parameters"] == numbers
    assert ours["weights"] >= 2 * numbers and ours["state"] == 4 * numbers
    assert ours["total"] == sum(
        ours[part] for part in ("weights", "state", "teacher", "gradients", "activations", "loss")
    )
    assert made["losses"][EAGER]["loss"] > made["losses"][HEADS]["loss"]
    assert {row["kind"]: row["bytes_per_token"] for row in made["caches"]}["hidden, bf16"] == 128
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_tokens_that_do_not_count_are_not_held(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = (planned(capsys, *folders, "--counted", x) for x in ("1", "0.25"))
    assert part["losses"][HEADS]["loss"] < whole["losses"][HEADS]["loss"]
    assert part["losses"][EAGER]["loss"] == whole["losses"][EAGER]["loss"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "h1000"], "h100, h200, a100, rtx4090"),
        (["--memory", "lots"], "24GiB"),
        (["--batch", "0"], "expected 1 to 4096"),
    ],
)
def test_mistakes(
    words: list[str], said: str, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *folders, *words]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_decoder_is_refused(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tf.T5Config(vocab_size=100, d_model=16, num_layers=1).save_pretrained(tmp_path / "t5")
    assert cli.main(["plan", *folders, "--student", str(tmp_path / "t5")]) == 2
    assert "--student" in capsys.readouterr().err


def test_watch_counts_what_lives() -> None:
    x = torch.empty(4, 5, device="meta")
    with Watch() as watch:
        y = x[1:] + 1  # 3 x 5
        z = y.T @ y  # 5 x 5
        del y
        z += 1
    assert [live for live, *_ in watch.rows] == [0, 60, 60, 160, 100]
    assert watch.table()[3, 1] == 2 * 5 * 5 * 3


def test_a_gpu_s_budget_is_the_loss_s() -> None:
    assert gpu_budget(24 << 30) == (24 << 30) // 32 and gpu_budget(1 << 40) == 2 << 30
