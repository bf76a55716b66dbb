"""What README, CONTRIBUTING and docs show runs, and the files that they name exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import children
import pytest
import torch
import transformers as tf
from teacher_server import TeacherServer, model_log_probs
from words import WORDS, V, bert, llama, rows, tokenizer

from fusedkd import LMHead, cli
from fusedkd.benchmarks import end_to_end, page, resources
from fusedkd.benchmarks.cache import __main__ as cache

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
ROOTS = ("fusedkd", "kernels", "benchmarks")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.M | re.S)
BLOCKS = [
    pytest.param(language, text, id=f"{path.relative_to(ROOT)}-{i}")
    for path in DOCUMENTS
    for i, (language, text) in enumerate(FENCE.findall(path.read_text()))
]
PROSE = "\n".join(FENCE.sub("", path.read_text()) for path in DOCUMENTS)
QUOTED = {" ".join(text.split()) for text in re.findall(r"`([^`]+)`", PROSE)}
COMMANDS = sorted(c for c in QUOTED if re.match(r"(make|fusedkd|python|pip|pytest) ", c))

# What makes a command small enough for a test. Of some only the help: what they do with files that
# a document does not show is tested where these are made.
SHORT = (
    "--max_steps 1 --use_cpu true --report_to none --per_device_train_batch_size 2 "
    "--disable_tqdm true"
)
SMALL = {
    "fusedkd distill": SHORT + " --block_size 8",
    "fusedkd distill --teacher ./teacher --student ./student --data chat.jsonl": SHORT,
    "fusedkd distill --teacher_cache cache/ --student ./student --data chat.jsonl": SHORT,
    "fusedkd distill --teacher math=./teacher": SHORT,
    "fusedkd cache --teacher ./teacher --data domains.jsonl": "--top-k 4",
    "fusedkd distill --teacher http:": SHORT + " --block_size 8 --teacher_ahead 0",
    "fusedkd distill --config recipes/qad.yaml": SHORT + " --block_size 8 --quantise_group 8",
    "fusedkd cache --teacher http:": "--block_size 8",
    "fusedkd cache --teacher ./teacher --student_tokenizer": "--block_size 8",
    "fusedkd cache": "--block-size 8 --top-k 4",
    "fusedkd cache --teacher ./teacher --data chat.jsonl": "--top-k 4",
    "fusedkd data": "",
    "fusedkd plan": "--seq 16",
    "python -m fusedkd.plan.measured": "--dry",
    "fusedkd bench": "--n 4 --vocab 100 --repeats 1 --budget 0.1 --providers fusedkd",
    "fusedkd bench --end-to-end": "--memory-limit 0.001",
    "fusedkd doctor": "",
    "fusedkd config": "",
    "fusedkd --version": "",
    "python -m fusedkd --version": "",
    "fusedkd student": "",
    "fusedkd warmup": "--vocab 99 --rows 2 --temperature 1 --workers 1",
    "python -m benchmarks.counted": "--divergences forward_kl",
    "python -m benchmarks.resources": "",
    "python -m fusedkd.benchmarks.cache": "--only size",
    "python -m fusedkd.benchmarks.tokens": "--tokens 64 --vocab 300 --hidden 16 --rounds 1",
    "python -m fusedkd.benchmarks.on_policy": "--smoke --teacher-steps 2 --student-steps 2 "
    "--steps 2 --new-tokens 4",
    "python -m fusedkd.benchmarks.estimators": "--samples 2000",
    "python -m fusedkd.benchmarks.memory": "--tokens 8 16 --vocab 300 --providers fusedkd",
    "python -m fusedkd.benchmarks.across": "--smoke --seeds 1 --teacher-steps 1 --steps 1",
    "python -m fusedkd.benchmarks.alignment": "--tokens 2000 --vocab 300 --hidden 16",
    "python -m fusedkd.benchmarks.attention": "--terms attention_kl --lengths 8 --tokens 16 "
    "--heads 2 --rounds 1",
    "python -m fusedkd.benchmarks.own": "--rows 4 --vocab 50 --rounds 1",
    "python -m fusedkd.benchmarks.quantised": "--smoke --steps 2 --seeds 0",
    "python -m fusedkd.benchmarks.served": "--only decoding --tokens 20",
    "python -m fusedkd.benchmarks.hosts": "--tokens 8 --vocabulary 50 --hosts",
}
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant {% endif %}"
HELP = "fusedkd (distill|distill --config|cache|data|cache import|cache info|cache verify|student|"
HELP += "completion|plan|demo|warmup)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: a checkout, with models and text beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "words.txt").write_text(" ".join(WORDS * 8))
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    for name in ("chat.jsonl", "more.jsonl"):
        (tmp_path / name).write_text((json.dumps({"messages": turns}) + "\n") * 8)
    narrow = {**bert().config.to_dict(), "num_attention_heads": 12}
    deep = tf.BertConfig(**{**narrow, "num_hidden_layers": 12})
    with (tmp_path / "domains.jsonl").open("w") as file:
        for n in range(8):
            file.write(json.dumps({"messages": turns, "domain": ("math", "code")[n % 2]}) + "\n")
    models = {"teacher": llama(), "student": llama(), "bert": tf.BertForMaskedLM(deep)}
    models["narrow"] = tf.BertForMaskedLM(tf.BertConfig(**narrow))
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        reader = tokenizer()
        reader.chat_template = CHAT
        reader.save_pretrained(tmp_path / name)
    return tmp_path


def taken_for_granted(snippet: str) -> dict[str, Any]:
    student, teacher = llama(), llama()
    hidden = torch.randn(2, 2, 5, student.config.hidden_size)
    head = LMHead(hidden[0].clone().requires_grad_(), student.lm_head.weight)
    return {
        "student_logits": torch.randn(2, 5, V, requires_grad=True),
        "teacher_logits": torch.randn(2, 5, V),
        "labels": torch.randint(V, (2, 5)),
        "student_model": student,
        "teacher_model": teacher,
        "student_hidden": hidden[0].clone().requires_grad_(),
        "teacher_hidden": hidden[1],
        "student": student if "Trainer(" in snippet else head,
        "teacher": teacher,
        "data": rows(4),
        "tokenizer": tokenizer(),
        "texts": [" ".join(WORDS[i : i + 5]) for i in range(8)],
        "batches": [{"input_ids": torch.ones(2, 5).long(), "labels": torch.ones(2, 5).long()}],
        "collator": tf.DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    }


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    environment = dict(word.split("=") for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(environment) :]
    if words[0] == "pip":  # `make wheel-test` does it; the extras exist
        listed = (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2]
        for extras in re.findall(r"\[([\w,]+)\]", command):
            assert {*extras.split(",")} <= {*re.findall(r"^(\w+) = \[", listed, re.M)}, extras
        return
    if words[0] == "vllm":  # somebody else's: `make test-vllm` runs it
        return
    if words[0] == "torchrun":  # in one process
        words = words[words.index("fusedkd") :]
        command = shlex.join(words)
    if words[0] == "pytest":
        children.tests(
            "--collect-only", f"--rootdir={ROOT}", f"../{words[1]}", *words[2:], **environment
        )
        return
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    plain = re.sub(r"http://127\.0\.0\.1:\d+", "http:", command)
    known = max((start for start in SMALL if plain.startswith(start)), key=len, default=None)
    assert known, f"{command}: say in SMALL how a test can run it"
    words += shlex.split(SMALL[known])
    if words[0] == "fusedkd":
        assert cli.main(words[1:]) == 0
    else:
        module = words[2] if words[2].startswith("fusedkd") else f"fusedkd.{words[2]}"
        monkeypatch.setattr("sys.argv", words[2:])
        program = importlib.import_module(module)
        if hasattr(program, "__path__"):
            program = importlib.import_module(f"{module}.__main__")
        assert not program.main()


@pytest.mark.parametrize("language, text", BLOCKS)
def test_block(language: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if language == "python":
        names = taken_for_granted(text)
        exec(text, names)
        assert torch.isfinite(names.get("loss", torch.zeros(())))
    elif language == "yaml":
        (folder / "own.yaml").write_text(text)
        files = "--teacher bert --student narrow --data text/ --output_dir out"
        run(f"fusedkd distill --config own.yaml {files}", monkeypatch)
    elif re.match(r"fusedkd/ ", text):  # where things are
        for name in re.findall(r"([\w/]+\.py)\b", text):
            assert any(ROOT.glob(f"*/**/{name}")), name
        rooms = {path.parent for top in ROOTS for path in (ROOT / top).glob("*/__init__.py")}
        named = set(re.findall(r"^ *(\w+/) ", text, re.M))
        assert {f"{room.name}/" for room in rooms if not room.is_symlink()} <= named
    else:
        with TeacherServer(model_log_probs(llama()), tokenizer(), max_logprobs=64) as server:
            for command in text.splitlines():
                address = server.url if command.startswith("fusedkd") else ""
                run(command.replace("http://localhost:8000", address), monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()  # where some write
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "LARGE", 300)
    monkeypatch.setattr(end_to_end, "VOCABULARIES", (300,))
    monkeypatch.setattr(
        end_to_end,
        "in_child",
        lambda measure, step, **_: measure({**step, "batch": 1, "length": 8, "steps": 3}),
    )
    every = list(resources.jobs(["sm_90"], ["bf16"], ["plain"]))
    monkeypatch.setattr(resources, "jobs", lambda *axes: every[:1])
    monkeypatch.setattr(page, "replace", lambda text: None)
    if re.fullmatch(HELP, command):
        with pytest.raises(SystemExit) as done:
            cli.main([*command.removesuffix(" --config").split()[1:], "--help"])
        assert done.value.code == 0
    else:
        run(command, monkeypatch)


def test_files_that_are_named_exist() -> None:
    names = {n for n in QUOTED if re.fullmatch(r"[\w./-]+\.(py|md|yaml|png|json|txt)", n)}
    for name in names - {"outputs/demo/report.md"}:  # what `make demo` makes
        assert any(ROOT.glob(f"*/**/{name}")) or (ROOT / name).exists(), name
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path}: {link}"


def test_readme_is_short_and_says_what_was_not_tried() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert "never been run on a GPU" in " ".join(lines[:25])
