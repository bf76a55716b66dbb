"""The evidence across two tokenizers, as small as it goes: that it runs, goes on and shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusedkd.benchmarks import across


@pytest.mark.slow
def test_runs_goes_on_and_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "across.json"
    flags = ["--smoke", "--seeds", "1", "--teacher-steps", "2", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["across", *flags, "--output", str(path)])
    across.main()
    results = json.loads(path.read_text())
    assert len(results) == 2 and all(len(found) == 12 for found in results.values())
    assert all(0 < x["bits"] < 12 for found in results.values() for x in found.values())
    del results["320 to 280"]["uld/0"]
    path.write_text(json.dumps(results))
    across.main()
    again = json.loads(path.read_text())
    assert again["280 to 320"] == results["280 to 320"] and "uld/0" in again["320 to 280"]
    assert capsys.readouterr().out.count("own tokenizer") == 4
    other = {**again["280 to 320"]["plain/0"], "teacher_steps": 3, "bits": 11.0}  # another run's
    again["280 to 320"]["plain/0"] = other
    path.write_text(json.dumps(again))
    across.main()
    assert json.loads(path.read_text())["280 to 320"]["plain/0"]["bits"] != 11.0
