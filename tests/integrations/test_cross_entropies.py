"""Other libraries' cross-entropies of a head, and Liger's beside total variation, against their
formulas in fp64."""

from __future__ import annotations

import inspect
from typing import Any

import children
import pytest
import torch
from liger_kernel import transformers as theirs
from liger_kernel.transformers import functional
from torch import Tensor
from torch.nn import functional as F

from fusedkd.integrations import liger as ours
from fusedkd.integrations.cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy

B, L, H, V = 2, 7, 6, 41
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias with gradients; targets of which some are ignored."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((B, L, H), (V, H), (V,))
    leaves = [torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes]
    targets = torch.randint(V, (B, L), generator=draw)
    targets[0, 2], targets[1, [0, 6]] = -100, -100
    return leaves, targets


def compare(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients for a random upstream gradient."""
    close = CLOSE[leaves[0].dtype]
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    grads = [
        torch.autograd.grad(x, leaves, upstream.to(x.dtype), retain_graph=True) for x in (got, want)
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=close, atol=close * float(y.abs().max()))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, True, 2])
@pytest.mark.parametrize("lse", [False, True])
def test_cut_cross_entropy(dtype: torch.dtype, reduction: str, shift: int, lse: bool) -> None:
    leaves, targets = inputs(dtype)
    e, c, bias = leaves
    softcap = 5.0 if shift else None
    found = linear_cross_entropy(
        e, c, targets, bias, softcap=softcap, reduction=reduction, shift=shift, return_lse=lse
    )
    by = int(shift)
    logits = (e.double() @ c.double().T + bias.double())[:, : L - by]
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    y = targets[:, by:]
    want = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)
    want = want.view(y.shape) if reduction == "none" else want
    if not lse:
        return compare(found, want, leaves)
    norm = torch.where(y == -100, 0.0, logits.logsumexp(-1))
    assert (found[1][y == -100] == 0).all()
    compare(found[0], want, leaves)
    compare(found[1], norm, leaves)
    compare(found[0] + (found[1] ** 2).mean(), want + (norm**2).mean(), leaves)


def test_cut_cross_entropy_s_module_and_errors() -> None:
    (e, c, bias), targets = inputs()
    module = LinearCrossEntropy(ignore_index=3, reduction="sum", shift=1, impl="cce_exact")
    with pytest.raises(ValueError, match="labels holds -100"):
        module(e, c, targets, bias)
    targets = targets.clamp(min=3)
    assert torch.equal(
        module(e, c, targets, bias), linear_cross_entropy(e, c, targets, bias, 3, None, "sum", 1)
    )
    for given, said in (
        ({"bias": -100}, "bias=-100.*by name"),
        ({"vocab_parallel_options": 1}, "vocab_parallel_options.*group="),
        ({"reduction": "avg"}, "reduction='avg'"),
        ({"shift": L}, f"shift={L}: expected 0 to {L - 1}"),
        ({"shift": -1}, "shift=-1"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            linear_cross_entropy(e, c, targets, **given)  # type: ignore[arg-type]
    nothing = linear_cross_entropy(e, c, torch.full_like(targets, -100), return_lse=True)
    assert nothing[0] == 0 and not nothing[1].any()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_liger_s_linear_cross_entropy(dtype: torch.dtype, reduction: str) -> None:
    leaves, targets = inputs(dtype)
    x, weight, bias = leaves
    x, y, scale = x.flatten(0, 1), targets.flatten(), 0.05
    options = {"lse_square_scale": scale, "label_smoothing": 0.1, "reduction": reduction}
    found = ours.liger_fused_linear_cross_entropy(
        x, weight, y, bias, softcap=5.0, return_z_loss=True, **options
    )
    logits = 5 * torch.tanh((x.double() @ weight.double().T + bias.double()) / 5)
    ce = F.cross_entropy(logits, y, reduction=reduction, label_smoothing=0.1)
    z = scale * logits.logsumexp(-1) ** 2 * (y != -100)
    z = z if reduction == "none" else z.sum() / ((y != -100).sum() if reduction == "mean" else 1)
    compare(found.loss, ce + z, leaves)
    torch.testing.assert_close(found.z_loss.double(), z, rtol=1e-5, atol=1e-7)
    assert not found.z_loss.requires_grad
    module = ours.LigerFusedLinearCrossEntropyLoss(softcap=5.0, **options)
    assert torch.equal(module(weight, x, y, bias), found.loss)


def test_liger_s_linear_cross_entropy_refuses_what_it_has_not() -> None:
    (x, weight, _), targets = inputs()
    for given in (
        {"ce_weight": torch.ones(V)},
        *({name: True} for name in ("use_token_scaling", "return_token_accuracy")),
        {"return_predicted_tokens": True},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(given))} is not to be had here"):
            ours.liger_fused_linear_cross_entropy(x[0], weight, targets[0], **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_cross_entropy_beside_total_variation(dtype: torch.dtype) -> None:
    """Each token's, both with a gradient; as a module, and as a function."""
    draw = torch.Generator().manual_seed(2)
    student, teacher = ((2 * torch.randn(9, V, generator=draw)).to(dtype) for _ in range(2))
    student.requires_grad_()
    y = torch.randint(V, (9,), generator=draw)
    y[[1, 4]] = 7
    counts = y != 7
    ce = F.cross_entropy(student.double(), y, reduction="none", ignore_index=7)
    p, q = (x.double().softmax(-1) for x in (student, teacher))
    tvd = (p - q).abs().sum(-1) / 2 * counts
    module = ours.LigerFusedCETVDLoss(ignore_index=7)
    for found in (
        module(student, teacher, y),
        ours.LigerFusedCETVDFunction.apply(student, teacher, y, 7),
    ):
        assert [x.dtype for x in found] == [torch.promote_types(dtype, torch.float32)] * 2
        for got, want in zip(found, (ce, tvd), strict=True):
            compare(got, want, [student])
        weights = torch.rand(2, 9, generator=draw).double()
        both = [(w[0] * weights[0] + w[1] * weights[1]).sum() for w in (found, (ce, tvd))]
        compare(both[0], both[1], [student])


def test_a_subclass_of_the_function() -> None:
    class Mine(ours.LigerFusedCETVDFunction):  # type: ignore[misc, name-defined]
        """Weighs both."""

        @classmethod
        def forward(cls, ctx: Any, *args: Any) -> Any:
            ce, tvd = super().forward(ctx, *args)
            return 2 * ce, tvd

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return ours.LigerFusedCETVDFunction.backward(ctx, 2 * upstream[0], upstream[1])

    student = torch.randn(3, V).requires_grad_()
    y = torch.randint(V, (3,))
    plain = ours.LigerFusedCETVDFunction.apply(student, student.detach(), y)[0].sum()
    twice = Mine.apply(student, student.detach(), y)[0].sum()
    grads = [torch.autograd.grad(x, student)[0] for x in (plain, twice)]
    torch.testing.assert_close(2 * grads[0], grads[1])


def test_signatures() -> None:
    def parameters(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    name = "liger_fused_linear_cross_entropy"
    assert parameters(getattr(ours, name)) == parameters(getattr(functional, name))
    for name in ("LigerFusedLinearCrossEntropyLoss", "LigerFusedCETVDLoss"):
        for method in ("__init__", "forward"):
            mine, other = (getattr(getattr(m, name), method) for m in (ours, theirs))
            assert parameters(mine) == parameters(other)


def test_needs_no_cut_cross_entropy() -> None:
    children.python(
        "import sys; sys.modules['cut_cross_entropy'] = None\n"
        "import fusedkd.integrations.cut_cross_entropy\n"
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules"
    )
