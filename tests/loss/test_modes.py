"""Modes in which tensors are not what they seem: fake ones, tracers, default devices, graphs of
gradients; and memory that the gradient may not be written over."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fusedkd import LMHead, SparseTeacher, kd_loss, kd_loss_and_metrics
from fusedkd.integrations import liger
from fusedkd.kernels import cpu

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS = ("dense", "head", "sparse", "head and sparse")


def sides(form: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Tensor]:
    """Student, teacher and labels."""
    n, v = 6, 101
    labels = torch.randint(v, (n,))
    labels[2] = -100

    def head(width: int) -> LMHead:
        return LMHead(*(torch.randn(shape).to(dtype) for shape in ((n, width), (v, width), (v,))))

    student = head(16) if form.startswith("head") else torch.randn(n, v).to(dtype)
    if form.endswith("sparse"):
        log_probs, ids = torch.randn(n, v).log_softmax(-1).topk(9)
        return student, SparseTeacher(ids, log_probs), labels
    return student, head(12) if form == "head" else torch.randn(n, v).to(dtype), labels


def leaves(side: Any) -> list[Tensor]:
    parts = [side] if isinstance(side, Tensor) else [side.hidden, side.weight, side.bias]
    return [x.requires_grad_() for x in parts]


def everything(student: Any, teacher: Any, labels: Tensor, **keywords: Any) -> list[Tensor]:
    """Loss, metrics and gradients of a call."""
    inputs = leaves(student)
    loss, metrics = kd_loss_and_metrics(student, teacher, labels, ce_weight=0.5, **keywords)
    known = [x for x in metrics if x is not None]
    return [loss.detach(), *known, *torch.autograd.grad(loss.sum(), inputs)]


# ---- default devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_device_plays_no_part(backend: str, form: str, dtype: torch.dtype) -> None:
    """During a call, and in none after it."""
    case = sides(form, dtype)
    for reduction in ("mean", "none"):
        want = everything(*case, reduction=reduction, backend=backend)
        with torch.device("meta"):
            within = everything(*case, reduction=reduction, backend=backend)
        for got in (within, everything(*case, reduction=reduction, backend=backend)):
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# ---- fake tensors, tracers, whoever watches ------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors(form: str, dtype: torch.dtype, reduction: str) -> None:
    """Shapes and dtypes are those of a real call, and nothing is computed."""
    want = everything(*sides(form, dtype), reduction=reduction)
    with FakeTensorMode():
        student, teacher, labels = _faked(form, dtype)
        got = everything(student, teacher, labels, reduction=reduction)
    for x, y in zip(got, want, strict=True):
        assert isinstance(x, FakeTensor) and x.shape == y.shape and x.dtype == y.dtype


def _faked(form: str, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    def like(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.empty(x.shape, dtype=x.dtype)
        parts = (x.hidden, x.weight, x.bias) if isinstance(x, LMHead) else (x.indices, x.log_probs)
        return type(x)(*map(like, parts))

    with torch.utils._python_dispatch._disable_current_modes():
        real = sides(form, dtype)
    return like(real[0]), like(real[1]), like(real[2])


def test_fake_tensors_outside_of_their_mode() -> None:
    mode = FakeTensorMode()
    student, teacher = (mode.from_tensor(torch.randn(6, 1031)) for _ in range(2))
    assert isinstance(kd_loss(student, teacher), FakeTensor)


def test_operators_without_memory() -> None:
    """Fake kernels for all that have tensors; a null pointer is refused, not read."""
    operators = torch.ops.fusedkd_cpu
    with FakeTensorMode():
        x, y = torch.empty(4, 8), torch.empty(8)
        operators.scale_(x, x, y)
        operators.matmul(x, x.bfloat16(), torch.empty(8, 8).bfloat16(), False)
        numbers = [1.0] * len(cpu.Numbers._fields)
        rest = (None, y, "forward_kl", numbers, 8, y, None, None)
        operators.rows(x[None], x[None], None, False, *rest)
        operators.rows(x[None], x.double(), x.int(), True, *rest)
    assert cpu.unavailable() is None
    nothing = torch.empty(4, 8, dtype=torch.float64)
    nothing.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="without memory"):
        operators.scale_(nothing, nothing, torch.ones(()))


def _losses(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    loss = kd_loss(s, t, labels, temperature=2.0, ce_weight=0.5)
    return loss, torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_make_fx(tracing: str, dtype: torch.dtype) -> None:
    inputs = sides("dense", dtype)
    graph = make_fx(_losses, tracing_mode=tracing)(*inputs)
    torch.testing.assert_close(graph(*inputs), _losses(*inputs))


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 101)

    def forward(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        student = LMHead(s, self.head.weight, self.head.bias)
        return kd_loss(student, t, labels, divergence="jsd(0.3)", ce_weight=0.5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(strict: bool, dynamic: bool) -> None:
    module, labels = _Module(), torch.randint(101, (6,))
    inputs = (torch.randn(6, 16), torch.randn(6, 101), labels)
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = ({0: rows},) * 3 if dynamic else None
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


class _Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_those_who_watch_see_every_operation() -> None:
    """Memory estimators, counters of operations, modes of one's own; also with inplace=True."""
    model = nn.Linear(64, 5000)
    with FakeTensorMode():
        estimated = nn.Linear(64, 5000)
        tracker = MemTracker()
        tracker.track_external(estimated)
        with tracker:
            kd_loss(estimated(torch.randn(32, 64)), torch.randn(32, 5000)).backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peak > 2 * 32 * 5000 * 4
    x, t = torch.randn(32, 64), torch.randn(32, 5000)
    want = kd_loss(model(x), t)
    with FlopCounterMode(display=False), _Watching() as watching:
        loss = kd_loss(model(x), t, inplace=True)
        loss.backward()
    torch.testing.assert_close(loss, want)
    assert "fusedkd.forward.default" in watching.names


# ---- graphs of gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(backend: str, form: str, reduction: str) -> None:
    """By whatever they are asked for, and only when they are asked for."""
    student, teacher, labels = sides(form)
    inputs = leaves(student)
    for i in range(len(inputs)):
        loss = kd_loss(student, teacher, labels, reduction=reduction, backend=backend).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        plain = kd_loss(student, teacher, labels, reduction=reduction, backend=backend).sum()
        assert all(
            torch.equal(x, y)
            for x, y in zip(grads, torch.autograd.grad(plain, inputs), strict=True)
        )
        penalty = inputs[i].square().sum() + grads[i].square().sum()  # of which a part has one
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(penalty, inputs[i])


def test_second_derivatives_of_drop_ins_are_refused() -> None:
    x, y = (torch.randn(6, 9).log_softmax(-1) for _ in range(2))
    labels, weight = torch.randint(9, (6,)), torch.eye(9)
    losses = [
        lambda x: liger.LigerJSD()(x, y, labels),
        lambda x: liger.LigerJSDFunction.apply(x, y, labels, 0.5, -100),
        lambda x: liger.LigerFusedLinearJSDFunction.apply(x, weight, y, weight, labels),
    ]
    for loss in losses:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(x.square().sum() + grad.square().sum(), x)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hessians_are_refused(backend: str, reduction: str) -> None:
    s, t, _ = sides("dense")

    def loss(s: Tensor) -> Tensor:
        return kd_loss(s, t, reduction=reduction, backend=backend).sum()

    def head(h: Tensor) -> Tensor:
        weight = torch.eye(s.shape[1])
        return kd_loss(LMHead(h, weight), t, reduction=reduction, backend=backend).sum()

    for f in (loss, head):
        torch.testing.assert_close(torch.func.grad(f)(s), torch.autograd.functional.jacobian(f, s))
        for second in (
            lambda f=f: torch.func.grad(lambda s: torch.func.grad(f)(s).square().sum())(s),
            lambda f=f: torch.autograd.functional.hessian(f, s),
        ):
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                second()


# ---- in place ------------------------------------------------------------------------------------


def _shared() -> dict[str, Callable[[], dict[str, Any]]]:
    def teacher_a_row_ahead() -> dict[str, Any]:
        x = torch.randn(65, 200)
        return {"student": x[1:], "teacher": x[:-1]}

    def rows_that_overlap() -> dict[str, Any]:
        return {"student": torch.randn(20).unfold(0, 8, 2), "teacher": torch.randn(7, 8)}

    def one_class_with_steps() -> dict[str, Any]:
        return {"student": torch.randn(4, 6)[:, ::6], "teacher": torch.zeros(4, 1)}

    def weights_among_the_logits() -> dict[str, Any]:
        x = torch.rand(4, 6)
        more = {"token_weights": x[:, 0], "reduction": "sum"}
        return {"student": x, "teacher": torch.randn(4, 6), **more}

    def hidden_states_among_the_logits() -> dict[str, Any]:
        x = torch.randn(4, 6)
        return {"student": x, "teacher": LMHead(x[:, :3], torch.randn(6, 3))}

    def expanded() -> dict[str, Any]:
        return {"student": torch.randn(1, 6).expand(4, 6), "teacher": torch.randn(4, 6)}

    def batches_that_overlap() -> dict[str, Any]:
        student = torch.randn(40).as_strided((3, 2, 6), (3, 12, 1))
        return {"student": student, "teacher": torch.randn(3, 2, 6)}

    found = [teacher_a_row_ahead, rows_that_overlap, one_class_with_steps]
    found += [weights_among_the_logits, hidden_states_among_the_logits, expanded]
    return {f.__name__: f for f in [*found, batches_that_overlap]}


@pytest.mark.parametrize("case", _shared())
def test_in_place_needs_memory_of_its_own(backend: str, case: str) -> None:
    keywords = _shared()[case]()
    student = keywords.pop("student").detach().requires_grad_()
    before = student.detach().clone()
    with pytest.raises(ValueError, match=r"inplace=True.*(share memory|contiguous row)"):
        kd_loss(student, keywords.pop("teacher"), **keywords, inplace=True, backend=backend)
    assert torch.equal(student, before)


def test_in_place_beside_others_in_one_storage(backend: str) -> None:
    """Halves of one buffer, one after the other, or taking turns row by row."""
    for dim, layout in itertools.product((0, 1), ("first", "last")):
        both = torch.randn(8, 10)
        s, t = both.chunk(2, dim) if layout == "first" else both.chunk(2, dim)[::-1]
        want = torch.autograd.grad(kd_loss(x := s.clone().requires_grad_(), t.clone()), x)[0]
        student, other = s.detach().requires_grad_(), t.clone()
        got = torch.autograd.grad(kd_loss(student, t, inplace=True, backend=backend), student)[0]
        torch.testing.assert_close(got, want)
        assert got.data_ptr() == student.data_ptr() and torch.equal(t, other)
