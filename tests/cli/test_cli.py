"""The command line as people call it."""

import json

import children
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedkd.cli import main
from fusedkd.data.text import pack


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--smoke", "--output", str(folder)]) == 0
    return folder


def test_demo_leaves_what_it_promises(demo):
    report = json.loads((demo / "report.json").read_text())
    for name in ("teacher", "plain", "kd"):
        assert {"eval_loss", "bits_per_byte", "parameters", "train_seconds"} <= report[name].keys()
    assert {"gap_closed", "agreement", "seed", "versions"} <= report.keys()
    assert report["plain"]["steps"] == report["kd"]["steps"]
    assert (demo / "report.md").stat().st_size and (demo / "curves.png").stat().st_size
    AutoModelForCausalLM.from_pretrained(demo / "student")
    card = json.loads((demo / "student" / "distillation.json").read_text())  # as distill's
    assert card["eval_loss"] == report["kd"]["eval_loss"] and "gap_closed" in card
    AutoTokenizer.from_pretrained(demo / "student")


def test_distill_from_a_recipe(demo, tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 200)
    (tmp_path / "b.txt").write_text("class A:\n    pass\n" * 200)
    student, out = str(demo / "student"), tmp_path / "out"
    (tmp_path / "run.yaml").write_text(
        "temperature: 3.0\ndivergence: jsd(beta=0.3)\nmax_steps: 50\n"
    )
    code = main(
        [
            *("distill", "--config", str(tmp_path / "run.yaml"), "--teacher", student),
            *("--student", student, "--data", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")),
            *("--max_steps", "2", "--block_size", "32", "--output_dir", str(out)),
            *("--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", "2"),
        ]
    )
    assert code == 0
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # flags win over the file
    assert "kd" in state["log_history"][0] or state["max_steps"] == 2
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "x.txt", "--student", "./s"], "--teacher is missing"),
        (["--teacher", "./nowhere", "--student", "./s", "--data", "x.txt"], "./nowhere"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--temprature", "2"], "temprature"),
        (["--divergence", "klx"], "klx"),
        (["--backend", "foo"], "backend='foo'"),
        (["--label_smoothing_factor", "2"], "label_smoothing=2.0"),
        (["--vocab_size", "-5"], "vocab_size=-5"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0"),
    ],
)
def test_mistakes_get_one_message(argv, message, capsys):
    assert main(["distill", *argv, "--output_dir", "unused"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"input_ids": [1, 99999, 2]}, [], "input_ids holds 99999"),
        ({"input_ids": [1, -7, 2]}, [], "input_ids holds -7"),
        ({"input_ids": [1, 2], "labels": [1, 99999]}, [], "labels holds 99999"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, [], "3 input_ids and 2 labels"),
        ({"input_ids": [1, 2, 3]}, ["--vocab_size", "99999"], "vocab_size=99999"),
    ],
)
def test_data_that_do_not_fit_get_one_message(demo, tmp_path, capsys, row, flags, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    student = str(demo / "student")
    argv = ["distill", "--teacher", student, "--student", student, "--use_cpu", "true", *flags]
    argv += ["--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_unknown_key_in_a_recipe(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("temprature: 3.0\n")
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "'temperature'" in capsys.readouterr().err


def test_doctor_and_help():
    for argv in (["doctor"], ["--help"], ["distill", "--help"]):
        code = f"from fusedkd.cli import main; raise SystemExit(main({argv}))"
        assert "fusedkd" in children.python(code)


def test_only_a_lone_block_may_be_short():
    """More documents than are cut at a time: what is left of a batch is dropped."""
    many = Dataset.from_dict({"input_ids": [[1, 2]] * 10_003})
    assert set(map(len, pack(many, None, 64)["input_ids"])) == {64}
    assert pack(many.select(range(3)), None, 64)["input_ids"] == [[1, 2] * 3]
