"""The search around the launch table, as far as it goes without a GPU: everything but the times."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import children
import pytest

pytest.importorskip("triton", reason="triton is for Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process compiles nothing", allow_module_level=True)

from fusedkd.benchmarks import tune
from fusedkd.kernels.triton import launches


def test_every_line_is_reached_by_the_call_that_it_is_tuned_for() -> None:
    for entry in launches.TABLE:
        call = tune.call_for(entry)
        assert next(e for e in launches.TABLE if e.fits(*call, processors=132)) == entry


@pytest.mark.parametrize("index", range(len(launches.TABLE)))
def test_a_rewritten_line_is_the_only_one_that_changes(index: int) -> None:
    source = Path(launches.__file__).read_text()
    new = replace(launches.TABLE[index], warps=2, unroll=4, why='measured "here"')
    text = tune.rewritten(source, index, new)
    names: dict[str, object] = {"__name__": "rewritten"}
    sys.modules["rewritten"] = type(sys)("rewritten")  # dataclasses look their module up
    exec(compile(text, "launches.py", "exec"), names)
    expected = [*map(repr, launches.TABLE)]
    expected[index] = repr(new)
    assert [*map(repr, names["TABLE"])] == expected  # type: ignore[call-overload]
    head = source[: source.index("TABLE = (")]
    assert text.startswith(head)


def test_a_file_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no TABLE"):
        tune.rewritten("x = 1\n", 0, launches.TABLE[0])


def test_candidates_that_spill_are_not_timed() -> None:
    last = launches.TABLE[-1]
    call = tune.call_for(last)
    assert tune.flaws(last, call, ["jsd"], "sm_90") == []
    reasons = tune.flaws(replace(last, unroll=2), call, ["jsd"], "sm_90")
    assert any("spilled" in flaw for flaw in reasons), reasons


def test_a_candidate_is_what_runs() -> None:
    """In the interpreter: the timer sees a step whose launch is the candidate's."""
    script = """
from dataclasses import replace
from fusedkd.benchmarks import tune
from fusedkd.kernels.triton import config, launches

def timer(step):
    step()
    launched.append(config.choose(3, 50, 132))
    return 4.0

launched = []
entry = replace(launches.TABLE[0], warps=2)
took = tune.time_of(0, entry, tune.step_of(3, 50), ["forward_kl", "jsd"], timer)
assert abs(took - 4.0) < 1e-9 and [launch.warps for launch in launched] == [2, 2], (took, launched)
assert launches.TABLE[0].warps != 2
"""
    children.python(script, TRITON_INTERPRET="1")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main()
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
