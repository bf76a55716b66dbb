"""``make gpu`` without a GPU: a dry run in Triton's interpreter, and its safety nets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux")
if "FUSEDKD_TEST_BACKEND" in os.environ:
    pytest.skip("once is enough", allow_module_level=True)

from fusedkd.benchmarks.device import counters, place, plans, publish
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
    assert errors[0] == "the process ended with -6" and errors[1] == "took over 15 s"
    assert errors[2:] == ["RuntimeError: tried out", "RuntimeError: CUDA error: tried out"]
    assert items["label"]["ok"] and report["steps"]["badlabel"]["starts"] == 4
    assert "! crash: the process ended with -6" in text


def test_a_step_over_its_limit_ends_and_the_next_begins(tmp_path: Path) -> None:
    words = ("--only", "counters", "badlabel", "--limit-scale", "0.15", "--fault", "counters=hang")
    _, _, report = visit(tmp_path, *words)
    assert items_of(report, "counters")["hang"]["error"] == "took over 9 s"
    assert report["steps"]["badlabel"]["starts"] == 1


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    code, _, report = visit(tmp_path, "--budget", "1")
    assert code == 1
    assert {step["status"] for step in report["steps"].values()} == {"no time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_nothing_runs_nothing_is_waited_for(tmp_path: Path) -> None:
    """The first step says that there is no GPU, and the others are left out."""
    code, text, report = visit(tmp_path, "--device", "cuda")
    assert code == 1 and "! the step itself: " in text
    statuses = [step["status"] for step in report["steps"].values()]
    assert statuses[0] != "ok" and set(statuses[1:]) == {"nothing runs"}


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
    assert list(items_of(report_of(tmp_path), "badlabel")) == ["raise"]
    *_, report = visit(tmp_path, "--only", "badlabel", "--resume")  # the rest alone
    assert list(items_of(report, "badlabel")) == ["raise", "label"]
    assert report["steps"]["badlabel"]["starts"] == 1


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


def test_every_call_of_a_visit_is_one_and_right_on_the_cpu() -> None:
    """At a fraction of their sizes, by another backend: no call is refused, all are in budget."""
    from fusedkd.benchmarks.device import smoke
    from fusedkd.benchmarks.device.calls import problem_of, step_of
    from fusedkd.benchmarks.device.card import Card

    card = Card("cpu")
    card.backend = None
    small = replace(plans.FULL, smoke=9, even=96, odd=101, small=(1, 2, 7), pieces=(3, 200))
    small = replace(small, width=(16, 8), rows=2, vocab=96, others=(50,), few=(1, 120))
    small = replace(small, heads=((3, 16, 8),), budgets=(None, 1e-6))
    check = smoke.judge()
    for call in plans.judged(small):
        item = check(call, card)
        assert item.get("ok"), (call.label, item)
    of_the_host = [
        call.but(vocab=min(call.vocab, 300)) for call in plans.of_the_host(small).values()
    ]
    for call in [*plans.timed(small), *plans.through_heads(small), *of_the_host, *plans.careful()]:
        loss, *_ = step_of(call, problem_of(call, card))()
        assert loss.isfinite().all(), call.label


def test_a_launch_that_a_call_asks_for_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedkd.benchmarks.device.calls import Call, launched
    from fusedkd.kernels.triton import config

    size = (8192, 151936, 132)
    table_s = config.choose(*size)
    with launched(Call(launch=(("warps", 2),))):
        assert config.choose(*size) == replace(table_s, warps=2) != table_s
    assert config.choose(*size) == table_s


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


def test_trl_s_kernels_need_no_transformers() -> None:
    pytest.importorskip("trl")
    children.python("""
import sys
import torch
sys.modules["transformers"] = None  # as where it is not installed
from fusedkd.benchmarks.device import lone_trl
from fusedkd.benchmarks.device.peers import step_of
from fusedkd.benchmarks.race.case import Case, make_problem
from fusedkd.benchmarks.race.providers import PROVIDERS

head = {"form": "head", "hidden_student": 16, "hidden_teacher": 8, "ce_weight": 0.0}
case = Case(n=6, vocab=300, dtype="fp32", **head)
lone_trl.prepare()
assert "transformers" not in sys.modules
assert PROVIDERS["trl"].reason_missing(case) is None
problem = make_problem(case)
ours, theirs = (step_of(name, case, problem)()[0] for name in ("fusedkd", "trl"))
torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
""")


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


# ----------------------------------------------------------------------------------------------
# from the report into the repository


def made_up(tmp_path: Path) -> dict[str, Any]:
    """A full report with numbers that nobody has measured."""
    from fusedkd.benchmarks.device import peers
    from fusedkd.benchmarks.device.card import Card

    z, card = plans.FULL, Card("cpu")
    lap = {"ms": 2.0, "least": 1.9, "most": 2.2, "s": 1.0}
    shared = {**lap, "gb_s": 4000.0, "share": 91.0, "peak": 1 << 30}
    steps: dict[str, list[dict[str, Any]]] = {name: [{"name": "x", "ok": True}] for name in STEPS}
    steps["facts"] = [{"name": "machine", "versions": {"torch": "2.11"}, "date": "2026-01-01T00"}]
    steps["smoke"] = [{"name": c.label, "ok": True, "score": 0.5} for c in plans.judged(z)]
    steps["shares"] = [{"name": "copy before", "gb_s": 4200.0}]
    steps["shares"] += [{"name": call.label, **shared} for call in plans.timed(z)]
    steps["shares"][1]["modelled"] = 82.0
    heads = {**lap, "ratio": 1.25, "bytes": 1 << 30}
    steps["heads"] = [{"name": call.label, **heads} for call in plans.through_heads(z)]
    steps["host"] = [{"name": "call dense", "us": 88.0}]
    races = [(f"{name}: {case.label}", name, case.label) for name, case in peers.races(card, z)]
    steps["peers"] = [
        {
            "name": name,
            "peer": peer,
            "case": case,
            "bytes": 1,
            **lap,
            "ms": 2.0 if peer == "fusedkd" else 7.0,
        }
        for name, peer, case in races
    ]
    steps["ceilings"] = [{"name": f"copy {gb} GB", "gb_s": 4200.0} for gb in z.copies]
    report = {
        "key": {"gpu": "Made-up H200", "device": "cuda", "source": "0"},
        "seconds": 333.0,
        "steps": {
            name: {"status": "ok", "seconds": 9.0, "starts": 1, "items": items}
            for name, items in steps.items()
        },
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    return report


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder in ("benchmarks/results", "docs"):
        (root / folder).mkdir(parents=True)
    (root / "docs/performance.md").write_text((ROOT / "docs/performance.md").read_text())
    return root


def test_a_full_report_fits_the_table(tmp_path: Path) -> None:
    lines = table(made_up(tmp_path))
    assert len(lines) <= MOST and all(any(x.startswith(name) for x in lines) for name in STEPS)


def test_one_command_publishes_a_report(tmp_path: Path, checkout: Path) -> None:
    report = made_up(tmp_path)
    before = (checkout / "docs/performance.md").read_text()
    written = publish.publish(tmp_path, checkout)
    assert [path.name for path in written] == [
        "made-up-h200.json",
        "speed-gpu.png",
        "performance.md",
    ]
    kept = json.loads((checkout / "benchmarks/results/made-up-h200.json").read_text())
    assert kept["steps"] == report["steps"] and kept["commit"] == "of another source"
    assert (checkout / "docs/speed-gpu.png").read_bytes().startswith(b"\x89PNG")
    text = (checkout / "docs/performance.md").read_text()
    assert "Counted, not measured" not in text and "one Made-up H200" in text
    for row in (
        "| `alpha` | 2.00 | 91 % | 82 % | 91 % | - |",
        "| `jsd` | 2.00 | 91 % | - | 91 % | - |",
        "| JSD, of the copy bandwidth | ≥ 65 % | 91 % | met |",
        "| 50,257 entries, of the speed at 50,304 | ≥ 80 % | 100 % | met |",
        "| head, JSD, times its bare products | ≤ 1.15 | 1.25 | **missed** |",
        "| a call of 8 × 1,000 on the host | ≤ 100 µs | 88 µs | met |",
        "| TRL's ChunkedDivergence, forward KL, times ours | ≥ 1.5 | 3.5 | met |",
        "| Liger's fused linear JSD, times ours | ≥ 2 | 3.5 | met |",
    ):
        assert row in text, row
    head, tail = before.split("<!-- gpu: written")[0], before.split("<!-- /gpu -->")[1]
    assert text.startswith(head) and text.endswith(tail)
    assert (
        publish.publish(tmp_path, checkout)
        and (checkout / "docs/performance.md").read_text() == text
    )


def test_a_dry_run_is_not_published(dry: Any, checkout: Path) -> None:
    with pytest.raises(ValueError, match="a dry run"):
        publish.publish(dry[0] / "out", checkout)
    assert not list((checkout / "benchmarks/results").iterdir())


def test_what_was_not_measured_is_a_missed_bar(tmp_path: Path) -> None:
    report = made_up(tmp_path)
    report["steps"] = {"shares": report["steps"]["shares"]}
    missing = [bar for bar in publish.bars(report) if bar.value is None]
    assert len(missing) == 5 and all("**missed**" in bar.row for bar in missing)
