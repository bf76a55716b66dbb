"""`make evidence`, as small as it goes: that it runs, resumes and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


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
    assert (tmp_path / "evidence.png").stat().st_size
