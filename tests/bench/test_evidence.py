"""`make evidence`, as small as it goes: that it runs, resumes and reports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fusedkd.benchmarks.cache import __main__ as cache
from fusedkd.benchmarks.cache import trained
from fusedkd.benchmarks.evidence.plan import SMOKE, STUDENTS, make_text
from fusedkd.benchmarks.evidence.report import write_report
from fusedkd.benchmarks.evidence.run import Evidence
from fusedkd.demo.run import SMOKE as DEMO


@pytest.mark.slow
def test_evidence_runs_goes_on_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusedkd.benchmarks.evidence", "--smoke", "--minutes", "0.5"]
    for _ in range(2):
        subprocess.run([*command, "--output", str(tmp_path)], check=True, timeout=600)
        path = tmp_path / "results.json"
        results = json.loads(path.read_text())
        assert {"teacher/causal", "teacher/masked", "TinyBERT-style/limited/kd/0"} <= results.keys()
        del results["GPT-style/limited/plain/0"]
        path.write_text(json.dumps(results))
    report = (tmp_path / "report.md").read_text()
    assert report.count("| ALBERT-style |") == 2 and "equal time" in report
    for way in ("top 32 of a cache | live", "it writes | on the text", "ALM and CE | CE alone"):
        assert way in report
    assert (tmp_path / "evidence.png").stat().st_size


def test_the_cache_benchmark_trains_and_compares(tmp_path: Path, monkeypatch, capsys) -> None:
    """Its largest part, on the demo's smallest models: damage, speeds, gradients, students."""
    monkeypatch.setattr(trained, "Setting", lambda: replace(DEMO, transfer_tokens=4_500))
    measured = trained.OnDemo(Console(width=120), tmp_path, steps=6)
    measured.damage(5)
    measured.speeds()
    measured.gradients()
    measured.students(4, 2.0, cache.ENTRIES | cache.HIDDEN_STATES)
    shown = capsys.readouterr().out
    assert "noticed by verify: 5 of 5" in shown
    assert "cached, 100 draws" in shown and "cached, hidden, int8" in shown
    assert "Gradient of forward KL against the full teacher" in shown


def test_a_teacher_that_learnt_nothing_has_no_students(tmp_path: Path) -> None:
    """Here nobody learns enough, and the report says so."""
    size = replace(SMOKE, learnt=0.0)
    evidence = Evidence(size, make_text(size), tmp_path, seconds=1.0)
    evidence.run()
    write_report(tmp_path, evidence.results, size.__dict__)
    assert not any(key.startswith(name) for key in evidence.results for name in STUDENTS)
    assert 3 < evidence.results["facts"]["unigram"]["causal"] < math.log(400)
    report = (tmp_path / "report.md").read_text()
    assert report.count("nothing to teach") == 2 and "DistilBERT-style" in report
