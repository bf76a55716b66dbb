"""Vocabulary-parallel losses are those of one process. Real processes over gloo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import processes
import pytest

from fusedkd import divergences

WORLDS = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    out = tmp_path_factory.mktemp("parallel")
    return {
        world: processes.run("workers_parallel.py", "everything", world, out / str(world))
        for world in WORLDS
    }


def check(found: list[dict[str, str | None]], word: str) -> None:
    wanted = {name for name in found[0] if word in name.split()}
    assert wanted
    wrong = [f"rank {r}, {n}: {f[n]}" for r, f in enumerate(found) for n in wanted if f[n]]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.parametrize("world", WORLDS)
def test_divergences(name: str, world: int, results: dict[int, list[Any]]) -> None:
    """Dense logits in fp64 and fp32, heads in chunks, sparse teachers."""
    check([rank["plain"] for rank in results[world]], name)


@pytest.mark.parametrize("world", WORLDS)
def test_everything_else(world: int, results: dict[int, list[Any]]) -> None:
    wrong = {name: x for rank in results[world] for name, x in rank["plain"].items() if x}
    assert not wrong, f"{list(wrong)}\n{next(iter(wrong.values()))}"


@pytest.mark.slow
def test_triton_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(processes, "TIMEOUT", 3600)
    found = processes.run("workers_parallel.py", "interpreted", 3, tmp_path)
    wrong = {name: x for rank in found for name, x in rank.items() if x}
    assert not wrong, f"{list(wrong)}\n{next(iter(wrong.values()))}"


@pytest.mark.parametrize("world", WORLDS)
def test_tokens(world: int, results: dict[int, list[Any]]) -> None:
    wrong = {name: x for rank in results[world] for name, x in rank["tokens"].items() if x}
    assert not wrong, f"{list(wrong)}\n{next(iter(wrong.values()))}"


@pytest.mark.parametrize("world", WORLDS)
def test_dtensors(world: int, results: dict[int, list[Any]]) -> None:
    wrong = {name: x for rank in results[world] for name, x in rank["dtensors"].items() if x}
    assert not wrong, f"{list(wrong)}\n{next(iter(wrong.values()))}"


@pytest.mark.parametrize(
    "case, message",
    [
        ("split", r"ValueError: the ranks hold \[20, 33\].*\[33, 20\].*split alike"),
        ("size", "ValueError: vocab_size=54: expected 1 to 53"),
        ("type", "TypeError: .*is a list.*LMHead"),
        ("label", "ValueError: labels holds [5-9]"),
        ("groups", "ValueError: .*different process groups"),
        ("compiled", "Unsupported: .*_compute_sharded"),
        ("graph break", "same"),
    ],
)
def test_messages(case: str, message: str, results: dict[int, list[Any]]) -> None:
    for rank in results[2]:
        assert re.search(message, rank["messages"][case], re.DOTALL), rank["messages"][case]
