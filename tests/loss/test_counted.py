"""Only tokens that count are multiplied: a call with others among them gives the bits of one that
has them left out, whatever they hold."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, chunks, kd_loss, kd_loss_and_metrics, loss
from fusedkd import backends as all_backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
N, V, H = (11, 67, 8) if INTERPRETED else (37, 211, 24)
FORMS = ("head, head", "head, dense", "dense, head", "head, sparse", "frozen head, head")
MASKS = {
    "none": torch.zeros(N, dtype=torch.bool),
    "all": torch.ones(N, dtype=torch.bool),
    "one": torch.arange(N) == 5,
    "alternating": torch.arange(N) % 2 == 0,
    "prefix": torch.arange(N) < 4,
    "suffix": torch.arange(N) >= N - 3,
    "random": torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.4,
}


class Call:
    """A call of some form, and the same with rows left out."""

    def __init__(self, form: str, dtype: torch.dtype, device: torch.device, weights: bool) -> None:
        make = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make).to(device, dtype)

        self.form = form
        self.student = {"h": normal(N, H), "w": normal(V, H), "b": normal(V)}
        if form.startswith("dense"):
            self.student = {"h": normal(N, V)}
        of_teacher = {"dense": V, "head": 16}.get(form.split(", ")[1], 7)
        self.teacher, self.teacher_weight = normal(N, of_teacher), normal(V, 16)
        if form.endswith("sparse"):
            log_probs, ids = torch.randn(N, V, generator=make).log_softmax(-1).topk(7)
            self.teacher, self.ids = log_probs.to(device), ids.to(device)
        self.labels = torch.randint(V, (N,), generator=make).to(device)
        self.upstream = torch.randn(N, generator=make).to(device)
        sizes = torch.tensor([1e-20, 1.0, 100.0])[torch.randint(3, (N,), generator=make)]
        self.weights = (torch.rand(N, generator=make) * sizes).to(device) if weights else None

    def results(self, mask: Tensor, packed: bool, reduction: str, **keywords: Any) -> list[Tensor]:
        """Loss and metrics, and the gradients, of the tokens in the mask."""
        mask = mask.to(self.labels.device)

        def rows(x: Tensor) -> Tensor:
            if packed:
                return x[mask]
            spoilt = x.clone()
            spoilt[~mask] = float("nan")
            return spoilt

        parts = {k: rows(x) if k == "h" else x.clone() for k, x in self.student.items()}
        wanted = [
            x.requires_grad_() for x in parts.values() if self.form[0] != "f" or x is parts["h"]
        ]
        student = LMHead(*parts.values()) if len(parts) > 1 else parts["h"]
        teacher: Any = rows(self.teacher)
        if self.form.endswith("sparse"):
            teacher = SparseTeacher(self.ids[mask] if packed else self.ids, teacher)
        elif self.form.endswith("head"):
            teacher = LMHead(teacher, self.teacher_weight)
        labels = self.labels[mask] if packed else self.labels.masked_fill(~mask, -100)
        keywords |= {"reduction": reduction, "ce_weight": 0.5, "temperature": 2.0}
        if self.weights is not None:
            keywords["token_weights"] = self.weights[mask] if packed else self.weights
        value, metrics = kd_loss_and_metrics(student, teacher, labels, **keywords)
        up = rows(self.upstream) if reduction == "none" else torch.tensor(0.37).to(value)
        grads = [torch.autograd.grad(value, wanted, up.to(value.dtype), retain_graph=True)]
        grads.append(torch.autograd.grad(value, wanted, up.to(value.dtype)))
        assert all(map(torch.equal, *grads))
        if reduction == "none" and not packed:
            assert (value[~mask] == 0).all()
            value = value[mask]
        hidden, *others = grads[0]
        assert packed or (hidden[~mask] == 0).all()
        known = [x for x in metrics if x is not None]
        return [value.detach(), *known, hidden if packed else hidden[mask], *others]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(7), y.nan_to_num(7))
        assert torch.equal(x.isnan(), y.isnan())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_those_of_the_packed_call(
    backend: str, device: torch.device, form: str, dtype: torch.dtype
) -> None:
    call = Call(form, dtype, device, weights=dtype != torch.bfloat16)
    masks = [MASKS["random"]] if INTERPRETED else MASKS.values()
    budgets = {"mean": 3000, "none": 3000, "sum": None}
    for (reduction, chunk_bytes), mask in itertools.product(budgets.items(), masks):
        options: dict[str, Any] = {"chunk_bytes": chunk_bytes, "backend": backend}
        packed = call.results(mask, True, reduction, **options)
        assert_same_bits(call.results(mask, False, reduction, **options), packed)


@pytest.mark.parametrize(
    "form, inplace", [*((form, False) for form in FORMS), ("dense, head", True)]
)
def test_products_are_of_the_rows_that_count(
    backend: str, form: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides; and of the teacher's none where it has no say."""
    module, sizes = all_backends.load(backend), []
    mm_ = module.mm_

    def spy(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        sizes.append(a.shape[0] * a.shape[1] * b.shape[1])
        mm_(out, a, b, accumulate)

    monkeypatch.setattr(module, "mm_", spy)
    call = Call(form, torch.float32, torch.device("cpu"), False)
    options = {"inplace": inplace, "backend": backend}
    everything = 0
    for mask in (MASKS["all"], MASKS["random"]):
        sizes.clear()
        student = call.student["h"].clone().requires_grad_()
        parts = [student * 1, *list(call.student.values())[1:]]
        head = LMHead(*parts) if len(parts) > 1 else parts[0]
        teacher: Any = call.teacher
        if form.endswith("sparse"):
            teacher = SparseTeacher(call.ids, call.teacher)
        elif form.endswith(", head"):
            teacher = LMHead(call.teacher, call.teacher_weight)
        labels = call.labels.masked_fill(~mask, -100)
        kd_loss(head, teacher, labels, ce_weight=1.0, **options).backward()
        everything = everything or sum(sizes)
        assert sum(sizes) * N == everything * int(mask.sum())
    if form.endswith(", head"):
        sizes.clear()
        with torch.no_grad():
            kd_loss(head, teacher, labels, kd_weight=0.0, ce_weight=1.0, **options)
        assert len(sizes) == (not form.startswith("dense"))


def test_states_of_no_common_stride_are_not_copied(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hidden[:, :-1] has none; also where all of them count."""
    hidden, weight = torch.randn(3, 9, 6, device=device), torch.randn(40, 6, device=device)
    labels = torch.randint(40, (3, 8), device=device)
    labels[1, 2:6] = -100
    gathered: list[int] = []
    of = chunks.Chunk.of

    def spy(self: Any, x: Tensor) -> Tensor:
        made = of(self, x)
        if made.data_ptr() != x.data_ptr():
            gathered.append(made.shape[1])
        return made

    monkeypatch.setattr(chunks.Chunk, "of", spy)
    for y in (labels, labels.clamp(min=0)):
        gathered.clear()
        found = []
        for states in (hidden.clone()[:, :-1], hidden[:, :-1].contiguous()):
            x = states.detach().requires_grad_()
            value = kd_loss(
                *(LMHead(x, weight), LMHead(x.detach() + 1, weight), y),
                chunk_bytes=2000,
                backend=backend,
            )
            found.append((value, torch.autograd.grad(value, x)[0]))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        assert gathered and max(gathered) <= 8


def test_the_number_may_come_from_the_host(backend: str, device: torch.device) -> None:
    call, mask = Call("head, head", torch.float32, device, False), MASKS["random"]
    want = call.results(mask, False, "mean", backend=backend)
    count = int(mask.sum())
    assert_same_bits(call.results(mask, False, "mean", num_counted=count, backend=backend), want)
    if device.type == "cpu":  # a GPU asserts on the device
        for number in (count - 1, count + 1, N):
            with pytest.raises(ValueError, match=rf"num_counted={number}, but {count} tokens"):
                call.results(mask, False, "mean", num_counted=number, backend=backend)
    with pytest.raises(TypeError, match=r"num_counted=1\.0"):
        call.results(mask, False, "mean", num_counted=1.0, backend=backend)


def test_the_number_is_of_tokens_not_of_upstream_gradients(
    backend: str, device: torch.device
) -> None:
    """An upstream 0, and a weight that underflows with its divisor, change no number."""
    # 32 columns: Triton cuts a row at 16-byte lines, so of 30 its sums' last bits hang on the place
    hidden, weight, teacher = (torch.randn(*s, device=device) for s in ((4, 8), (32, 8), (4, 32)))
    labels = torch.tensor([3, -100, 5, 7], device=device)
    weights = torch.tensor([1.0, 1.0, 1e-30, 1.0], device=device)
    upstream = torch.tensor([1.0, 1.0, 2.0, 0.0], device=device)
    grads = []
    for number in (None, 3):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        keywords = {"num_counted": number, "token_weights": weights, "backend": backend}
        args = (LMHead(*leaves), teacher, labels)
        kd_loss(*args, reduction="none", **keywords).backward(upstream)
        kd_loss(*args, normalizer=1e20, **keywords).backward()
        grads.append([x.grad for x in leaves])
    assert_same_bits(*grads)


@pytest.mark.parametrize("form", FORMS)
def test_where_a_graph_is_captured_all_are_multiplied(
    backend: str, device: torch.device, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of what does not count reaches a gradient."""
    call, mask = Call(form, torch.float32, device, True), MASKS["alternating"]
    for reduction in ("mean", "none"):
        want = call.results(mask, False, reduction, backend=backend)
        for module in (chunks, chunks.counted.__globals__):
            setter = monkeypatch.setattr if module is chunks else monkeypatch.setitem
            setter(module, "chosen", lambda _: False)
        got = call.results(mask, False, reduction, backend=backend)
        monkeypatch.undo()
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace Triton's interpreter")
def test_one_graph_for_any_number_of_them(backend: str) -> None:
    student, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    teacher, labels = LMHead(torch.randn(N, 16), torch.randn(V, 16)), torch.randint(V, (N,))

    def step(labels: Tensor) -> Tensor:
        return loss.kd_loss(
            LMHead(student, weight), teacher, labels, ce_weight=0.5, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in MASKS.values():
            y = labels.masked_fill(~mask, -100)
            for x in (student, weight):
                got, want = (torch.autograd.grad(f(y), x)[0] for f in (compiled, step))
                assert torch.equal(got, want)
            assert torch.equal(compiled(y), step(y))
