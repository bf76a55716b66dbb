"""A teacher that a real vLLM serves: ``make test-vllm``, which installs one beside the environment
and says where in ``FUSEDKD_VLLM``."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from words import SIZES, WORDS, llama, tokenizer

from fusedkd.cache import TeacherCache
from fusedkd.cli import main
from fusedkd.teachers import ServedTeacher, Service
from fusedkd.teachers.service import TeacherError

VLLM = os.environ.get("FUSEDKD_VLLM", "")
pytestmark = pytest.mark.skipif(not VLLM, reason="make test-vllm says where vLLM is")
PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
START = 600  # seconds; a minute where nothing else runs


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    # vLLM's heads have at least 32 dimensions
    sizes = {**SIZES, "hidden_size": 64, "max_position_embeddings": 256, "initializer_range": 0.1}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
    model.bfloat16().save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (line,) = re.findall(r"^vllm (serve .*)", PAGE, re.M)
    words = [VLLM, *line.split(), "--max-model-len", "128", "--dtype", "bfloat16"]
    words += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            words, cwd=folder, env=_environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def _environment() -> dict[str, str]:
    where = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | where


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(START):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def test_its_log_probabilities_are_the_models(
    url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    teacher = ServedTeacher(Service.at(url, top_k=16), tokenizer(), tmp_path)
    assert teacher.served.protocol.name == "vllm" and teacher.served.most_tokens == 126
    asked = np.random.default_rng(0).integers(0, len(tokenizer()), (8, 40))
    (saved,) = tmp_path_factory.getbasetemp().glob("vllm0/teacher")
    model = tf.AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        logs = model(torch.from_numpy(asked)).logits.float().log_softmax(-1).numpy()
    for found, expected in zip(teacher.get_many(list(asked), 1.0), logs, strict=True):
        far = np.abs(found.log_probs - np.take_along_axis(expected, found.ids, 1))
        assert far.mean() < 0.02 and found.ids.shape == (40, 16)  # 0.008 of it vLLM's (2026-11-28)


@pytest.mark.parametrize(
    "service, message",
    [
        ({"top_k": 65}, r"--teacher_top_k 65: .*max allowed: 64.*--max-logprobs 65"),
        ({"temperature": 2.0}, "ignores it"),
        ({"model": "x"}, r"no such model, only \./teacher"),
    ],
)
def test_what_it_cannot_do(
    url: str, service: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        ServedTeacher(Service.at(url, **{"top_k": 8, **service}), tokenizer(), tmp_path)


def test_another_tokenizer(url: str, tmp_path: Path) -> None:
    other = tokenizer()
    other.add_tokens(["w1 w2"])
    with pytest.raises(TeacherError, match=r"one tokenizer|does not know the id 65"):
        ServedTeacher(Service.at(url, top_k=8), other, tmp_path)


def test_a_student(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/teachers.md."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("student")
    tokenizer().save_pretrained("student")
    Path("text").mkdir()
    Path("text/words.txt").write_text(" ".join(WORDS * 20))
    Path("teacher").symlink_to(Path("student"))  # for its tokenizer
    short = "--block_size 16 --max_steps 3 --use_cpu true --report_to none --disable_tqdm true"
    for line in re.findall(r"^fusedkd (.*)", PAGE, re.M):
        words = line.replace("http://localhost:8000", url).split()
        words += short.split() if words[0] == "distill" else ["--block_size", "16"]
        assert main(words) == 0
    assert TeacherCache("cache").manifest.source == "served by vllm"


def test_its_offline_engine(
    url: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commands of examples/vllm_answers.py."""
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(next(tmp_path_factory.getbasetemp().glob("vllm0/teacher")))
    Path("student").symlink_to(Path("teacher").resolve())
    Path("text").mkdir()
    Path("text/words.txt").write_text(" ".join(WORDS * 20))
    script = Path(__file__).parents[2] / "examples" / "vllm_answers.py"
    short = ["--max_steps", "3", "--use_cpu", "true", "--report_to", "none"]
    for line in re.findall(r"^    (fusedkd|python) (.*)", script.read_text(), re.M):
        words = line[1].split()
        if line[0] == "python":
            words = [str(Path(VLLM).parent / "python"), str(script), *words[1:]]
            subprocess.run([*words, "--max-model-len", "128"], env=_environment(), check=True)
        else:
            blocks = [] if words[:2] == ["cache", "import"] else ["--block_size", "16"]
            assert main([*words, *blocks, *(short if words[0] == "distill" else ())]) == 0
