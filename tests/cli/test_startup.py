"""What is imported, and when: a help text should not wait for what it does not use."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import fusedkd
import fusedkd.train
from fusedkd.train.arguments import TASK_NAMES
from fusedkd.train.tasks import TASKS

HEAVY = ["torch", "numpy", "transformers", "datasets", "accelerate", "rich", "matplotlib", "yaml"]
HELP = """
import contextlib, io, sys
from fusedkd.cli import main
with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
    main({words})
assert "usage" in said.getvalue(), said.getvalue()
print(*(name for name in {names} if name in sys.modules))
"""


def loaded(words: list[str], names: list[str]) -> list[str]:
    code = HELP.format(words=words, names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("words", [["--help"], [], ["doctor", "--help"], ["cache", "--help"],
                                   ["student", "--help"], ["demo", "--help"]])  # fmt: skip
def test_a_help_text_loads_nothing(words: list[str]) -> None:
    assert not loaded(words, HEAVY)


def test_distill_s_help_loads_transformers_and_no_data_or_trainer() -> None:
    names = ["transformers", "datasets", "fusedkd.train.trainer", "fusedkd.cli.distill",
             "transformers.trainer", "matplotlib"]  # fmt: skip
    assert loaded(["distill", "--help"], names) == ["transformers"]


def test_the_help_text_has_every_task() -> None:
    assert ", ".join(task.name for task in TASKS) == TASK_NAMES


@pytest.mark.parametrize("package", [fusedkd, fusedkd.train])
def test_names_are_found_when_they_are_asked_for(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert name in dir(package)
        assert getattr(package, name) is vars(package)[name]
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018
    assert pickle.loads(pickle.dumps(fusedkd.kd_loss)) is fusedkd.kd_loss
    assert fusedkd.divergences.__name__ == "fusedkd.divergences"
    scope: dict[str, object] = {}
    exec("from fusedkd import *", scope)
    assert set(fusedkd.__all__) <= scope.keys()
