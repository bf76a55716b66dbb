"""Run by `make wheel-test` from another directory: the installed wheel works on its own."""

import sys
from pathlib import Path

site = Path(sys.argv[1]).resolve()
# An editable install puts its finder first; the wheel must win.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, str(site))

import torch  # noqa: E402

import fusedkd  # noqa: E402
from fusedkd import LMHead, kd_loss  # noqa: E402
from fusedkd.kernels import cpu  # noqa: E402

assert Path(fusedkd.__file__).is_relative_to(site), fusedkd.__file__
assert Path(cpu.__file__).is_relative_to(site), cpu.__file__
assert (site / "fusedkd" / "py.typed").exists()
assert cpu.unavailable() is None, cpu.unavailable()

torch.manual_seed(0)
weight = torch.randn(101, 8)
student = LMHead(torch.randn(3, 8, requires_grad=True), weight)
teacher = LMHead(torch.randn(3, 8), weight)
losses = [kd_loss(student, teacher, backend=backend) for backend in ("cpu", "reference")]
torch.testing.assert_close(*losses)
print(f"wheel: kd_loss = {losses[0].item():.6f} from {fusedkd.__file__}")
