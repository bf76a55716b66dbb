"""Students whose tokenizer is not their teacher's, which is served, or whose answers are cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_server import TeacherServer, model_log_probs
from tokenizer_kinds import texts
from two_tokenizers import llama, loss_and_gradients, other, rows, small, trainer

from fusedkd.alignment import Retelling
from fusedkd.cache import TeacherCache, verify
from fusedkd.cache.errors import CacheError
from fusedkd.cli import main
from fusedkd.errors import UserError
from fusedkd.teachers import ServedTeacher, Service
from fusedkd.teachers.service import Limits, TeacherError

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOCOLS = ["vllm", "sglang", "trl"]


@pytest.fixture(scope="module")
def teacher() -> Any:
    return llama(len(other()), seed=1)


def told() -> list[np.ndarray]:
    """The data as the teacher reads them."""
    retelling = Retelling(small(), other())
    return [np.array(retelling(ids).ids) for ids in rows(small())["input_ids"]]


def cached(folder: Path, teacher: Any, **kept: Any) -> TeacherCache:
    return TeacherCache.build(folder, teacher, other(), told(), **kept)


def served(folder: Path, server: TeacherServer, **service: Any) -> ServedTeacher:
    limits = Limits(timeout=2.0, patience=20.0, backoff=0.002)
    options = {"top_k": 0, "limits": limits, "ahead": 0} | service
    return ServedTeacher(Service.at(server.url, **options), other(), folder)


def loss(folder: Path, teacher: Any, kind: str, **settings: Any) -> tuple[Any, list[Any]]:
    ours, theirs = small(), other()
    given = {"cross_tokenizer": kind, "alm_temperature": 3.0, "ce_weight": 0.2, **settings}
    made = trainer(folder, llama(len(ours)), teacher, ours, theirs, rows(ours), **given)
    return loss_and_gradients(made)


def same(found: Any, expected: Any, **near: float) -> None:
    torch.testing.assert_close(found[0], expected[0], **near)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, **near)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_served_teacher_is_the_live_one(tmp_path: Path, teacher: Any, protocol: str) -> None:
    live = loss(tmp_path, teacher, "alm")
    with TeacherServer(model_log_probs(teacher), other(), protocol=protocol) as server:
        found = loss(tmp_path, served(tmp_path / "answers", server), "alm")
        asked = sum(server.answered.values())
        again = served(tmp_path / "answers", server)  # what was said is kept
        probes = sum(server.answered.values()) - asked
        same(loss(tmp_path, again, "alm"), found, rtol=0, atol=0)
        assert sum(server.answered.values()) == asked + probes
    same(found, live, rtol=2e-5, atol=1e-6)


def test_a_cache_of_the_actual_tokens_is_the_live_teacher(tmp_path: Path, teacher: Any) -> None:
    made = cached(tmp_path / "cache", teacher, actual=True)
    assert verify(made.folder)[1] == []
    same(loss(tmp_path, made, "alm"), loss(tmp_path, teacher, "alm"), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["alm", "shared_kl", "both"])
def test_a_cache_of_hidden_states_is_the_live_teacher(tmp_path: Path, kind: str) -> None:
    """In bf16, so that nothing is rounded."""
    teacher = llama(len(other()), seed=1).bfloat16()
    made = cached(tmp_path / "cache", teacher, hidden="bf16")
    live = loss(tmp_path, teacher, kind)
    same(loss(tmp_path, made, kind), live, rtol=2e-2, atol=2e-3)  # batches of other shapes, in bf16


def test_what_a_cache_keeps_of_a_sequence(tmp_path: Path, teacher: Any) -> None:
    made = cached(tmp_path, teacher, actual=True)
    for ids in told():
        (found,) = made.log_probs_of([ids])
        truth = model_log_probs(teacher)(ids.tolist())[:-1]
        np.testing.assert_allclose(found[:-1], truth[range(len(ids) - 1), ids[1:]], atol=1e-5)
        assert found[-1] == 0
    assert made.layout.most_bytes_per_token == 4


def test_a_server_that_misbehaves(tmp_path: Path, teacher: Any) -> None:
    kinds = ("503", "reset", "cut", "html", "other", "null", "short", "no_choices")
    log_probs = model_log_probs(teacher)
    with TeacherServer(log_probs, other(), kinds=kinds) as server:
        asked = served(tmp_path, server)
        server.now.faults = 0.5
        for ids, found in zip(told(), asked.log_probs_of(told()), strict=True):
            truth = log_probs(ids.tolist())[range(len(ids) - 1), ids[1:]]
            np.testing.assert_allclose(found[:-1], truth, atol=1e-5)
        assert server.faults
        assert asked.log_probs_of([np.array([3])])[0].tolist() == [0.0]


# ---- what a user may get wrong ----


def test_nothing_shared(tmp_path: Path, teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared vocabulary is made where it is compared."""
    nothing = torch.zeros(0, dtype=torch.int64)
    monkeypatch.setattr("fusedkd.teachers.aligned.shared_vocabulary", lambda *_: (nothing, nothing))
    assert loss(tmp_path, teacher, "alm")[0] > 0
    with pytest.raises(ValueError, match="'both': the two tokenizers share no token: expected 'a"):
        loss(tmp_path, teacher, "both")


@pytest.mark.parametrize(
    ("kept", "kind", "said"),
    [
        ({"top_k": 4}, "alm", r"gives top 4, .*--student_tokenizer with --actual, or .*--hidden"),
        ({"sample": 4}, "alm", "gives 4 draws, .* with --actual"),
        ({"top_k": 4}, "both", "no distributions over the shared vocabulary: expected 'alm'"),
        ({"actual": True}, "shared_kl", "no distributions over the shared vocabulary"),
    ],
)
def test_caches_that_do_not_tell(
    tmp_path: Path, teacher: Any, kept: dict[str, Any], kind: str, said: str
) -> None:
    made = cached(tmp_path, teacher, **kept)
    with pytest.raises(ValueError, match=f"cross_tokenizer='{kind}': the cache .* {said}"):
        loss(tmp_path, made, kind)


def test_servers_that_do_not_tell(tmp_path: Path, teacher: Any) -> None:
    with TeacherServer(model_log_probs(teacher), other()) as server:
        actual = served(tmp_path / "0", server)
        with pytest.raises(ValueError, match=r"'both': the server .*, no distributions over"):
            loss(tmp_path, actual, "both")
        with pytest.raises(ValueError, match=r"'alm': the server .* top 4, .*Service\(top_k=0\)"):
            loss(tmp_path, served(tmp_path / "1", server, top_k=4), "alm")
        with pytest.raises(TeacherError, match="--teacher_tokenizer"):
            ServedTeacher(actual.service, small(), tmp_path / "2")
        with pytest.raises(UserError, match="at temperature 2"):
            served(tmp_path / "3", server, temperature=2.0)
        ours = small()
        data = rows(ours)
        with pytest.raises(TeacherError, match="log-probabilities alone: expected"):
            trainer(tmp_path, llama(len(other())), actual, other(), None, data)


def test_a_cache_of_the_actual_tokens_has_no_distributions(tmp_path: Path, teacher: Any) -> None:
    made = cached(tmp_path, teacher, actual=True)
    ids = told()[0]
    for call in (lambda: made.get(ids, 1.0), lambda: made.teacher(ids), lambda: made.top(0, 1)):
        with pytest.raises(CacheError, match="no distribution: it is for --cross_tokenizer alm"):
            call()
    with pytest.raises(CacheError, match="no distribution"):
        trainer(tmp_path, llama(len(other())), made, other(), None, rows(other()))
    with pytest.raises(CacheError, match="--actual keeps one number a token"):
        cached(tmp_path / "more", teacher, actual=True, top_k=2)
    with pytest.raises(CacheError, match=r"with --actual: .* compared at 1"):
        cached(tmp_path / "more", teacher, actual=True, temperatures=(2.0,))


def test_data_that_are_not_in_the_cache(tmp_path: Path, teacher: Any) -> None:
    few = TeacherCache.build(tmp_path / "few", teacher, other(), told()[:2], actual=True)
    with pytest.raises(CacheError, match="2 of the 4 sequences of the training data are not in"):
        loss(tmp_path, few, "alm")
    ids = rows(small())["input_ids"]
    ours = TeacherCache.build(tmp_path / "ours", llama(len(small())), small(), ids, actual=True)
    with pytest.raises(CacheError, match="the tokenizer has the hash"):
        loss(tmp_path, ours, "alm")


def test_from_the_command_line(
    tmp_path: Path, teacher: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher here, its cache, its server, and a cache from there: the same student."""
    ours, theirs = small(), other()
    ours.pad_token = ours.eos_token
    for name, tokenizer, model in (
        ("student", ours, llama(len(ours))), ("teacher", theirs, teacher),
    ):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("".join(text[:600] for text in texts()[:3]))
    data = ["--data", str(tmp_path / "text.txt"), "--block_size", "64"]
    distill = [
        "distill", *data, "--student", str(tmp_path / "student"), "--cross_tokenizer", "alm",
        "--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true",
        "--logging_steps", "1", "--report", "none", "--seed", "1",
    ]  # fmt: skip
    cache = ["cache", *data, "--student_tokenizer", str(tmp_path / "student"), "--actual"]
    named = ["--teacher_tokenizer", str(tmp_path / "teacher")]

    def trained(name: str, *flags: str) -> Any:
        assert main([*distill, *flags, "--output_dir", str(tmp_path / name)]) == 0
        return torch.cat(
            [p.flatten() for p in type(teacher).from_pretrained(tmp_path / name).parameters()]
        )

    here = ["--teacher", str(tmp_path / "teacher")]
    live = trained("live", *here)
    assert main([*cache, *here, "--output", str(tmp_path / "a")]) == 0
    found = [trained("cached", "--teacher_cache", str(tmp_path / "a"), *named)]
    with TeacherServer(model_log_probs(teacher), theirs) as server:
        there = ["--teacher", server.url]
        found.append(trained("served", *there, *named, "--teacher_ahead", "0"))
        tokenizer = ["--tokenizer", str(tmp_path / "teacher")]
        assert main([*cache, *there, *tokenizer, "--output", str(tmp_path / "b")]) == 0
    one, another = (TeacherCache(tmp_path / name) for name in "ab")
    retelling = Retelling(ours, theirs)
    ids = retelling(ours("".join(text[:600] for text in texts()[:3]))["input_ids"][:64]).ids
    np.testing.assert_allclose(*(x.log_probs_of([ids])[0] for x in (one, another)), atol=1e-4)
    for student in found:
        torch.testing.assert_close(student, live, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    assert main(["cache", "info", str(tmp_path / "a")]) == 0
    assert "the actual token's log-probability" in capsys.readouterr().out
    assert main([*distill, "--teacher_cache", str(tmp_path / "a"), "--output_dir", "x"]) == 2
    assert "--teacher_tokenizer" in capsys.readouterr().err
