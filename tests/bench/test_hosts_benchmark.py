"""Every host of the benchmark runs before and after its import is replaced, to one loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedkd.benchmarks import hosts

pytestmark = pytest.mark.usefixtures("one_thread")


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """What is printed: of each host the losses before and after."""
    hosts.main(["--tokens", "8", "--vocabulary", "50", *arguments])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    return {cells[1].strip(): [float(x) for x in cells[2].split("→")] for cells in lines}


def test_a_host_in_processes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    (before, after), *_ = run(["--hosts", "torchtune ForwardKLLoss"], capsys).values()
    assert before == pytest.approx(after, rel=1e-4)


def test_every_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[Any, float] = {}

    def in_this_process(
        measure: Callable[..., dict[str, float]], host: str, after: bool, *size: int, **_: float
    ) -> dict[str, float]:
        measured = measure(host, after, *size)
        losses[host, after] = measured["loss"]
        return measured

    monkeypatch.setattr(hosts, "in_child", in_this_process)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # Liger's, for its speed
    printed = run([], capsys)
    assert list(printed) == list(hosts.HOSTS)
    for host, (before, after) in printed.items():
        assert losses[host, True] == pytest.approx(losses[host, False], rel=1e-5)
        assert before == pytest.approx(after, rel=1e-5)
