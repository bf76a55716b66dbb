"""``make gpu`` without a GPU: a dry run in Triton's interpreter, and its safety nets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is for Linux")
if "FUSEDKD_TEST_BACKEND" in os.environ:
    pytest.skip("once is enough", allow_module_level=True)

from fusedkd.benchmarks.device import counters, place, plans
from fusedkd.benchmarks.device.__main__ import arguments
from fusedkd.benchmarks.device.steps import STEPS
from fusedkd.benchmarks.device.table import MOST, table

ROOT = Path(__file__).parents[2]
# As from a bare checkout: neither an installed package nor the tests' paths are seen.
BARE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PWD")}


def command(folder: Path, *words: str) -> list[str]:
    module = [sys.executable, "-m", "benchmarks.device", "--device", "cpu"]
    return [*module, "--out", str(folder / "out"), "--state", str(folder / "state"), *words]


def visit(folder: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what is printed, the report."""
    done = subprocess.run(
        command(folder, *words), cwd=ROOT, env=BARE, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout, report_of(folder)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out/report.json").read_text())


def items_of(report: dict[str, Any], step: str) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in report["steps"][step]["items"]}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("dry")
    return folder, visit(folder, "--budget", "900", "--limit-scale", "5")


def test_a_dry_run_goes_through_every_step(dry: Any) -> None:
    folder, (code, text, report) = dry
    log = (folder / "out/log.txt").read_text()[-4000:]
    assert code == 0, text + log
    assert list(report["steps"]) == list(STEPS)
    for name, step in report["steps"].items():
        assert step["status"] == "ok" and step["items"] and step["starts"] == 1, name
        assert any("skipped" not in item for item in step["items"]), name
    judged = items_of(report, "smoke").values()
    assert len(judged) >= 15 and all(item["ok"] for item in judged)
    assert any(0.1 < item.get("score", 0) <= 1 for item in judged)  # budgets are not miles away
    assert all(item["ms"] > 0 for item in items_of(report, "shares").values() if "share" in item)
    assert text.splitlines()[-1] == (folder / "out/table.txt").read_text().splitlines()[-1]


def test_the_table_is_short_and_names_every_step(dry: Any) -> None:
    *_, report = dry[1]
    lines = table(report)
    assert len(lines) <= MOST and all(any(x.startswith(name) for x in lines) for name in STEPS)
    assert not any("cannot be shown" in line for line in lines)


def test_what_is_done_is_not_done_again(dry: Any) -> None:
    folder, (*_, before) = dry
    code, text, after = visit(folder, "--resume")
    assert code == 0 and "resumed" in text
    assert after["steps"] == before["steps"]


def test_another_source_is_measured_again(dry: Any, tmp_path: Path) -> None:
    *_, report = dry[1]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report | {"key": report["key"] | {"source": "0"}}))
    _, text, after = visit(tmp_path, "--resume", str(other), "--only", "badlabel", "--budget", "1")
    assert "is of another source or GPU: not resumed" in text
    assert list(after["steps"]) == ["badlabel"]


def test_each_disaster_costs_one_item(tmp_path: Path) -> None:
    """A crash, a hang, an exception and a lost context, then the step's own item."""
    kinds = ("crash", "hang", "raise", "lost")
    faults = [f"badlabel={kind}" for kind in kinds]
    words = ("--only", "badlabel", "--limit-scale", "0.25", "--fault", *faults)
    code, text, report = visit(tmp_path, *words)
    items = items_of(report, "badlabel")
    assert code == 1 and list(items) == [*kinds, "label"]
    errors = [items[kind]["error"] for kind in kinds]
    assert errors[0] == "the process ended with -6" and errors[1] == "took over 10 s"
    assert errors[2:] == ["RuntimeError: tried out", "RuntimeError: CUDA error: tried out"]
    assert items["label"]["ok"] and report["steps"]["badlabel"]["starts"] == 4
    assert "! crash: the process ended with -6" in text


def test_a_step_over_its_limit_ends_and_the_next_begins(tmp_path: Path) -> None:
    words = ("--only", "counters", "badlabel", "--limit-scale", "0.15", "--fault", "counters=hang")
    _, _, report = visit(tmp_path, *words)
    assert items_of(report, "counters")["hang"]["error"] == "took over 9 s"
    assert report["steps"]["badlabel"]["status"] == "ok"


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    code, _, report = visit(tmp_path, "--budget", "1")
    assert code == 1
    assert {step["status"] for step in report["steps"].values()} == {"no time"}


def test_what_there_is_is_kept_when_somebody_ends_it(tmp_path: Path) -> None:
    words = command(tmp_path, "--only", "badlabel", "--fault", "badlabel=raise", "badlabel=hang")
    process = subprocess.Popen(words, cwd=ROOT, env=BARE, stdout=subprocess.PIPE, text=True)
    while (
        "tried out" not in (tmp_path / "out/report.json").read_text()
        if (tmp_path / "out/report.json").exists()
        else True
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and "badlabel [stopped by signal 15]" in text
    assert "raise" in items_of(report_of(tmp_path), "badlabel")


# ----------------------------------------------------------------------------------------------
# what a dry run cannot show


def test_a_visit_covers_every_divergence_form_and_dtype() -> None:
    from fusedkd import divergences

    calls = plans.judged(plans.FULL)
    assert len({call.label for call in calls}) == len(calls)  # an item of one name is done once
    for name in divergences.names():
        mine = [call for call in calls if call.divergence == name]
        assert {call.dtype for call in mine} == {"bf16", "fp16", "fp32", "fp64"}
        assert {"dense", "head", "bucket"} <= {call.form for call in mine}
        assert any(call.rows < 8 for call in mine) and any(call.vocab % 16 for call in mine)
    timed = plans.timed(plans.FULL)
    assert {call.divergence for call in timed} == set(divergences.names())
    assert len({call.label for call in timed}) == len(timed)


def test_a_wheel_beside_the_checkout_is_a_peer(tmp_path: Path) -> None:
    import zipfile

    root, state = tmp_path / "checkout", tmp_path / "state"
    (root / "fusedkd").mkdir(parents=True)
    (root / ".whl").mkdir()
    with zipfile.ZipFile(root / ".whl/peer-1.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "ANSWER = 42")
    environment = {**os.environ, **place.environment(root, state, "cuda")}
    code = "import peer; print(peer.ANSWER)"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert out.stdout == "42\n"


NCU = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","row_kernel","dram__bytes_read.sum","Gbyte","1,234.5"
"0","row_kernel","lts__t_sector_hit_rate.pct","%","66.1"
"1","other","dram__bytes_read.sum","byte","7"
"""


def test_what_ncu_says() -> None:
    kernels = counters.kernels_of(NCU)
    assert kernels["0"]["dram__bytes_read.sum"] == 1234.5 and kernels["1"]["kernel"] == "other"
    assert counters.kernels_of("==ERROR== no permission\n") == {}


def test_steps_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(["--only", "smoke", "facts", "--skip", "facts"])
    assert args.steps == ["smoke"]
    with pytest.raises(SystemExit):
        arguments(["--only", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
