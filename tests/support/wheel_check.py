"""Run by `make wheel-test` in an environment that has the built wheel: it works on its own."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import torch

import fusedkd
from fusedkd import LMHead, kd_loss
from fusedkd.cli import main
from fusedkd.kernels import cpu
from fusedkd.shipped import shipped

site = Path(sys.prefix).resolve()
assert Path(fusedkd.__file__).is_relative_to(site), fusedkd.__file__
assert Path(cpu.__file__).is_relative_to(site), cpu.__file__
assert (Path(fusedkd.__file__).parent / "py.typed").exists()
assert cpu.unavailable() is None, cpu.unavailable()

torch.manual_seed(0)
weight = torch.randn(101, 8)
student = LMHead(torch.randn(3, 8, requires_grad=True), weight)
teacher = LMHead(torch.randn(3, 8), weight)
losses = [kd_loss(student, teacher, backend=backend) for backend in ("cpu", "reference")]
torch.testing.assert_close(*losses)

# the command, and the files that it knows by name
said = subprocess.check_output([site / "bin" / "fusedkd", "--version"], text=True)
assert said == f"fusedkd {fusedkd.__version__}\n", said
files = {**shipped("recipes"), **shipped("configs")}
assert {"hinton", "fsdp2"} <= files.keys()
assert all(path.is_relative_to(site) for path in files.values())
assert main(["distill", "--config", "hinton", "--student", "./none", "--output_dir", "out"]) == 2

# one wheel for every Python, and an sdist that has all that it was made from
dist = Path(sys.argv[1])
(wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
assert "-py3-none-" in wheel.name and "-any" not in wheel.name, wheel
with tarfile.open(source) as packed:
    sources = {packed.extractfile(entry).read() for entry in packed if entry.isfile()}
with zipfile.ZipFile(wheel) as built:
    for name in built.namelist():
        made = name.endswith(".so") or ".dist-info/" in name
        assert made or built.read(name) in sources, f"{source} lacks {name}"
print(f"wheel: kd_loss = {losses[0].item():.6f} from {wheel.name}")
