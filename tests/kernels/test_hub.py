"""The kernel that Hugging Face's ``kernels`` loads, in processes outside of the checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedkd import LMHead, hub, kd_loss
from fusedkd.kernels import cpu

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "build" / "kernels"  # `make test` installs it
installed = pytest.mark.skipif(not KERNELS.is_dir(), reason="kernels is not in build/kernels")
built = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ extension")

BEGIN = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

folder = Path(sys.argv[1])
torch.manual_seed(0)
student, teacher = torch.randn(2, 3, 101, requires_grad=True), torch.randn(2, 3, 101)
labels, hidden = torch.randint(101, (2, 3)), torch.randn(6, 8, requires_grad=True)
weight = torch.randn(101, 8, requires_grad=True)
upstream = torch.rand(())
how = dict(temperature=1.7, kd_weight=0.6, ce_weight=0.4)

def answers(of, **more):
    found = []
    for divergence in ("forward_kl", "jsd"):
        loss = of.kd_loss(student, teacher, labels, divergence=divergence, **how, **more)
        found += [loss, *torch.autograd.grad(loss * upstream, student)]
        head = of.LMHead(hidden, weight)
        loss = of.kd_loss(head, teacher.flatten(0, 1), divergence=divergence, **more)
        found += [loss, *torch.autograd.grad(loss * upstream, (hidden, weight))]
    return [x.detach() for x in found]
"""
ALONE = """
sys.modules["fusedkd"] = None  # any import of it is an error
kernel = get_local_kernel(folder)
made = answers(kernel, backend="cpu")
torch.save(made, folder / "answers.pt")
"""
BESIDE = """
import fusedkd

native = get_local_kernel(folder)
triton = get_local_kernel(folder / "build" / "torch-cuda")
truth = answers(fusedkd, backend="cpu")
torch.testing.assert_close(answers(native), truth, rtol=0, atol=0)
torch.testing.assert_close(answers(triton, backend="triton"), truth)
assert native.kd_loss is not fusedkd.kd_loss is not triton.kd_loss

def compiled(of):
    loss = lambda s: of.kd_loss(s, teacher, labels, **how)
    return torch.compile(loss, backend="eager", fullgraph=True)(student).detach()

torch.testing.assert_close(compiled(native), compiled(fusedkd), rtol=0, atol=0)

def formula(lp, lq):
    return 0.5 * (lp.exp() - lq.exp()) ** 2

own = lambda of, backend: of.kd_loss(
    student, teacher, divergence=of.divergences.custom(formula)(), backend=backend
)
torch.testing.assert_close(own(triton, "triton"), own(fusedkd, "reference"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "kernel"
    assert hub.main(["--output", str(path)]) == 0
    return path


def child(code: str, folder: Path, *paths: Path, **environment: str) -> None:
    path = os.pathsep.join(map(str, [KERNELS, *paths]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", BEGIN + code, str(folder)], cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@installed
@built
def test_alone_it_computes_what_the_reference_does(folder: Path) -> None:
    child(ALONE, folder)
    names: dict[str, object] = {}
    start = BEGIN.index("torch.manual_seed"), BEGIN.index("def answers")
    exec("import torch\n" + BEGIN[slice(*start)], names)
    wide = {k: v.detach().double().requires_grad_(v.requires_grad) if torch.is_tensor(v) and
            v.is_floating_point() else v for k, v in names.items()}  # fmt: skip
    truth = []
    for divergence in ("forward_kl", "jsd"):
        teacher = wide["teacher"]
        more = {"divergence": divergence, "backend": "reference"}
        loss = kd_loss(wide["student"], teacher, wide["labels"], **wide["how"], **more)
        truth += [loss, *torch.autograd.grad(loss * wide["upstream"], wide["student"])]
        head = wide["hidden"], wide["weight"]
        loss = kd_loss(LMHead(*head), teacher.flatten(0, 1), **more)
        truth += [loss, *torch.autograd.grad(loss * wide["upstream"], head)]
    made = torch.load(folder / "answers.pt")
    torch.testing.assert_close(made, [x.detach().float() for x in truth])


@installed
@built
def test_beside_the_package_both_keep_their_operators(folder: Path) -> None:
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    child(BESIDE, folder, *map(Path, filter(None, own)), TRITON_INTERPRET="1")


@built
def test_every_import_is_relative_and_every_variant_whole(folder: Path) -> None:
    variants = sorted(path.name for path in (folder / "build").iterdir())
    assert variants[0] == "torch-cuda" and len(variants) == 2
    for variant in variants:
        place = folder / "build" / variant
        for path in place.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not any(a.name.startswith("fusedkd") for a in node.names), path
                if isinstance(node, ast.ImportFrom):
                    assert node.level or not str(node.module).startswith("fusedkd"), path
        assert any(place.rglob("*.so")) == (variant != "torch-cuda")
    version = re.search(r"0x(\w\w)(\w\w)0{12}", (ROOT / "setup.py").read_text())
    assert version and f"{int(version[1], 16)}{int(version[2], 16)}" == hub.STABLE_ABI


def test_without_the_extension_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "NATIVE", ())
    assert hub.main(["--output", str(tmp_path / "out")]) == 2
    assert "no C++ extension" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
