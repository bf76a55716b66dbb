"""What comes with the package beside its code: names, versions, completion, what to paste."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import children
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import fusedkd
from fusedkd.cli import doctor, main
from fusedkd.cli.recipe import recipe_file
from fusedkd.kernels import cpu
from fusedkd.shipped import shipped

ROOT = Path(__file__).parents[2]
Captured = pytest.CaptureFixture[str]
needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="no bash")


def said(capsys: Captured, *words: str, code: int = 0) -> str:
    assert main([*words]) == code
    out = capsys.readouterr()
    return out.err if code else out.out


# ---- files by name -----------------------------------------------------------------------------


def test_a_recipe_is_found_by_name_and_a_file_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--student", "./none", "--data", "x", "--output_dir", "out", "--teacher", "./none"]
    for config in ("hinton", str(ROOT / "recipes" / "hinton.yaml")):
        assert "./none" in said(capsys, "distill", "--config", config, *flags, code=2)
    (tmp_path / "hinton").write_text("temprature: 1\n")
    assert "temprature" in said(capsys, "distill", "--config", "hinton", *flags, code=2)


@pytest.mark.parametrize("name", ["hintn", "hinton.yaml", "recipes/hinton.yaml", "../hinton", ""])
def test_what_is_no_recipe_is_told_those_that_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    message = said(capsys, "distill", "--config", name, code=2)
    assert message.count("\n") == 1 and all(recipe in message for recipe in shipped("recipes"))


def test_config_lists_all_and_finds_each(capsys: Captured) -> None:
    listed = said(capsys, "config")
    for kind in ("recipes", "configs"):
        assert shipped(kind)
        for name, path in shipped(kind).items():
            assert re.search(rf"^  {name} +\S", listed, re.M)
            assert said(capsys, "config", name) == f"{path}\n"
            assert yaml.safe_load(path.read_text())
    assert recipe_file(Path("hinton")) == ROOT / "recipes" / "hinton.yaml"
    message = said(capsys, "config", "nothing", code=2)
    assert "nothing" in message and "hinton" in message and "fsdp2" in message


@pytest.mark.parametrize("name", shipped("configs"))
def test_accelerate_reads_what_it_launches_with(name: str) -> None:
    config = load_config_from_file(str(shipped("configs")[name]))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"


# ---- versions ----------------------------------------------------------------------------------


def test_one_version_everywhere(capsys: Captured) -> None:
    version = fusedkd.__version__
    assert said(capsys, "--version") == f"fusedkd {version}\n"
    words = [sys.executable, "-m", "fusedkd", "--version"]
    assert subprocess.check_output(words, text=True) == f"fusedkd {version}\n"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version and cited["license"] == "Apache-2.0"
    first = re.search(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first and first[1] in (version, "Unreleased")


# ---- doctor --env ------------------------------------------------------------------------------


def test_what_one_pastes_has_versions_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("FUSEDKD_CPU_ISA", "base")
    reason = "the C++ extension does not load: /home/alice/env/_native.so: undefined symbol"
    monkeypatch.setattr(cpu, "unavailable", lambda: reason)
    text = said(capsys, "doctor", "--env")
    assert f"fusedkd {fusedkd.__version__}\n" in text and f"torch {torch.__version__}" in text
    assert "backend reference: runs" in text and "FUSEDKD_CPU_ISA=base" in text
    assert "_native.so: undefined symbol" in text
    assert "alice" not in text and "secret" not in text and str(Path.cwd()) not in text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("in /home/bob/a b.so: it", "in .../a b.so: it"),
        ("/home/alice", "~"),
        ("~/x/y.so", ".../y.so"),
        ("C:\\Users\\bob\\x.dll", ".../x.dll"),
        ("'/srv/bob/x.so'", "'.../x.so'"),
        ("and/or 3 / 4", "and/or 3 / 4"),
    ],
)
def test_folders_are_left_out(text: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert doctor._without_folders(text) == left


# ---- completion --------------------------------------------------------------------------------

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD={last}
_shtab_fusedkd
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@needs_bash
def test_a_shell_completes_commands_flags_and_recipes(tmp_path: Path) -> None:
    code = "import sys; from fusedkd.cli import main; sys.exit(main(['completion', 'bash']))"
    script = tmp_path / "fusedkd.bash"
    script.write_text(children.python(code))

    def completed(*words: str) -> list[str]:
        ask = ASK.format(
            script=script, words=" ".join(repr(word) for word in words), last=len(words) - 1
        )
        done = subprocess.run(
            ["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        return done.stdout.split()

    assert {"distill", "cache", "doctor", "completion"} <= {*completed("fusedkd", "")}
    assert completed("fusedkd", "dis") == ["distill"]
    assert "--kd_weight" in completed("fusedkd", "distill", "--kd")
    assert "--warmup_steps" in completed("fusedkd", "distill", "--warm")
    assert completed("fusedkd", "distill", "--config", "hin") == ["hinton"]
    assert completed("fusedkd", "distill", "--config", "fused") == ["fusedkd.bash"]
    assert "verify" in completed("fusedkd", "cache", "ver")
    assert "--env" in completed("fusedkd", "doctor", "--e")
