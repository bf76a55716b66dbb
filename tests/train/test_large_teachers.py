"""Teachers that are larger than a device: on several, on the disk, or split over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from words import SIZES, WORDS, tokenizer

from fusedkd.cache import TeacherCache
from fusedkd.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

COMMAND = "import sys; from fusedkd.cli import main; sys.exit(main(sys.argv[1:]))"
CACHE = "cache --teacher teacher --data words.txt --block_size 16 --top-k 8 --device cpu --output"
RUN = (
    "distill --teacher teacher --student student --data words.txt --block_size 16 --max_steps 3 "
    "--per_device_train_batch_size 2 --use_cpu true --report_to none --disable_tqdm true "
    "--logging_steps 1 --report none --divergence jsd --output_dir"
)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sizes = {**SIZES, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        config = tf.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)
        tf.LlamaForCausalLM(config).save_pretrained(name)
        tokenizer().save_pretrained(name)
    words = np.random.default_rng(0).choice(WORDS, 700)
    Path("words.txt").write_text(" ".join(words))
    return tmp_path


def two_processes(*words: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "--no_python", sys.executable, "-c", COMMAND, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def same(one: Path, other: Path, apart: float) -> None:
    """To within what the format's steps leave (fusedkd/cache/layout.py), if the answers were not
    the same to the bit."""
    a, b = TeacherCache(one), TeacherCache(other)
    assert a.manifest.teacher_hash == b.manifest.teacher_hash
    assert a.manifest.index == b.manifest.index
    for place in range(len(a._keys)):
        x, y = (cache._decode(place, 1.0).log_probs for cache in (a, b))
        gaps = x[:, :1] - x
        span = gaps.max(1, keepdims=True) + 0.25
        steps = 2 * (np.sqrt(gaps * span) / 255 + span / 255**2)
        most = steps.max(1, keepdims=True)  # by which the normaliser may move
        assert (np.abs(x - y) <= apart * (steps + most + 1e-3)).all()


def losses(folder: str) -> list[float]:
    log = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_device_map_with_layers_on_the_disk(disk: Path) -> None:
    places = {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(4)}
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    placed = json.dumps(places | dict.fromkeys(parts, "cpu"))
    assert main([*CACHE.split(), "plain"]) == 0
    assert main([*CACHE.split(), "mapped", "--teacher_device_map", placed]) == 0
    same(disk / "plain", disk / "mapped", apart=0)


def test_a_cache_of_a_teacher_that_two_processes_hold(disk: Path) -> None:
    assert main([*CACHE.split(), "plain"]) == 0
    two_processes(*CACHE.split(), "spread", "--teacher_tp")
    same(disk / "plain", disk / "spread", apart=1)


def test_a_student_of_a_teacher_that_two_processes_hold(disk: Path) -> None:
    """Each process has a batch of its own, and both run both."""
    two_processes(*RUN.split(), "whole")
    two_processes(*RUN.split(), "spread", "--teacher_tp", "true")
    np.testing.assert_allclose(losses("whole"), losses("spread"), rtol=1e-4)
    assert len(losses("whole")) == 3 and losses("whole")[0] > 0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--teacher_tp"], "--teacher_tp: expected several processes"),
        (["--teacher_load_in_4bit", "--teacher_load_in_8bit"], "expected one"),
        (["--teacher_device_map", "{"], "--teacher_device_map"),
        (["--teacher", "http://127.0.0.1:1", "--teacher_tp"], "no --teacher_tp"),
    ],
)
def test_mistakes(
    more: list[str], message: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = CACHE.replace(" --device cpu", "").split()
    assert main([*words, "out", *more]) == 2
    assert message in capsys.readouterr().err
