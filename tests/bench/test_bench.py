"""The benchmark as a product: what it writes, and that it cannot be fooled."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import children
import pytest
import torch

from fusedkd import divergences
from fusedkd.benchmarks.child import ChildFailed, in_child
from fusedkd.benchmarks.race import formulas, runner, suites
from fusedkd.benchmarks.race.__main__ import main
from fusedkd.benchmarks.race.case import Case, Problem, make_problem
from fusedkd.benchmarks.race.check import Truth
from fusedkd.benchmarks.race.memory import peak_extra
from fusedkd.benchmarks.race.options import AXES
from fusedkd.benchmarks.race.provider import OURS, Forward, Provider
from fusedkd.benchmarks.race.providers import PROVIDERS
from fusedkd.benchmarks.race.results import BarResult, GroupResult
from fusedkd.benchmarks.race.timing import spread

SMALL = ["--n", "4", "8", "16", "--vocab", "300", "--repeats", "3", "--budget", "1"]


def bench(*arguments: str) -> int:
    return main(list(arguments))


def wrong(provider: Provider, factor: float) -> Provider:
    """The same provider, its loss (and so its gradient) off by a factor."""

    def prepare(case: Case, problem: Problem) -> Forward:
        forward = provider.prepare(case, problem)
        return lambda: factor * forward()

    return dataclasses.replace(provider, prepare=prepare)


@pytest.fixture
def made_wrong(monkeypatch: pytest.MonkeyPatch):
    def make(name: str, factor: float) -> None:
        monkeypatch.setitem(PROVIDERS, name, wrong(PROVIDERS[name], factor))

    return make


def test_a_run_writes_table_json_csv_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = ["fusedkd", "eager", "gkd", "liger", "floor"]
    assert bench(*SMALL, "--providers", *names, "--output", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "fusedkd" in shown and "of floor" in shown
    assert "liger: works from hidden states and heads" in shown  # skipped, with its reason
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"cpu", "cores", "memory_gib", "instruction_set", "versions", "commit", "date"} <= set(
        report["machine"]
    )
    assert report["command"].startswith("fusedkd bench --n 4 8 16")
    rows = report["groups"][0]["rows"]
    fused = [row for row in rows if row["provider"] == "fusedkd"]
    assert len(fused) == 3 and all(row["verdict"] == "ok" for row in fused)
    for row in fused:
        assert 0 < row["p10_ms"] <= row["total_ms"] <= row["p90_ms"]
        assert row["floor_ms"] > 0 and row["samples"] >= 3
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_replot_needs_only_the_json(tmp_path: Path):
    arguments = ["--n", "4", "--vocab", "100", "200", "300", "--providers", "fusedkd", "floor"]
    assert bench(*arguments, "--repeats", "3", "--output", str(tmp_path)) == 0
    plot = tmp_path / "time_vs_vocab.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    plot.unlink()
    assert bench("--replot", str(tmp_path / "results.json")) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))  # no temporary is left


def test_a_wrong_peer_is_flagged_with_its_error(tmp_path: Path, made_wrong, capsys):
    made_wrong("eager", 1.5)
    arguments = [*SMALL, "--providers", "fusedkd", "eager", "--output", str(tmp_path)]
    assert bench(*arguments) == 0
    assert "eager is WRONG: relative error 5.0e-01" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["groups"][0]["rows"]
    assert {row["verdict"] for row in rows if row["provider"] == "eager"} == {"WRONG"}


@pytest.mark.parametrize("factor", [1.5, 1.02, float("nan")])
def test_it_refuses_when_fusedkd_is_wrong(tmp_path: Path, made_wrong, capsys, factor: float):
    made_wrong(OURS, factor)
    assert bench(*SMALL, "--providers", OURS, "--output", str(tmp_path)) == 1
    assert "Nothing was timed" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("form", ["dense", "head"])
@pytest.mark.parametrize("name", divergences.names())
def test_every_divergence_passes_the_check(form: str, name: str):
    case = Case(form=form, divergence=name, n=6, vocab=257, hidden_student=16, hidden_teacher=24)
    truth = Truth(case, make_problem(case))
    assert truth.check(PROVIDERS[OURS]).word == "ok"
    assert truth.check(PROVIDERS["eager"]).word in ("ok", "imprecise")  # bf16 logits from heads


def test_a_divergence_that_the_bench_has_no_formula_for(tmp_path: Path, monkeypatch, capsys):
    """One that is new in the three sister files, and nowhere else."""
    monkeypatch.delitem(formulas.POINTWISE, "skew_forward_kl")
    arguments = ["--divergence", "forward_kl", "skew_forward_kl(lam=0.3)"]
    providers = ["--providers", "fusedkd", "eager", "gkd", "floor"]
    assert bench(*SMALL, *arguments, *providers, "--output", str(tmp_path)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "skew_forward_kl(lam=0.3): no formula in benchmarks/race/formulas.py" in shown
    for group in json.loads((tmp_path / "results.json").read_text())["groups"]:
        for row in group["rows"]:
            new = "skew" in row["case"]["divergence"]
            assert (row["note"] is not None) == new
            if row["provider"] in ("fusedkd", "eager"):
                assert row["verdict"] == "ok" and row["total_ms"] > 0


def test_a_divergence_without_its_sisters(monkeypatch, capsys):
    def hellinger() -> divergences.Divergence:
        value = lambda lp, lq: 0.5 * ((lp / 2).exp() - (lq / 2).exp()).square()  # noqa: E731
        return divergences._builtin("hellinger", value=value)

    monkeypatch.setitem(divergences._FACTORIES, "hellinger", hellinger)
    assert bench(*SMALL, "--divergence", "hellinger") == 2
    assert "kernels/cpu/pointwise.h" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torchtune", "gkd"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixed_kl(0.3)", "jsd(0.3)"])
@pytest.mark.parametrize("counted", [1.0, 0.5])
def test_peers_formulas_agree_at_fp32(name: str, divergence: str, counted: float):
    case = Case(divergence=divergence, n=6, vocab=257, dtype="fp32", counted=counted)
    provider = PROVIDERS[name]
    if provider.reason_missing(case) is None:
        assert Truth(case, make_problem(case)).check(provider).word == "ok"


@pytest.mark.parametrize("name", ["eager", "liger", "trl"])
def test_peers_with_heads_take_the_rows_that_count(name: str):
    sizes = {"vocab": 257, "hidden_student": 16, "hidden_teacher": 24, "dtype": "fp32"}
    case = Case(form="head", n=12, temperature=1.0, ce_weight=0.0, counted=0.4, **sizes)
    provider = PROVIDERS[name]
    if provider.reason_missing(case) is None:
        assert case.n_counted == 5
        assert Truth(case, make_problem(case)).check(provider).word == "ok"


@pytest.mark.parametrize(("n", "share"), [(1, 0.1), (7, 0.5), (512, 0.1), (512, 0.25), (30, 1.0)])
def test_the_share_that_counts_is_that_of_the_labels(n: int, share: float):
    case = Case(n=n, vocab=11, counted=share)
    assert (make_problem(case).labels != -100).sum() == case.n_counted
    assert abs(case.n_counted - share * n) < 1


def test_shares_of_one_group_do_not_share_their_labels():
    """The first one's were those of all: whole calls were timed on a tenth of their rows."""
    cases = [Case(n=20, vocab=11, counted=share) for share in (0.1, 1.0, 0.5)]
    problems = runner._Problems(cases)
    for case in cases:
        assert (problems.of(case).labels != -100).sum() == case.n_counted


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "eval"},
        {"frozen": True},
        {"frozen": True, "reduction": "none", "counted": 0.4},
        {"dtype": "fp16"},
    ],
)
def test_other_modes_pass_the_check(changes: dict[str, object]):
    case = Case(form="head", n=6, vocab=257, hidden_student=16, hidden_teacher=24, **changes)
    assert Truth(case, make_problem(case)).check(PROVIDERS[OURS]).word == "ok"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_peak_memory_of_a_known_step():
    case = Case(n=256, vocab=40000)
    one = case.n * case.vocab * 2  # the gradient
    peak, reason = peak_extra(case, OURS)
    # the kernel counts resident pages per thread, and adds up what is left over late
    assert reason is None and one - (1 << 20) <= peak <= one + (16 << 20)


def test_a_fresh_process_answers_or_says_why_not():
    assert in_child(math.sqrt, 4, timeout=60) == 2
    with pytest.raises(ChildFailed, match="ended with 1: ValueError"):
        in_child(math.sqrt, -1, timeout=60)
    with pytest.raises(ChildFailed, match=r"more than 0\.1 s"):
        in_child(time.sleep, 60, timeout=0.1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--n", "0"], ["--n 0", "expected 1 to"]),
        (["--temperature", "-1"], ["--temperature -1", "expected 1e-06 to"]),
        (["--divergence", "jsdd"], ["--divergence", "jsdd", "jsd"]),
        (["--divergence", "jsd(beta=2)"], ["--divergence", "beta", "(0, 1)"]),
        (["--divergence", "jsd(gamma=0.2)"], ["--divergence", "'gamma'", "of jsd are: beta"]),
        (["--counted", "0"], ["--counted 0", "to 1 "]),
        (["--vocabb", "3"], ["--vocabb", "did you mean '--vocab'?"]),
        (["--providers", "ligre"], ["--providers", "ligre", "liger"]),
        (["--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["--replot", "/nowhere.json"], ["--replot", "/nowhere.json", "results.json"]),
        (["--kd-weight", "0", "--ce-weight", "0"], ["--kd-weight 0", "above 0"]),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: list[str], expected: list[str], capsys):
    assert bench(*arguments) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert "Traceback" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_error_with_a_remedy(capsys):
    assert bench("--device", "cuda", "--n", "4") == 2
    assert "--device cpu" in capsys.readouterr().err


def test_help_teaches_and_loads_no_torch():
    code = (
        "import sys; from fusedkd.benchmarks.race.options import parse\n"
        "try: parse(['--help'])\nexcept SystemExit: pass\n"
        "assert 'rich' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    said = children.python(code)
    assert "examples:" in said and "--quick" in said


def test_every_axis_is_a_field():
    assert set(AXES) <= {field.name for field in dataclasses.fields(Case)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_are_well_formed(device: str):
    for group in [*suites.quick(device), *suites.headline(device)]:
        assert set(group.providers) <= set(PROVIDERS) and group.cases
        rows = GroupResult("")
        assert all(bar.value(rows) is None for bar in group.bars)  # nothing measured: no verdict


def test_small_parts():
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert BarResult("", 1.5, 1.6, at_most=True).passed
    assert BarResult("", 1.5, 1.6, at_most=False).passed is False
    assert BarResult("", None, 1.6, at_most=True).passed is None
