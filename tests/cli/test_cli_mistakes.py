"""Mistakes on the command line, in recipes, and in what somebody else has saved: one sentence that
names the flag or the file, exit code 2, and no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusedkd.cli import main

pytestmark = pytest.mark.usefixtures("one_thread", "alone")


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """datasets tells the hub of every file that it reads, and waits where there is no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
        yield


@pytest.fixture(scope="module")
def disk(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, text.txt, rows.jsonl, a cache of them, an empty folder."""
    root = tmp_path_factory.mktemp("disk")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<end>", *alphabet])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
    tokenizer.save_pretrained(root / "teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "teacher")
    (root / "text.txt").write_text("def f(x):\n    return x\n" * 20)
    row = {"input_ids": [1, 2], "top_k_ids": [[1], [2]], "top_k_logprobs": [[-0.1], [-0.2]]}
    (root / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (root / "empty").mkdir()
    assert main(cache(root, root / "cache")) == 0
    return root


def model(disk: Path, output: Path) -> list[str]:
    return [
        *("distill", "--teacher", str(disk / "teacher"), "--student", str(disk / "teacher")),
        *("--data", str(disk / "text.txt"), "--block_size", "32", "--output_dir", str(output)),
        *("--use_cpu", "true", "--report_to", "none", "--max_steps", "1", "--disable_tqdm", "true"),
        *("--save_strategy", "no", "--per_device_train_batch_size", "2", "--backend", "reference"),
    ]


def cache(disk: Path, output: Path) -> list[str]:
    return [
        *("cache", "--teacher", str(disk / "teacher"), "--data", str(disk / "text.txt")),
        *("--block_size", "32", "--output", str(output), "--device", "cpu"),
    ]


def imported(disk: Path, output: Path) -> list[str]:
    tokenizer = str(disk / "teacher")
    return [
        *("cache", "import", str(disk / "rows.jsonl")),
        *("--tokenizer", tokenizer, "--output", str(output)),
    ]


def student(disk: Path, output: Path) -> list[str]:
    teacher = str(disk / "teacher")
    return ["student", "--from", teacher, "--layers", "1", "--output", str(output)]


COMMANDS = {"distill": model, "cache": cache, "import": imported, "student": student}


@pytest.fixture
def refused(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command of ``COMMANDS``, or words alone; its sentence, held to what all keep to."""

    def run(command: str | None, *more: str | Path) -> str:
        words = [] if command is None else COMMANDS[command](disk, tmp_path / "out")
        capsys.readouterr()
        assert main([*words, *map(str, more)]) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        last = said.err.strip().splitlines()[-1]
        assert last.startswith("fusedkd") and ": " in last and len(last) < 1500, said.err
        return last

    return run


# ---- flags -------------------------------------------------------------------------------------

HUGE = "9" * 30
FLAGS: dict[str, dict[str, list[str]]] = {
    "distill": {
        "--temperature": ["0", "-1", "nan", "inf", "1e400", "x", ""],
        "--teacher_temperature": ["0", "nan"],
        "--kd_weight": ["-1", "nan", "x"],
        "--block_size": ["1", "-5", "x", "9" * 5000],
        "--eval_share": ["2", "-1", "nan", "x"],
        "--seed": ["-1", "x", HUGE, "1.5"],
        "--per_device_train_batch_size": ["0", "-1", "x", HUGE],
        "--learning_rate": ["nan", "inf", "x", "1e999"],
        "--weight_decay": ["nan", "inf"],
        "--num_train_epochs": ["nan", "inf", "x"],
        "--max_steps": ["x", "nan", HUGE],
        "--max_grad_norm": ["nan", "x"],
        "--dataloader_num_workers": ["x", HUGE],
        "--lr_scheduler_type": ["foo"],
        "--lr_scheduler_kwargs": ["{", "7"],
        "--optim": ["foo"],
        "--optim_args": ["foo"],
        "--eval_accumulation_steps": ["0", "-1"],
        "--neftune_noise_alpha": ["-1"],
        "--gradient_accumulation_steps": ["-1", "0"],
        "--save_strategy": ["foo"],
        "--accelerator_config": ["{"],
        "--student_init": ["foo"],
        "--student_dtype": ["foo"],
        "--teacher_dtype": ["foo"],
        "--resume_from_checkpoint": ["./nowhere", ""],
        "--divergence": ["jsd(", "__import__('os')", ""],
        "--backend": ["foo"],
        "--teacher_tail": ["foo"],
        "--terms": ["foo", "cosine("],
        "--teacher": ["./nowhere", ""],
        "--student": ["./nowhere", ""],
        "--tokenizer": ["./nowhere"],
        "--teacher_cache": ["./nowhere"],
        "--data": ["./nowhere"],
        "--eval_data": ["./nowhere"],
        "--config": ["./nowhere.yaml"],
        "--bf16": ["maybe"],
        "--report": ["foo", ""],
        "--report_samples": ["-1", "x"],
        "--report_new_tokens": ["0", "x"],
        "--eval_tasks": ["hellaswag"],
        "--foo": ["1"],
    },
    "cache": {
        "--device": ["x", "meta", "cpu:-1", "cuda:99"],
        "--top-k": ["0", "-1", "99999", "x"],
        "--top-p": ["0", "2", "nan", "x"],
        "--sample": ["0", "99999", "x"],
        "--temperatures": ["0", "nan", "inf", "1,1", "x", "", "1e-300", "1e300"],
        "--batch-size": ["0", "-1", "x", HUGE],
        "--shard-mb": ["0", "-1", "nan", "inf", "x"],
        "--block_size": ["1", "x"],
        "--eval_share": ["1", "-1", "nan"],
        "--vocab-size": ["0", "-1", "99999"],
        "--teacher-dtype": ["foo"],
        "--teacher": ["./nowhere", ""],
        "--tokenizer": ["./nowhere"],
        "--data": ["./nowhere"],
        "--foo": ["1"],
    },
    "import": {
        "--tokenizer": ["./nowhere", ""],
        "--format": ["foo"],
        "--ids-column": ["a"],
        "--temperature": ["0", "-1", "nan", "inf", "x"],
        "--top-k": ["0", "-1", "99999", "x"],
        "--vocab-size": ["0", "1", "-1", HUGE, "x"],
        "--foo": ["1"],
    },
    "student": {
        "--from": ["./nowhere", ""],
        "--layers": ["0", "-1", "x"],
        "--hidden": ["0", "-1", "x"],
        "--intermediate": ["0", "-1"],
        "--heads": ["0", "-1", "x"],
        "--groups": ["0"],
        "--embedding": ["-1"],
        "--to": ["foo"],
        "--seed": ["-1", "x", HUGE],
        "--tokenizer": ["./nowhere"],
        "--foo": ["1"],
    },
}


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, flags in FLAGS.items() for flag in flags]
)
def test_values_that_a_flag_does_not_take(
    refused: Callable[..., str], tmp_path: Path, command: str, flag: str
) -> None:
    for value in FLAGS[command][flag]:
        said = refused(command, flag, value)
        name = flag.strip("-").replace("-", "_").removesuffix("_factor")
        assert name in said.replace("-", "_"), said
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distill"], "--teacher is missing"),
        (["distill", "--teacher", "t"], "--student is missing"),
        (["distill", "--teacher", "t", "--student", "s"], "--data is missing"),
        (["distill", "--config"], "--config"),
        (["distill", "--temprature", "2"], "did you mean '--temperature'?"),
        (["cache"], "--output"),
        (["cache", "--output", "x"], "--teacher is missing"),
        (["cache", "--output", "x", "--top-k", "5", "--sample", "5"], "expected one of them"),
        (["cache", "import"], "source"),
        (["cache", "import", "./nowhere.jsonl", "--output", "x"], "--tokenizer"),
        (["cache", "verify"], "folder"),
        (["cache", "verify", "./nowhere"], "nowhere"),
        (["cache", "verify", "a", "b"], "b: not a flag"),
        (["cache", "info"], "folder"),
        (["cache", "info", "./nowhere"], "nowhere"),
        (["cache", "info", __file__], __file__),
        (["student"], "--from"),
        (["doctor", "foo"], "foo"),
        (["doctor", "--run"], "--run"),
        (["doctor", "--run", "./nowhere"], "expected the --output_dir of a run"),
        (["doctor", "--run", __file__], "expected the --output_dir of a run"),
        (["doctor", "--foo"], "--foo"),
        (["demo", "--seed", "-1"], "--seed -1"),
        (["demo", "--minutes", "nan"], "--minutes nan"),
        (["demo", "--smoke", "--output", __file__], __file__),
        (["bench", "--replot", "./nowhere.json"], "nowhere.json"),
        (["bench", "--replot", __file__], __file__),
        (["foo"], "'foo'"),
        (["--foo"], "--foo"),
        ([""], "''"),
    ],
)
def test_words_alone(refused: Callable[..., str], words: list[str], expected: str) -> None:
    assert expected in refused(None, *words)


def test_flags_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """Which answers in two lines."""
    for words in (["--foo"], ["--n", "-1"], ["--form", "foo"], ["--kd-weight", "nan"]):
        assert main(["bench", *words]) == 2
        said = capsys.readouterr().err
        assert words[0] in said and "Traceback" not in said


def test_output_that_cannot_be(refused: Callable[..., str], disk: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "config.json").symlink_to(tmp_path / "file")
    places = [tmp_path / "file", tmp_path / "file" / "below"]
    for command, flag in (("distill", "--output_dir"), ("cache", "--output"),
                          ("import", "--output"), ("student", "--output")):  # fmt: skip
        for place in places:
            assert str(tmp_path / "file") in refused(command, flag, place)
    assert "config.json is a link" in refused("distill", "--output_dir", tmp_path / "links")
    for command in ("cache", "import", "student"):
        said = refused(command, "--output", tmp_path / "links")
        assert "config.json" in said or "not empty" in said
    assert (tmp_path / "file").stat().st_size == 0


def test_output_over_what_is_read(refused: Callable[..., str], disk: Path, tmp_path: Path) -> None:
    for flag in ("--teacher", "--student"):
        folder = Path(shutil.copytree(disk / "teacher", tmp_path / flag.strip("-")))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        said = refused("distill", flag, folder, "--output_dir", folder)
        assert flag in said and "would be overwritten" in said
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- what somebody else has saved --------------------------------------------------------------


def change(name: str, data: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(
        data((folder / name).read_bytes()) if callable(data) else data
    )


def configure(**more: Any) -> Callable[[Path], Any]:
    return change("config.json", lambda old: json.dumps({**json.loads(old), **more}).encode())


class _Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["FUSEDKD_CANARY"],)


def pickled(name: str, *also: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The weights in a pickle, which runs a program where it is opened without care."""

    def make(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        torch.save({**weights, "program": _Program()}, folder / name)
        (folder / "model.safetensors").unlink()
        for step in also:
            step(folder)

    return make


def index(folder: Path, name: str = "x.bin") -> None:
    names = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).state_dict()
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "model_type"),
    "config is text": (change("config.json", b"hello"), "JSON"),
    "config is a list": (change("config.json", b"[]"), "model_type"),
    "config is empty": (change("config.json", b""), ""),
    "config is nested": (change("config.json", b"[" * 100_000), "recursion"),
    "config is binary": (change("config.json", b"\xff\xfe\0"), ""),
    "sizes are words": (configure(hidden_size="x"), "hidden_size"),
    "sizes are huge": (configure(hidden_size=10**15), ""),
    "no heads": (configure(num_attention_heads=0), ""),
    "another vocabulary": (configure(vocab_size=200), ""),
    "unknown": (configure(model_type="nothing"), "nothing"),
    "its own program": (
        configure(model_type="mine", auto_map={"AutoConfig": "x.Y", "AutoModel": "x.Z"}), "code",
    ),
    "truncated": (change("model.safetensors", lambda old: old[: len(old) // 2]), ""),
    "a byte less": (change("model.safetensors", lambda old: old[:-1]), ""),
    "empty": (change("model.safetensors", b""), ""),
    "garbage": (change("model.safetensors", b"\xff" * 5000), ""),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "a pickle": (pickled("pytorch_model.bin"), "convert them"),
    "a pickle in an index": (pickled("x.bin", index), "convert them"),
    "a pickle in the config": (
        pickled("adapter_model.bin", configure(transformers_weights="adapter_model.bin")),
        "convert them",
    ),
    "an index to nothing": (
        lambda folder: [(folder / "model.safetensors").unlink(), index(folder, "x.safetensors")],
        "x.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", MODELS)
def test_models_that_are_not(
    refused: Callable[..., str],
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    monkeypatch.setenv("FUSEDKD_CANARY", str(tmp_path / "canary"))
    work, word = MODELS[how]
    damaged = Path(shutil.copytree(disk / "teacher", tmp_path / "damaged"))
    work(damaged)
    for command, flag in (("distill", "--teacher"), ("distill", "--student"),
                          ("cache", "--teacher"), ("student", "--from")):  # fmt: skip
        said = refused(command, flag, damaged)
        assert flag in said and str(damaged) in said and word in said
        assert not (tmp_path / "out").exists() and not (tmp_path / "canary").exists()


def test_a_teacher_that_names_no_class(
    refused: Callable[..., str], disk: Path, tmp_path: Path
) -> None:
    for n, names in enumerate((None, [], 7, "LlamaForCausalLM", [7], ["pipeline"], ["set_seed"])):
        folder = Path(shutil.copytree(disk / "teacher", tmp_path / str(n)))
        configure(architectures=names)(folder)
        assert "names no architecture" in refused("student", "--from", folder)


def test_tokenizers_that_are_not(refused: Callable[..., str], disk: Path, tmp_path: Path) -> None:
    for n, data in enumerate((b"hello", b"[]", b"{}", b"[" * 100_000, b"\xff")):
        folder = Path(shutil.copytree(disk / "teacher", tmp_path / str(n)))
        change("tokenizer.json", data)(folder)
        for command in ("distill", "cache", "import", "student"):
            said = refused(command, "--tokenizer", folder)
            assert "--tokenizer" in said and str(folder) in said
        said = refused("distill", "--teacher", folder, "--student", folder)
        assert "--tokenizer" in said


DATA: dict[str, tuple[str, Any]] = {
    "no UTF-8": ("a.txt", b"\xff\xfe\xfa" * 50),
    "empty text": ("a.txt", b""),
    "another kind": ("a.xyz", b"x"),
    "half a parquet": ("a.parquet", b"PAR1xxxxx"),
    "half a line": ("a.jsonl", b"{{{"),
    "no line": ("a.jsonl", b""),
    "brackets": ("a.jsonl", b"[" * 100_000),
    "no column": ("a.jsonl", {"foo": 1}),
    "text is numbers": ("a.jsonl", {"text": 7}),
    "text is nothing": ("a.jsonl", {"text": None}),
    "text is lists": ("a.jsonl", {"text": ["a"]}),
    "messages are numbers": ("a.jsonl", {"messages": 7}),
    "no template": ("a.jsonl", {"messages": [{"role": "user", "content": "x"}]}),
    "ids are a number": ("a.jsonl", {"input_ids": 7}),
    "ids are nested": ("a.jsonl", {"input_ids": [[1], [2]]}),
    "ids are fractions": ("a.jsonl", {"input_ids": [1.5, 2.5]}),
    "ids are truths": ("a.jsonl", {"input_ids": [True, False]}),
    "ids are words": ("a.jsonl", {"input_ids": ["a", "b"]}),
    "an id is missing": ("a.jsonl", {"input_ids": [1, None]}),
    "labels are words": ("a.jsonl", {"input_ids": [1, 2], "labels": ["a", "b"]}),
    "labels are missing": ("a.jsonl", {"input_ids": [1, 2], "labels": None}),
}


@pytest.mark.parametrize("what", DATA)
def test_data_that_are_not(refused: Callable[..., str], tmp_path: Path, what: str) -> None:
    name, content = DATA[what]
    path = tmp_path / name
    raw = content if isinstance(content, bytes) else (json.dumps(content) + "\n").encode() * 3
    path.write_bytes(raw)
    for command in ("distill", "cache"):
        for flag in ("--data", "--eval_data"):
            assert f"{flag}: " in refused(command, flag, path)


def test_sources_that_are_not(refused: Callable[..., str], disk: Path, tmp_path: Path) -> None:
    more = ["--tokenizer", disk / "teacher", "--output", tmp_path / "out"]
    for name, data in (("a.jsonl", b"{{{"), ("b.jsonl", b""), ("c.parquet", b"PAR1"),
                       ("d.xyz", b"x"), ("e/state.json", b"{")):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        source = path.parent if name.startswith("e") else path
        assert str(source) in refused(None, "cache", "import", source, *more)
    for source in (tmp_path / "nowhere.jsonl", disk / "empty"):
        assert str(source) in refused(None, "cache", "import", source, *more)
    assert "no such file" in refused(None, "cache", "import", "./nowhere.jsonl", *more)


def test_caches_that_are_not(
    refused: Callable[..., str], disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("manifest.json", "index.arrow"):
        folder = Path(shutil.copytree(disk / "cache", tmp_path / file))
        (folder / file).write_bytes(b"{}")
        words = ["distill", "--teacher_cache", folder, "--student", disk / "teacher"]
        words += ["--data", disk / "text.txt", "--output_dir", tmp_path / "out"]
        said = refused(None, *words)
        assert "--teacher_cache" in said and file in said
        assert main(["cache", "verify", str(folder)]) == 1  # as it says
        assert file in capsys.readouterr().out
    assert "manifest.json" in refused(None, "cache", "info", tmp_path / "manifest.json")
    assert main(["cache", "info", str(tmp_path / "index.arrow")]) == 1
    assert "index.arrow is damaged" in capsys.readouterr().out


def test_what_a_worker_says_is_a_sentence(
    refused: Callable[..., str], disk: Path, tmp_path: Path
) -> None:
    """A data loader's process hands its traceback on as text."""
    folder = Path(shutil.copytree(disk / "cache", tmp_path / "damaged"))
    shard = folder / "shard-00000.arrow"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    words = [*model(disk, tmp_path / "out"), "--dataloader_num_workers", "1"]
    place = words.index("--teacher")
    words[place : place + 2] = ["--teacher_cache", str(folder)]
    assert f"distill: {shard} is damaged" in refused(None, *words)


def test_brackets_are_no_markup(disk: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "[red]a[/b]:smile:"
    teacher = Path(shutil.copytree(disk / "teacher", tmp_path / "[/i]teacher"))
    assert main([*cache(disk, out / "cache"), "--teacher", str(teacher)]) == 0
    assert main(["cache", "info", str(out / "cache")]) == 0
    assert main([*student(disk, out / "student"), "--from", str(teacher)]) == 0
    assert main([*model(disk, out / "run"), "--student", str(teacher)]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert said.count("[red]a[/b]:smile:") >= 4 and "[/i]teacher" in said


# ---- the disk ----------------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("cache", "os.fsync"),
        ("cache", "os.replace"),
        ("import", "os.fsync"),
        ("student", "transformers.modeling_utils.safe_save_file"),
        ("student", "os.replace"),
        ("distill", "transformers.modeling_utils.safe_save_file"),
        ("distill", "fusedkd.files.os.fsync"),
    ],
)
def test_a_full_disk(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    where: str,
) -> None:
    monkeypatch.setattr(where, full)
    said = refused(command)
    assert "No space left on device" in said and str(tmp_path / "out") in said
    if command == "student":
        assert not list(tmp_path.iterdir())
    elif command != "distill":
        assert not list((tmp_path / "out").glob("*"))


def test_students_go_to_new_and_vacant_folders(
    refused: Callable[..., str], disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed run has left is nothing, and a failed one leaves what was there."""
    (tmp_path / "vacant" / "0123abcd.tmp").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        refused("student", "--output", tmp_path / "vacant")
        refused("student", "--output", tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["vacant"] and os.listdir(tmp_path / "vacant") == [
        "0123abcd.tmp"
    ]
    for place in (tmp_path / "vacant", tmp_path / "a" / "b"):
        assert main([*student(disk, place)]) == 0
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*os.listdir(place)}
        assert "not empty" in refused("student", "--output", place)


def test_terminals_obey_nobody_else(
    refused: Callable[..., str], disk: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(disk / "teacher", tmp_path / "damaged"))
    configure(model_type="\x1b]0;mine\x07")(folder)
    said = refused("distill", "--teacher", folder)
    assert said.isprintable() and "\\x1b]0;mine\\x07" in said


@pytest.mark.parametrize(
    "error",
    [
        type("SafetensorError", (Exception,), {})(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        PermissionError(errno.EACCES, "Permission denied", "out/optimizer.pt"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
    ids=["safetensors", "torch", "system", "memory", "torch's memory"],
)  # fmt: skip
def test_what_libraries_make_of_a_full_machine(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    assert "cannot be written" in refused("student")
    assert not list(tmp_path.iterdir())
    assert str(tmp_path / "out") in refused("distill")


def test_a_bug_keeps_its_traceback(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*args: Any, **kwargs: Any) -> None:
        raise ValueError("of ours")

    monkeypatch.setattr("fusedkd.train.trainer.DistillationTrainer.compute_loss", bug)
    with pytest.raises(ValueError, match="of ours"):
        main(model(disk, tmp_path / "out"))


# ---- going on ----------------------------------------------------------------------------------

WHOLE = ("model.safetensors", "optimizer.pt", "trainer_state.json")


def checkpoint(folder: Path, step: int, *names: str, **content: str) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name in names:
        (made / name).write_text(content.get(name.partition(".")[0], "{}"))
    return made


def last(folder: Path, asked: str | None = "last") -> str | None:
    from fusedkd.train.checkpoints import checkpoint_of

    return checkpoint_of(folder, asked)


@pytest.mark.parametrize(
    ("names", "content"),
    [
        (("config.json", "model.safetensors"), {}),
        (("model.safetensors", "optimizer.pt"), {}),
        (("optimizer.pt", "trainer_state.json"), {}),
        (("model.safetensors", "trainer_state.json"), {}),
        ((), {}),
        (WHOLE, {"trainer_state": ""}),
        (WHOLE, {"trainer_state": '{"epoch": 1'}),
        (WHOLE, {"trainer_state": "[]"}),
        (WHOLE, {"model": ""}),
        (WHOLE, {"optimizer": ""}),
        (("model-00001-of-00002.safetensors", "optimizer.pt", "trainer_state.json"), {}),
    ],
)
def test_the_last_checkpoint_that_is_whole(
    tmp_path: Path, names: tuple[str, ...], content: dict[str, str]
) -> None:
    whole = checkpoint(tmp_path, 9, *WHOLE)
    checkpoint(tmp_path, 8, *WHOLE)
    checkpoint(tmp_path, 15, *names, **content)
    (tmp_path / "checkpoint-99").touch()
    (tmp_path / "checkpoint-old").mkdir()
    assert last(tmp_path) == str(whole)
    checkpoint(tmp_path, 100, *WHOLE)
    assert last(tmp_path) == str(tmp_path / "checkpoint-100")
    shutil.rmtree(tmp_path)
    checkpoint(tmp_path, 15, *names, **content)
    assert last(tmp_path) is None


def test_parts_of_checkpoints(tmp_path: Path) -> None:
    """Weights in shards, of FSDP and of DeepSpeed."""
    shards = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    rest = ("model.safetensors.index.json", "optimizer.pt", "trainer_state.json")
    checkpoint(tmp_path, 1, *rest, "model-1.safetensors", "model-2.safetensors", model=shards)
    assert last(tmp_path)
    (tmp_path / "checkpoint-1" / "model-2.safetensors").unlink()
    assert last(tmp_path) is None
    for step, parts in ((2, ["pytorch_model_fsdp_0", "optimizer_0"]), (3, ["global_step3"])):
        made = checkpoint(tmp_path, step, "trainer_state.json")
        for part in parts:
            (made / part).mkdir()
        assert last(tmp_path) == str(made)


def test_killed_while_it_saves(
    disk: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The documented command goes on from the checkpoint before, and comes to the same weights."""
    more = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1"]
    more += ["--learning_rate", "0.01", "--output_dir", str(tmp_path / "run")]
    words = [*model(disk, tmp_path), *more]
    assert main(words) == 0
    whole = load_file(tmp_path / "run" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    half = tmp_path / "run" / "checkpoint-2"
    (half / "trainer_state.json").write_bytes((half / "trainer_state.json").read_bytes()[:50])
    assert str(half) in refused(None, *words, "--resume_from_checkpoint", half)
    capsys.readouterr()
    assert main([*words, "--resume_from_checkpoint", "last"]) == 0
    assert f"{half}: no trainer_state.json that can be read" in capsys.readouterr().err
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


# ---- recipes -----------------------------------------------------------------------------------


def bomb() -> str:
    """387 million words, in 0.6 KB."""
    names = ["data", "eval_data", "terms", "schedules", "report_to", "label_names", "fsdp",
             "tokenizer", "student"]  # fmt: skip
    lines, item = [], "x"
    for n, name in enumerate(names):
        lines.append(f"{name}: &a{n} [{', '.join([item] * 9)}]")
        item = f"*a{n}"
    return "\n".join(lines)


RECIPES: dict[str, tuple[str | bytes, str]] = {
    "a bomb": (bomb(), "line 1: anchors"),
    "an alias": ("seed: &a 1\nmax_steps: *a\n", "line 1: anchors"),
    "an anchor alone": ("seed: &a 1\n", "line 1: anchors"),
    "an anchor on a key": ("&a seed: 1\n", "line 1: anchors"),
    "an anchor on all": ("&a\nseed: 1\n", "anchors"),
    "a cycle": ("data: &a [*a]\n", "line 1: anchors"),
    "a merge": ("<<: {seed: 1}\n", "'<<' is not a flag"),
    "brackets": ("data: " + "[" * 60_000, "line 1: nested"),
    "braces": ("lr_scheduler_kwargs: " + "{a: " * 15_000, "line 1: nested"),
    "steps": ("".join(" " * n + "a:\n" for n in range(300)), "line 9: nested"),
    "dashes": ("data:\n" + "- " * 20_000 + "a", "nested"),
    "too large": ("# " + "x" * 100_000, "100,002 bytes"),
    "digits": ("seed: " + "9" * 5000, "--seed"),
    "digits in a mapping": ("lr_scheduler_kwargs: {a: " + "9" * 5000 + "}", "lr_scheduler_kwargs"),
    "infinity": ("learning_rate: .inf\n", "--learning_rate inf"),
    "an exponent": ("learning_rate: 1e999\n", "--learning_rate inf"),
    "a key twice": ("seed: 1\nseed: 2\n", "line 2: 'seed' is there twice"),
    "a key in two spellings": ("max_steps: 1\nmax-steps: 2\n", "'max-steps' is there twice"),
    "a key twice, deeper": ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "line 3: 'a' is there twice"),
    "a number as key": ("1: 2\n", "'1' is not a flag"),
    "a truth as key": ("true: 2\n", "'true' is not a flag"),
    "nothing as key": ("~: 2\n", "'~' is not a flag"),
    "a date as key": ("2024-01-01: 2\n", "'2024-01-01' is not a flag"),
    "a list as key": ("? [a]\n: 1\n", "a sequence as key"),
    "a mapping as key": ("? {a: b}\n: 1\n", "a mapping as key"),
    "a list as key, deeper": ("lr_scheduler_kwargs: {? [a] : 1}\n", "a sequence as key"),
    "an unknown key": ("temprature: 1\n", "did you mean 'temperature'?"),
    "a recipe in a recipe": ("config: x.yaml\n", "'config' is not a flag"),
    "help": ("help: 1\n", "'help' is not a flag"),
    "a truth": ("temperature: true\n", "--temperature"),
    "a truth for a number": ("max_steps: yes\n", "--max_steps"),
    "a date": ("temperature: 2024-01-01\n", "--temperature: invalid float value: '2024-01-01'"),
    "a mapping": ("temperature: {a: 1}\n", "--temperature"),
    "a date in a mapping": ("lr_scheduler_kwargs: {a: 2024-01-01}\n", "lr_scheduler_kwargs"),
    "a list in a list": ("data: [[a]]\n", "data: a list in a list"),
    "nothing in a list": ("data: [a, ~]\n", "data: 'nothing' in a list"),
    "a flag in a list": ("data: [a, --output_dir, b]\n", "data: '--output_dir' in a list"),
    "a program": ("seed: !!python/object/apply:os.mkdir [canary]\n", "tags (!)"),
    "a tag": ("seed: !!int 5\n", "tags (!)"),
    "bytes": ("seed: !!binary aGVsbG8=\n", "tags (!)"),
    "a set": ("data: !!set {a}\n", "tags (!)"),
    "a list of all": ("- a\n", "expected `key: value` lines, got a sequence"),
    "a word": ("hello\n", "expected `key: value` lines, got a scalar"),
    "two recipes": ("seed: 1\n---\nseed: 2\n", "another document"),
    "a tab": ("\tseed: 1\n", "line 1"),
    "half a list": ("data: [a\n", "line 2"),
    "two colons": ("seed: a: b\n", "line 1"),
    "another YAML": ("%YAML 9.9\n---\nseed: 1\n", "version"),
    "no UTF-8": (b"seed: \xff\n", "utf-8"),
    "zeros": (b"\0\0", "not valid YAML"),
    "a zero": ('student: "a\\0b"\n', "student: 'a\\x00b'"),
    "half a letter": ('student: "\\ud800"\n', "student: '\\ud800'"),
    "a module": ("divergence: canary:make(1)\n", "divergence canary:make(1) imports canary"),
    "a rule's module": ("row_rule: canary:gate(1)\n", "row_rule canary:gate(1) imports canary"),
    "a module in a list": ("divergence: ['canary:make']\n", "imports canary"),
    "code of the hub": ("trust_remote_code: yes\n", "trust_remote_code on the command line"),
    "an escape": ('student: "\\e]0;x"\n', "student: '\\x1b]0;x'"),
}  # fmt: skip


@pytest.mark.parametrize("how", RECIPES)
def test_recipes_that_are_not(refused: Callable[..., str], tmp_path: Path, how: str) -> None:
    text, expected = RECIPES[how]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["distill", "--config", path, "--output_dir", tmp_path / "out"]
    words += ["--teacher", "./t", "--data", "./x"]
    start = time.perf_counter()
    said = refused(None, *words, *([] if "student" in expected else ["--student", "./s"]))
    assert time.perf_counter() - start < 5
    assert expected in said or (expected in ("--learning_rate inf",) and "no such folder" in said)
    assert not (tmp_path / "out").exists() and not Path("canary").exists()


def test_values_are_the_words_that_are_written(tmp_path: Path) -> None:
    """YAML would make False of no, 750 of 12:30 and a date of a name."""
    from fusedkd.cli.recipe import flags_of, read_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "save_strategy: no\nbf16: on\nfp16: Off\nrun_name: 12:30\nhub_model_id: 2024-01-01\n"
        "learning_rate: 1.0e-4\nmax_grad_norm: .inf\nseed: 007\noutput_dir: '--x'\nfsdp:\n"
        "eval_data: []\ntokenizer: ~\ndata: [a b, 1, 'no']\nreport_to: none\nstudent: ''\n"
        "lr_scheduler_kwargs: {min_lr: 1.0e-5, a: [true, null, 'x']}\n",
    )
    names = [line.partition(":")[0] for line in path.read_text().splitlines()]
    assert flags_of(path, read_recipe(path), names) == [
        *("--save_strategy=no", "--bf16=true", "--fp16=false", "--run_name=12:30"),
        *("--hub_model_id=2024-01-01", "--learning_rate=1.0e-4", "--max_grad_norm=inf"),
        *("--seed=007", "--output_dir=--x", "--data", "a b", "1", "no", "--report_to=none"),
        *("--student=", '--lr_scheduler_kwargs={"min_lr": 1e-05, "a": [true, null, "x"]}'),
    ]
    path.write_text("")
    assert flags_of(path, read_recipe(path), names) == []


def test_a_recipe_with_every_kind_of_value_runs(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "save_strategy: no\nbf16: off\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 1.0e-5}\nmax_grad_norm: .inf\nreport_to: [none]\n"
    )
    words = model(disk, tmp_path / "out")
    place = words.index("--save_strategy")
    del words[place : place + 2]
    assert main([*words, "--config", str(tmp_path / "recipe.yaml")]) == 0


@pytest.mark.filterwarnings("ignore:mass")
def test_a_recipe_imports_what_the_command_line_trusts(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the command line whatever it names."""
    (tmp_path / "my_losses.py").write_text(
        "from fusedkd import divergences, row_rules\n\n@divergences.custom\n"
        "def mass(lp, lq, *, scale=1.0):\n    return scale * lq.exp()\n\n@row_rules.custom\n"
        "def clip(divergence, *, most=1.0):\n    return (most / divergence).clamp(max=1)\n"
    )
    (tmp_path / "recipe.yaml").write_text("divergence: my_losses:mass(scale=2)\n")
    monkeypatch.chdir(tmp_path)
    words = model(disk, tmp_path / "out")
    log = ("--logging_steps", "1")
    assert main([*words, *log, "--config", "recipe.yaml", "--trust_remote_code"]) == 0
    words = model(disk, tmp_path / "other")
    rule = ("--row_rule", "my_losses:clip(most=0.5)")
    assert main([*words, *log, "--divergence", "my_losses:mass(scale=2)", *rule]) == 0
    states = [tmp_path / name / "trainer_state.json" for name in ("out", "other")]
    logged = [json.loads(state.read_text())["log_history"][0] for state in states]
    assert [(step["kd"], step["loss"]) for step in logged] == [(2, 2), (2, 0.5)]


# ---- without what is not installed -------------------------------------------------------------

WITHOUT = """
import json, sys, traceback

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ImportError("No module named " + repr(name))

sys.meta_path.insert(0, Missing())
from fusedkd.cli import main
codes = []
for words in {commands}:
    try:
        codes.append(main(words))
    except SystemExit as done:
        codes.append(done.code)
    except BaseException:
        codes.append(traceback.format_exc())
print(json.dumps(codes))
"""


def test_without_what_is_not_installed() -> None:
    """Help and the doctor, whom every error recommends, need torch alone."""
    missing = ["rich", "transformers", "datasets", "accelerate", "pyarrow", "yaml", "safetensors",
               "tokenizers", "matplotlib", "triton"]  # fmt: skip
    fine = [["--help"], ["cache", "--help"], ["cache", "import", "--help"], ["student", "--help"],
            ["cache", "verify", "--help"], ["cache", "info", "--help"], ["demo", "--help"],
            ["doctor", "--help"], ["bench", "--help"], ["doctor"]]  # fmt: skip
    needing = [["distill", "--help"], ["distill", "--config", "x.yaml"], ["demo"],
               ["cache", "--output", "x"], ["cache", "verify", "x"], ["cache", "info", "x"],
               ["cache", "import", "x", "--output", "y", "--tokenizer", "z"],
               ["student", "--from", "x", "--layers", "1", "--output", "y"]]  # fmt: skip
    code = WITHOUT.format(names=missing, commands=[*fine, *needing])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(fine) + [2] * len(needing)
    assert done.stderr.count("pip install fusedkd[train]") == len(needing), done.stderr
    assert "Traceback" not in done.stderr and "right" in done.stdout
