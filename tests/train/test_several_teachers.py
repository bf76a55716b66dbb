"""Several teachers, by a column of the data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from teacher_server import TeacherServer, model_log_probs
from words import V, llama, rows, tokenizer

from fusedkd.cache import CacheError, Job, Layout, Policy, TeacherCache, build
from fusedkd.cache.keys import tokenizer_hash
from fusedkd.cli import main
from fusedkd.teachers import LiveTeacher, RoutedTeachers, ServedTeacher, Service
from fusedkd.train import DistillationArguments, DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["math", "code", "chat", "math", "code", "math", "chat", "chat"]


def data(n: int = 16) -> Dataset:
    made = [{**row, "labels": row["input_ids"]} for row in rows(n)]
    return Dataset.from_list([{**row, "domain": NAMES[i % 8]} for i, row in enumerate(made)])


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    return llama().eval()


def cache(folder: Path, teacher: Any, name: str) -> TeacherCache:
    own = [row["input_ids"] for row in data() if row["domain"] == name]
    facts = {"teacher": name, "teacher_hash": None, "dtype": "float32",
             "tokenizer_hash": tokenizer_hash(tokenizer()), "padded_vocab_size": V}  # fmt: skip
    live = LiveTeacher(teacher)
    job = Job(own, Layout(Policy("top", V), V), facts)
    build(folder, job, lambda ids: live({"input_ids": ids}))
    return TeacherCache(folder)


def trainer(teacher: Any, folder: Path, train: Any = None, **more: Any) -> DistillationTrainer:
    torch.manual_seed(0)
    options = {
        "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "ce_weight": 0.5,
    }  # fmt: skip
    return DistillationTrainer(
        llama(), teacher, DistillationArguments(str(folder), **(options | more)),
        train_dataset=data() if train is None else train, eval_dataset=data(8),
        processing_class=tokenizer(),
    )  # fmt: skip


def logs(made: DistillationTrainer) -> list[dict[str, float]]:
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


def test_rows_learn_from_their_own_teacher(tmp_path: Path) -> None:
    """A model, a cache and a server: the same losses as with three models."""
    models = {name: model(seed) for seed, name in enumerate(("math", "code", "chat"), 1)}
    plain = trainer(RoutedTeachers(models, "domain"), tmp_path / "a")
    expected = logs(plain)
    with TeacherServer(model_log_probs(models["chat"]), tokenizer(), max_logprobs=V) as server:
        served = ServedTeacher(
            Service.at(server.url, top_k=V, ahead=1), tokenizer(), tmp_path / "answers"
        )
        mixed = {"math": models["math"], "code": cache(tmp_path / "c", models["code"], "code")}
        made = trainer(RoutedTeachers({**mixed, "chat": served}, "domain"), tmp_path / "b")
        found = logs(made)
    asked = {ids for ids in server.asked if len(ids) == 20}
    assert asked == {tuple(row["input_ids"]) for row in data() if row["domain"] == "chat"}
    for one, other in zip(found, expected, strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=2e-3)
        names = {name for name in one if name.startswith("kd_")}
        assert names and names <= {"kd_math", "kd_code", "kd_chat"}
        for name in names:
            assert math.isclose(one[name], other[name], rel_tol=1e-2)
            assert f"ce_{name[3:]}" in one and f"top1_agreement_{name[3:]}" in one
    assert "eval_kd_code" in plain.evaluate()


def test_a_step_is_the_mean_over_all_rows(tmp_path: Path) -> None:
    """One teacher under three names is one teacher."""
    teacher = model(1)
    one = logs(trainer(teacher, tmp_path / "a", data().remove_columns("domain")))
    three = RoutedTeachers(dict.fromkeys(("math", "code", "chat"), teacher), "domain")
    several = logs(trainer(three, tmp_path / "b"))
    for a, b in zip(one, several, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert math.isclose(a["kd"], b["kd"], rel_tol=1e-5)


def test_mistakes(tmp_path: Path) -> None:
    models = {"math": model(1), "code": model(2)}
    other: Any = {"chat": cache(tmp_path / "c", models["code"], "code")}
    for teacher, train, error, message in (
        (RoutedTeachers(models, "domain"), None, ValueError, "name a teacher 'chat': expected one"),
        (RoutedTeachers(models, "field"), None, ValueError, "no such column, only"),
        (RoutedTeachers(models | other, "domain"), None, CacheError, "are not in the cache"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            trainer(teacher, tmp_path / "out", train)
    with pytest.raises(TypeError, match="math is a str"):
        RoutedTeachers({"math": "folder"}, "domain")  # type: ignore[dict-item]
    three = RoutedTeachers({**models, "chat": model(3)}, "domain")
    with pytest.raises(ValueError, match="on_policy_share"):
        trainer(three, tmp_path / "out", on_policy_share=0.5, ce_weight=0.0)
    with pytest.raises(ValueError, match="need the teacher's own states"):
        trainer(three, tmp_path / "out", terms=["cosine"])


def test_command(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    models = {name: model(seed) for seed, name in enumerate(("math", "code", "chat"), 1)}
    for name in ("math", "student"):
        (models["math"] if name == "math" else llama()).save_pretrained(name)
        tokenizer().save_pretrained(name)
    cache(Path("code"), models["code"], "code")
    data().remove_columns("labels").to_json("data.jsonl")
    run = "distill --student student --data data.jsonl --packing none --eval_share 0 "
    run += "--max_steps 2 --per_device_train_batch_size 8 --use_cpu true --report_to none "
    run += "--logging_steps 1 --disable_tqdm true --teacher_top_k 65 --output_dir out"
    with TeacherServer(model_log_probs(models["chat"]), tokenizer(), max_logprobs=V) as server:
        named = [
            "--teacher",
            "math=math",
            "--teacher=code=./code",
            "--teacher",
            f"chat={server.url}",
        ]
        assert main([*run.split(), *named, "--teacher_column", "domain"]) == 0
    said = capsys.readouterr().out
    assert "code: code, top 65, from code; chat: tiny" in said.replace("\n", " ") or "chat" in said
    assert (tmp_path / "out" / "teacher_answers" / "chat" / "answers-0.sqlite").exists()
    report = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"kd_math", "kd_code", "kd_chat"} <= {name for entry in report for name in entry}
    math_ = ["--teacher", "math=math", "--teacher_column", "domain"]
    for wrong, message in (
        (math_[:2], "NAME=SOURCE for each name"),
        (math_, "name a teacher 'chat'"),
        ([*math_[:3], "field"], "--teacher_column field: there is no such column"),
        ([*math_, *math_[:2]], "each name once"),
        (["--teacher", "math", *math_[2:]], "and no column"),
        ([*math_, "--packing", "flatten"], "expected --packing none"),
    ):
        assert main([*run.split(), "--output_dir", "other", *wrong]) == 2
        assert message in capsys.readouterr().err
