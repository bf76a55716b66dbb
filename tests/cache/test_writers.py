"""Several processes write one cache: whatever they do in whichever order, it is the same cache."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusedkd import LMHead
from fusedkd.cache import CacheError, Job, Layout, Policy, TeacherCache, build, verify
from fusedkd.cache.build import answer_shard, begun
from fusedkd.cache.hidden import HiddenLayout
from fusedkd.cache.manifest import Manifest, shard_name
from fusedkd.cache.writer import ALONE, Share, held
from fusedkd.cli import main

V, H, LENGTH, SHARDS = 40, 8, 6, 5
FACTS = {"teacher": "t", "teacher_hash": None, "tokenizer_hash": "00" * 32,
         "padded_vocab_size": V, "dtype": "float32"}  # fmt: skip
HEAD = LMHead(torch.zeros(0, H), torch.randn(V, H, generator=torch.Generator().manual_seed(0)))
KINDS = {
    "top": Layout(Policy("top", 4), V, (1.0, 2.0)),
    "sample": Layout(Policy("sample", 4), V),
    "bf16": HiddenLayout(Policy("bf16", H), V, (1.0,)),
    "int8": HiddenLayout(Policy("int8", H), V, (1.0,)),
}


def made(kind: str = "top", **facts: Any) -> Job:
    layout = KINDS[kind]
    rows = np.random.default_rng(0).integers(0, V, (2 * SHARDS, LENGTH))
    size = int(2 * LENGTH * layout.most_bytes_per_token) + 1
    head = HEAD if layout.policy.hidden else None
    return Job(list(rows), layout, {**FACTS, **facts}, 2, size, head)


def write(folder: Path, job: Job, share: Share = ALONE, seen: list[Any] | None = None) -> bool:
    def answer(ids: torch.Tensor) -> Any:
        if seen is not None:
            seen.append(ids[0, 0].item())
        side = replace(HEAD, hidden=HEAD.weight[ids])
        return side if job.head is not None else side.hidden @ HEAD.weight.T

    return build(folder, job, answer, share=share)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    assert write(tmp_path / "whole", made())
    return content(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1), (2, 0, 1), (6, 5, 4, 3, 2, 1, 0)])
def test_shares_make_the_whole(tmp_path: Path, kind: str, order: tuple[int, ...]) -> None:
    """And each is written once; of seven processes two have nothing to write."""
    seen: list[Any] = []
    assert write(tmp_path / "whole", made(kind), seen=seen)
    parts: list[Any] = []
    done = [write(tmp_path / "c", made(kind), Share(n, len(order)), parts) for n in order]
    assert done == [False] * (len(order) - 1) + [True]
    assert sorted(parts) == sorted(seen)
    assert content(tmp_path / "c") == content(tmp_path / "whole")
    assert write(tmp_path / "c", made(kind), Share(1, 3), parts) and len(parts) == len(seen)


def test_another_number_of_processes_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    seen: list[Any] = []
    write(tmp_path / "c", made(), Share(1, 4), seen)
    write(tmp_path / "c", made(), Share(0, 3), seen)
    assert write(tmp_path / "c", made(), seen=seen)
    assert len(seen) == SHARDS
    assert content(tmp_path / "c") == whole


def test_what_is_not_complete_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "c", made(), Share(0, 2))
    with pytest.raises(CacheError, match=r"only 3 of 5 shards are there.*again"):
        TeacherCache(tmp_path / "c")
    assert "3 of 5 shards are there" in verify(tmp_path / "c")[1][0]
    assert main(["cache", "info", str(tmp_path / "c")]) == 0
    assert "3 of 5: incomplete" in capsys.readouterr().out
    (tmp_path / "c" / "shard-00002.arrow").write_bytes(b"damage")
    assert "shard-00002" in verify(tmp_path / "c")[1][0]


def test_processes_of_another_teacher_do_not_complete_it(tmp_path: Path) -> None:
    """One has begun in the moment between another's look at the folder and its own beginning."""
    for n in (0, 1):
        write(tmp_path / f"{n}", made(teacher_hash=f"{n}" * 64), Share(n, 2))
    for path in (tmp_path / "0").glob("shard*"):
        shutil.copy(path, tmp_path / "1")
    assert not write(tmp_path / "1", made(teacher_hash="1" * 64), Share(1, 2))
    manifest = Manifest.load(tmp_path / "0")
    with pytest.raises(CacheError, match="another teacher_hash"):
        write(tmp_path / "1", made(teacher_hash="0" * 64), Share(0, 2))
    from fusedkd.cache.sums import merge

    with pytest.raises(CacheError, match="another process has begun"):
        merge(tmp_path / "1", manifest)
    assert write(tmp_path / "1", made(teacher_hash="1" * 64))
    assert verify(tmp_path / "1")[1] == []


@pytest.mark.parametrize(
    "how", ["nothing", "text", "list", "keys", "huge", "deep", "link", "other"]
)
def test_sums_that_are_none(tmp_path: Path, whole: dict[str, bytes], how: str) -> None:
    write(tmp_path / "c", made(), Share(0, 2))
    path = tmp_path / "c" / "shard-00002.json"
    there = json.loads(path.read_text())
    other = (tmp_path / "c" / "shard-00004.json").read_text()
    text = {"nothing": "", "text": '"x"', "list": "[]", "keys": "{}", "huge": " " * 2000,
            "deep": "[" * 900, "link": other, "other": other}[how]  # fmt: skip
    path.unlink()
    if how == "link":
        os.symlink("shard-00004.json", path)
    else:
        path.write_text(text)
    seen: list[Any] = []
    assert write(tmp_path / "c", made(), seen=seen)
    assert len(seen) == 3 and there["name"] == "shard-00002.arrow"
    assert content(tmp_path / "c") == whole


def test_a_kill_between_the_manifest_and_the_sums(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Before it, and after; and one of the sums is gone."""
    for n in (0, 1):
        write(tmp_path / "c", made(), Share(n, 2))
    parts = tmp_path / "parts"
    write(parts, made(), Share(0, 2))
    sums = {path.name: path.read_bytes() for path in parts.glob("*.json")}
    for name in sorted(sums.keys() - {"manifest.json"})[1:]:
        (tmp_path / "c" / name).write_bytes(sums[name])
    assert TeacherCache(tmp_path / "c").manifest.complete
    seen: list[Any] = []
    assert write(tmp_path / "c", made(), Share(1, 2), seen) and not seen
    assert content(tmp_path / "c") == whole


def test_a_manifest_that_has_some_of_the_shards(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write(tmp_path / "c", made())
    manifest = Manifest.load(tmp_path / "c")
    replace(manifest, shards=manifest.shards[:2]).save(tmp_path / "c")
    for number in (2, 3, 4):
        (tmp_path / "c" / shard_name(number)).unlink()
    with pytest.raises(CacheError, match="only 2 of 5"):
        TeacherCache(tmp_path / "c")
    seen: list[Any] = []
    assert not write(tmp_path / "c", made(), Share(0, 2), seen) and len(seen) == 2
    assert write(tmp_path / "c", made(), Share(1, 2), seen) and len(seen) == 3
    assert content(tmp_path / "c") == whole


def test_damage_is_repaired_by_whom_it_belongs_to(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """On another machine, where the bytes are others."""
    write(tmp_path / "c", made())
    (tmp_path / "c" / "shard-00001.arrow").write_bytes(b"damage")
    seen: list[Any] = []
    assert write(tmp_path / "c", made(), Share(0, 2), seen) and not seen
    assert len(verify(tmp_path / "c")[1]) == 1
    build(tmp_path / "c", made(), lambda ids: HEAD.weight[ids] @ HEAD.weight.T + ids[..., None],
          share=Share(1, 2))  # fmt: skip
    assert verify(tmp_path / "c")[1] == []
    assert content(tmp_path / "c").keys() == whole.keys()


def test_who_leaves_last_removes_what_killed_ones_left(tmp_path: Path) -> None:
    names = ["index.arrow.01234567.tmp", "shard-00001.json.89abcdef.tmp"]
    with held(tmp_path, Share(0, 2)):
        for name in names:
            (tmp_path / name).touch()
        with held(tmp_path, Share(1, 2)):
            pass
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert not write(tmp_path / "c", made(), Share(0, 2))
    assert write(tmp_path / "c", made(), Share(1, 2))
    assert verify(tmp_path / "c")[1] == []


def test_space_for_all_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = int(4.5 * 2 * LENGTH * KINDS["top"].most_bytes_per_token)  # of four shards and a half
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free))
    with pytest.raises(CacheError, match="still to be written"):
        write(tmp_path / "c", made(), Share(1, 2))
    monkeypatch.undo()
    write(tmp_path / "c", made(), Share(0, 2))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free))
    assert write(tmp_path / "c", made(), Share(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_that_an_engine_hands_out(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "whole", made(kind))

    def answer(ids: torch.Tensor) -> Any:
        side = replace(HEAD, hidden=HEAD.weight[ids])
        return side if KINDS[kind].policy.hidden else side.hidden @ HEAD.weight.T

    refused = pytest.raises(CacheError, match="not all shards")
    with refused, begun(tmp_path / "c", made(kind)) as missing:
        for number, ids in [*missing][2:]:
            answer_shard(tmp_path / "c", number, ids, answer, 2)
    with begun(tmp_path / "c", made(kind)) as missing:
        for number, ids in reversed([*missing]):
            assert number in (0, 1)
            answer_shard(tmp_path / "c", number, ids, answer, 2)
    assert content(tmp_path / "c") == content(tmp_path / "whole")
