"""Which gradient the mean of a sampled loss's gradient is: drawn, over more and more samples.

``python -m fusedkd.benchmarks.estimators --output docs/on-policy.png [--samples 1000000]``

One token of a vocabulary of 50: the student's and the teacher's distributions are drawn, then
samples from the student. Of each loss the mean of the gradients (in the student's logits) is
compared with those of reverse and forward KL, which are known; what is drawn is its distance over
the size of the reverse KL's gradient. One that has the right mean comes nearer as 1 / sqrt(n).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fusedkd import kd_loss, sampled_kd_loss
from fusedkd.files import write_figure

VOCABULARY = 50
BLOCK = 100_000


def exact(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """(V,) its gradient."""
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(kd_loss(leaf, teacher, divergence=divergence), leaf)[0]


def gradients(student: Tensor, teacher: Tensor, tokens: Tensor, loss_type: str) -> Tensor:
    """(n, V) of each token's loss. k1's is made by hand: the library refuses it."""
    leaf = student.expand(len(tokens), -1).clone().requires_grad_()
    t = teacher.log_softmax(-1)[tokens]
    if loss_type == "k1":
        loss = (leaf.log_softmax(-1).gather(1, tokens[:, None])[:, 0] - t).sum()
    else:
        loss = sampled_kd_loss(leaf, t, tokens, loss_type=loss_type, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


def means(samples: int, loss_type: str, sides: tuple[Tensor, Tensor]) -> dict[int, Tensor]:
    """Of the first n samples, n growing, the mean gradient (V,)."""
    student, teacher = sides
    draw = torch.Generator().manual_seed(1)
    total, done, found = torch.zeros_like(student), 0, {}
    marks = {int(10 ** (k / 4)) for k in range(8, 41)}
    while done < samples:
        n = min(BLOCK, samples - done)
        tokens = torch.multinomial(student.softmax(-1), n, replacement=True, generator=draw)
        sums = gradients(student, teacher, tokens, loss_type).cumsum(0)
        for mark in sorted(m for m in marks if done < m <= done + n):
            found[mark] = (total + sums[mark - done - 1]) / mark
        total, done = total + sums[-1], done + n
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw = torch.Generator().manual_seed(0)
    student, teacher = (
        1.5 * torch.randn(VOCABULARY, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    targets = {name: exact(student, teacher, name) for name in ("reverse_kl", "forward_kl")}
    size = targets["reverse_kl"].norm()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for loss_type in ("k1", "k2", "k3", "policy"):
        curve = means(options.samples, loss_type, (student, teacher))
        last = max(curve)
        print(loss_type, end="")
        for axis, (name, target) in zip(axes, targets.items(), strict=True):
            away = [float((x - target).norm() / size) for x in curve.values()]
            style = {"linestyle": "--"} if loss_type == "policy" else {}
            axis.loglog(list(curve), away, label=loss_type, **style)
            print(f"  {away[-1]:.4f} from {name}", end="")
            axis.set(title=f"distance from the gradient of {name}", xlabel="samples")
        print(f"  after {last:,}")
    axes[0].set(ylabel="over the reverse KL's size")
    axes[0].legend()
    write_figure(options.output, figure, dpi=120)


if __name__ == "__main__":
    main()
