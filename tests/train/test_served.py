"""Teachers behind HTTP: what they say arrives as it is, whatever the servers do; nothing is asked
twice."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_server import FAULTS, LogProbs, TeacherServer, bigrams, model_log_probs
from words import V, llama, rows, tokenizer

from fusedkd.cache import TeacherCache, verify
from fusedkd.cache.errors import CacheError
from fusedkd.cache.importers import ranked
from fusedkd.cache.writer import Share
from fusedkd.cli import main
from fusedkd.errors import UserError
from fusedkd.teachers import ServedTeacher, Service, decoding
from fusedkd.teachers.filling import fill
from fusedkd.teachers.service import Limits, TeacherError
from fusedkd.train import DistillationArguments, DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

K = 8
TRUTH = bigrams(V)
FAST = Limits(timeout=0.5, patience=20.0, backoff=0.002)


def sequences(n: int, length: int = 12, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, V, (n, length)))


def served(folder: Path, *servers: TeacherServer, **service: Any) -> ServedTeacher:
    urls = ",".join(server.url for server in servers)
    options = {"top_k": K, "limits": FAST, "ahead": 0} | service
    return ServedTeacher(Service.at(urls, **options), tokenizer(), folder)


def wanted(teacher: ServedTeacher, ids: np.ndarray, temperature: float = 1.0) -> Any:
    """What a cache that was made of the whole distribution would say."""
    logs = TRUTH(ids.tolist()) / temperature
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    numbers = np.broadcast_to(np.arange(V), logs.shape)
    row = teacher.layout.encode(ranked(numbers.copy(), logs, teacher.layout))
    return teacher.layout.decode(row, len(ids), temperature)


def check(teacher: ServedTeacher, asked: list[np.ndarray], temperature: float = 1.0) -> None:
    for ids, found in zip(asked, teacher.get_many(asked, temperature), strict=True):
        expected = wanted(teacher, ids, temperature)
        assert np.array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-3)


@pytest.mark.parametrize(
    "behaviour",
    [{}, {"protocol": "sglang"}, {"protocol": "sglang", "flat": False}, {"protocol": "trl"}],
    ids=["vllm", "sglang", "sglang-lists", "trl"],
)
def test_protocols(behaviour: dict[str, Any], tmp_path: Path) -> None:
    with TeacherServer(TRUTH, tokenizer(), **behaviour) as server:
        teacher = served(tmp_path, server)
        check(teacher, sequences(20))
        assert len(teacher.store) == 20
        again = pickle.loads(pickle.dumps(teacher))  # as a worker that is started afresh gets it
        server.now.down = True
        check(again, sequences(20))


def test_temperature_that_a_server_honours(tmp_path: Path) -> None:
    with TeacherServer(TRUTH, tokenizer(), honours_temperature=True) as server:
        check(served(tmp_path, server, temperature=2.0), sequences(5), 2.0)


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_questions_of_which_a_fifth_goes_wrong(tmp_path: Path, count: int) -> None:
    asked = sequences(count, length=4)
    with (
        TeacherServer(TRUTH, tokenizer(), stall=0.6) as one,
        TeacherServer(TRUTH, tokenizer(), stall=0.6) as other,
    ):
        teacher = served(tmp_path, one, other)
        for server in (one, other):
            server.now.faults, server.now.latency = 0.2, 0.001
        check(teacher, asked)
        faults = one.faults + other.faults
        assert set(faults) == set(FAULTS) and sum(faults.values()) > count / 5


@pytest.mark.parametrize(
    "behaviour, service, message",
    [
        ({"max_logprobs": 5}, {}, r"--teacher_top_k 8: .*max allowed: 5\. .*--max-logprobs 8"),
        ({}, {"temperature": 2.0}, "--teacher_temperature 2: .* ignores it"),
        ({}, {"model": "large"}, "--teacher_model large: .*no such model, only tiny"),
        ({"faults": 1.0, "kinds": ["nan"]}, {}, "no good answer .* 10 attempts.*NaN"),
        ({"faults": 1.0, "kinds": ["other"]}, {}, "no good answer .* another sequence"),
        ({"down": True}, {"limits": Limits(0.5, 0.3, 0.01)}, "no good answer to /openapi.json"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(
    behaviour: dict[str, Any], service: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with (
        TeacherServer(TRUTH, tokenizer(), **behaviour) as server,
        pytest.raises(TeacherError, match=message),
    ):
        served(tmp_path, server, **service)


def test_another_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = tokenizer()
    theirs.add_tokens(["w1 w2"])
    with (
        TeacherServer(TRUTH, theirs) as server,
        pytest.raises(TeacherError, match="one tokenizer"),
    ):
        served(tmp_path, server)

    def few(ids: list[int]) -> np.ndarray:
        return bigrams(V - 5)(ids)

    class Fewer:
        def __len__(self) -> int:
            return V - 5

    with (
        TeacherServer(few, Fewer(), tokenizes=False) as server,
        pytest.raises(TeacherError, match=f"does not know the id {V - 1}"),
    ):
        served(tmp_path, server)
    assert "does not tell how it tokenizes" in caplog.text
    with (
        TeacherServer(bigrams(V + 9), tokenizer()) as server,
        pytest.raises(TeacherError, match=rf"the vocabulary has {V}"),
    ):
        served(tmp_path, server)


def test_two_teachers_are_not_one(tmp_path: Path) -> None:
    with (
        TeacherServer(TRUTH, tokenizer()) as one,
        TeacherServer(bigrams(V, seed=1), tokenizer()) as other,
    ):
        with pytest.raises(TeacherError, match="differ"):
            served(tmp_path / "both", one, other)
        served(tmp_path / "kept", one)
        with pytest.raises(TeacherError, match=r"when .*kept was begun"):
            served(tmp_path / "kept", other)
        with pytest.raises(CacheError, match="another top_k"):
            served(tmp_path / "kept", one, top_k=3)


def test_a_server_that_dies_is_left_alone(tmp_path: Path) -> None:
    with TeacherServer(TRUTH, tokenizer()) as one, TeacherServer(TRUTH, tokenizer()) as other:
        teacher = served(tmp_path, one, other)
        before = sum(one.asked.values())
        one.now.faults, one.now.kinds = 1.0, ["503"]
        check(teacher, sequences(400))
        # five in a row open its circuit; then one tries it now and then. At first, many are open
        assert sum(one.asked.values()) - before < 150
        one.now.faults, other.now.down = 0.0, True
        check(teacher, sequences(20, seed=1))  # it is tried again


def test_an_end_that_is_clear(tmp_path: Path) -> None:
    with TeacherServer(TRUTH, tokenizer()) as server:
        teacher = served(tmp_path, server, limits=replace(FAST, patience=0.2))
        teacher.get(sequences(1)[0], 1.0)
        server.now.down = True
        with pytest.raises(TeacherError, match=r"no good answer .*HTTP 503.*goes on"):
            teacher.get_many(sequences(50, seed=1), 1.0)
        server.now.down = False
        check(teacher, sequences(3))


def test_lengths(tmp_path: Path) -> None:
    with TeacherServer(TRUTH, tokenizer(), context=20) as server:
        teacher = served(tmp_path, server)
        teacher.check_rows("training", sequences(2, 18))
        check(teacher, sequences(2, 18))
        with pytest.raises(TeacherError, match=r"has 19 tokens, .* takes 18 .*--max-model-len 21"):
            teacher.check_rows("training", sequences(2, 19))


def test_a_row_of_the_store_that_is_damaged_is_asked_for_again(tmp_path: Path) -> None:
    with TeacherServer(TRUTH, tokenizer()) as server:
        teacher = served(tmp_path, server)
        check(teacher, sequences(3))
        teacher.store._run("UPDATE answers SET codes = zeroblob(length(codes)) WHERE rowid = 2")
        server.asked.clear()
        check(teacher, sequences(3))
        assert sum(server.asked.values()) == 1


@pytest.mark.parametrize("protocol", ["vllm", "sglang", "trl"])
def test_scan_reads_what_a_parser_reads(protocol: str) -> None:
    read, scan, parse = (
        getattr(decoding, f"{how}_{protocol}") for how in ("read", "scan", "parse")
    )
    server = TeacherServer(TRUTH, tokenizer(), protocol=protocol, flat=False)
    for ids in sequences(5, 30):
        content = server.answer(ids.tolist(), K, 1.0)
        entries, expected = scan(content), parse(content)
        assert entries is not None
        for one, other in zip(entries, expected, strict=True):
            assert np.array_equal(one, other)
        spaced = content.replace(b":", b": ").replace(b",", b", ")
        assert scan(spaced) is None
        assert np.array_equal(read(spaced).logs, expected.logs)
    most = K + 1 if protocol == "vllm" else K  # the token itself
    assert entries.counts.min() == K and entries.counts.max() == most


def test_lists_that_are_not_all_alike() -> None:
    echo = b'"input_token_logprobs":[[null,3,null],[-1.5,4,null],[-2.0,5,null]]'
    said = b'{"meta_info":{%s,"input_top_logprobs":[null,%s]}}'
    ragged = said % (echo, b"[[-0.5,1,null],[-2.5,2,null]],[[null,7,null]]")
    for read in (decoding.scan_sglang, decoding.parse_sglang):
        entries = read(ragged)
        assert entries.counts.tolist() == [2, 1] and entries.ids.tolist() == [1, 2, 7]
        np.testing.assert_array_equal(entries.logs, [-0.5, -2.5, np.nan])
        assert entries.echo.tolist() == [3, 4, 5]
    for odd in (b'[[-0.5,1,"]]]"]],[[-1.0,7,null]]', b"[[-0.5,1,null]],[],[[-1,7,null]]"):
        assert decoding.scan_sglang(said % (echo, odd)) is None
    for odd in (b"[[-0.5,null,null]]", b"[[-0.5,1.5,null]]", b"[[-0.5,1,null,2]]"):
        assert decoding.scan_sglang(said % (echo, odd)) is None
    rows = b'{"logprobs":[[%s]],"logprob_token_ids":[[%s]],"actual_token_ids":[[[8],[9]]]}'
    ragged = rows % (b"[-1.0,-2.0],[null]", b"[1,2],[3]")
    for read in (decoding.scan_trl, decoding.parse_trl):
        entries = read(ragged)
        assert entries.counts.tolist() == [2, 1] and entries.ids.tolist() == [1, 2, 3]
        np.testing.assert_array_equal(entries.logs, [-1, -2, np.nan])
        assert entries.echo.tolist() == [-1, 8, 9]
    for odd in ((b"[-1.0],[-2.0]", b"[1,2],[]"), (b"[],[]", b"[],[]"), (b"[1],[]", b"[1],[]")):
        assert decoding.scan_trl(rows % odd) is None
    with pytest.raises(ValueError, match="differ in number"):
        decoding.parse_trl(rows % (b"[-1.0],[-2.0]", b"[1,2],[]"))


# ---- the trainer ----


def arguments(folder: Path, **more: Any) -> DistillationArguments:
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return DistillationArguments(str(folder), **(options | more))


def model_teacher() -> LogProbs:
    torch.manual_seed(7)
    return model_log_probs(llama())


def losses(teacher: Any, folder: Path, **more: Any) -> list[float]:
    torch.manual_seed(0)
    trainer = DistillationTrainer(
        llama(), teacher, arguments(folder, **more), train_dataset=rows(16),
        processing_class=tokenizer(),
        data_collator=_collate,
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in features])
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("ahead", [0, 2])
def test_training_from_a_server_is_training_from_a_cache(ahead: int, tmp_path: Path) -> None:
    with TeacherServer(model_teacher(), tokenizer(), latency=0.002) as server:
        teacher = served(tmp_path / "answers", server, ahead=ahead)
        server.now.faults = 0.2
        live = losses(teacher, tmp_path / "a")
        data = [np.array(row["input_ids"]) for row in rows(16)]
        asked = sum(server.asked.values())
        fill(tmp_path / "cache", data, teacher)
        missing = len({tuple(ids.tolist()) for ids in data}) - len(teacher.store)
        assert sum(server.asked.values()) == asked and missing == 0  # 6 steps of 4 are all 16
        server.now.down = True
        again = losses(teacher, tmp_path / "b")
    assert not verify(tmp_path / "cache")[1]
    cached = losses(TeacherCache(tmp_path / "cache"), tmp_path / "c")
    assert live == again == cached and all(map(math.isfinite, live))


def test_on_policy(tmp_path: Path) -> None:
    with TeacherServer(model_teacher(), tokenizer()) as server:
        found = losses(
            served(tmp_path / "answers", server), tmp_path / "a", max_steps=2,
            on_policy_share=1.0, on_policy_prompt=5, on_policy_new_tokens=5,
            divergence="reverse_kl",
        )  # fmt: skip
        assert len(found) == 2 and all(map(math.isfinite, found))
        data = {tuple(row["input_ids"]) for row in rows(16)}
        asked = [ids for ids in server.asked if len(ids) <= 10]
        assert len(asked) >= 2 and not data & set(server.asked)


# ---- the command line ----


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "student")
    tokenizer().save_pretrained(tmp_path / "student")
    words = np.random.default_rng(0).integers(0, 60, 1200)
    (tmp_path / "words.txt").write_text(" ".join(f"w{n}" for n in words))
    return tmp_path


def flags(disk: Path, url: str, *more: str) -> list[str]:
    return [
        *("distill", "--teacher", url, "--teacher_top_k", "8", "--student", str(disk / "student")),
        *("--data", str(disk / "words.txt"), "--block_size", "16"),
        *("--output_dir", str(disk / "out")),
        *("--per_device_train_batch_size", "2", "--use_cpu", "true", "--report_to", "none"),
        *("--disable_tqdm", "true", "--report", "none", "--seed", "3", "--save_steps", "5", *more),
    ]  # fmt: skip


def test_commands(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TeacherServer(model_teacher(), tokenizer()) as server:
        assert main(flags(disk, server.url, "--max_steps", "3")) == 0
        assert "tiny, top 8, from http" in capsys.readouterr().out
        cache = [
            *("cache", "--teacher", server.url, "--top-k", "8", "--output", str(disk / "cache")),
            *("--data", str(disk / "words.txt"), "--block_size", "16"),
        ]  # fmt: skip
        assert main([*cache, "--tokenizer", str(disk / "student")]) == 0
        assert main([*cache, "--tokenizer", str(disk / "student")]) == 0
        assert max(n for ids, n in server.asked.items() if len(ids) != 16 or _probe(ids)) > 1
        assert {n for ids, n in server.asked.items() if not _probe(ids)} <= {1, 2}
        cached = flags(disk, "", "--max_steps", "2", "--teacher_cache", str(disk / "cache"))
        del cached[1:5]
        cached += ["--output_dir", str(disk / "other")]
        assert main(cached) == 0
        capsys.readouterr()
        for wrong, said in (
            ([*cache], "--tokenizer is missing"),
            ([*cache, "--temperatures", "1,2"], "one of --temperatures"),
            ([*cache, "--device", "cpu"], "no --device"),
            (flags(disk, "http://"), "is no address"),
            (flags(disk, server.url, "--temperature", "2"), "--teacher_temperature 2"),
            (flags(disk, server.url, "--teacher_ahead", "99"), "--teacher_ahead 99"),
            (flags(disk, server.url, "--teacher_protocol", "x"), "--teacher_protocol x"),
            (flags(disk, server.url, "--teacher_timeout", "0"), "--teacher_timeout 0"),
            (flags(disk, server.url + ",file:///x"), "is no address"),
        ):  # fmt: skip
            assert main([*wrong, "--output_dir" if wrong[0] == "distill" else "--output", "x"]) == 2
            assert said in capsys.readouterr().err


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    rows = sequences(9)
    with TeacherServer(TRUTH, tokenizer()) as server:
        one, other = served(tmp_path / "one", server), served(tmp_path / "other", server)
        assert fill(tmp_path / "whole", rows, one, 800)
        assert not fill(tmp_path / "parts", rows, other, 800, share=Share(1, 2))
        assert fill(tmp_path / "parts", rows, other, 800, share=Share(0, 2))
        assert {n for ids, n in server.asked.items() if not _probe(ids)} == {2}
    whole, parts = (sorted((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    assert len(whole) > 4
    assert [(p.name, p.read_bytes()) for p in whole] == [(p.name, p.read_bytes()) for p in parts]


def _probe(ids: tuple[int, ...]) -> bool:
    return ids == tuple(np.linspace(0, V - 1, 16).astype(int).tolist())


def test_a_trainer_that_is_killed_asks_for_nothing_again(disk: Path) -> None:
    """What was answered before is in the store; what was not is asked for again, and nothing
    else."""
    with TeacherServer(model_teacher(), tokenizer(), latency=0.002, hold_after=31) as server:
        words = flags(disk, server.url, "--max_steps", "30", "--teacher_ahead", "2")
        store = disk / "out" / "teacher_answers"
        code = "import sys; from fusedkd.cli import main; sys.exit(main(sys.argv[1:]))"
        child = subprocess.Popen(
            [sys.executable, "-c", code, *words], start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < deadline and _kept(store) < 30:
                time.sleep(0.05)
            assert _kept(store) == 30, child.stderr and child.stderr.read().decode()[-2000:]
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        kept = {ids for ids, n in server.answered.items() if not _probe(ids)}
        assert len(kept) == 30
        server.now.hold_after = math.inf
        server.now.open.set()
        server.asked.clear()
        assert main([*words, "--resume_from_checkpoint", "last"]) == 0
        again = {ids for ids in server.asked if not _probe(ids)}
        assert again and not again & kept
        assert all(n == 1 for ids, n in server.asked.items() if not _probe(ids))


def _kept(folder: Path) -> int:
    import sqlite3

    path = folder / "answers-0.sqlite"
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(path) as file:
            return int(file.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:  # not yet made
        return 0


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in sys.modules if n.startswith("fusedkd.teachers.client")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(UserError, match=r"fusedkd\[served\]"):
        ServedTeacher(Service.at("http://127.0.0.1:1"), tokenizer(), tmp_path)
