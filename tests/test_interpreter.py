"""A first look at the Triton kernels in Triton's interpreter, which must be chosen before triton is
imported: hence the child process. The whole contract there is `make test-slow`."""

import os
import subprocess
import sys

CHECK = """
import torch
from fusedkd import divergences, kd_loss

torch.manual_seed(0)
for name in divergences.names():
    for v in (1, 33, 1025):
        student, teacher = torch.randn(3, v) * 3, torch.randn(3, v) * 3
        labels, found = torch.randint(0, v, (3,)), []
        for backend in ("triton", "reference"):
            x = student.clone().requires_grad_()
            options = {"divergence": name, "temperature": 2.0, "ce_weight": 0.5}
            loss = kd_loss(x, teacher, labels, backend=backend, **options)
            loss.backward()
            found.append((loss.detach(), x.grad))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
print("right")
"""


def test_every_divergence_in_the_interpreter() -> None:
    environment = dict(os.environ, TRITON_INTERPRET="1")
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "right"
