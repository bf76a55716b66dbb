"""How a head's rows are cut: what the plan says is what is multiplied and held, and no number of
rows or bytes changes the answer."""

from __future__ import annotations

import gc
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import budget
import pytest
import torch
from oracle import Case
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fusedkd import LMHead, SparseTeacher, gradients, kd_loss
from fusedkd import backends as all_backends
from fusedkd.backends import CustomRows
from fusedkd.chunks import run
from fusedkd.cut import Cut, chunk_budget
from fusedkd.divergences import forward_kl
from fusedkd.inputs import Inputs, Plan, Wanted
from fusedkd.kernels import RowCall, Rows
from fusedkd.spec import LossSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GIB = 1 << 30
QWEN = 151936


class Held:
    """Bytes of the logits and of their gradient that are alive, as ``empty`` hands them out."""

    def __init__(self, columns: int, empty: Any) -> None:
        self.columns, self.make, self.peak = columns, empty, 0
        self.live: list[tuple[StorageWeakRef, int]] = []

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        made: Tensor = self.make(shape, dtype=dtype, device=device)
        if shape[-1] == self.columns:
            self.live.append((StorageWeakRef(made.untyped_storage()), made.nbytes))
        if INTERPRETED:  # which leaves circles behind
            gc.collect()
        self.live = [(storage, size) for storage, size in self.live if not storage.expired()]
        self.peak = max(self.peak, sum(size for _, size in self.live))
        return made


class OnPaper(CustomRows):
    """A GPU's loop on tensors without memory: which products it makes, and what it holds."""

    def __init__(self, columns: int, logits: torch.dtype, gradient: torch.dtype) -> None:
        self.inner = None
        self.dtypes = logits, gradient
        self.held = Held(columns, torch.empty)
        self.empty = self.held.empty
        self.products: Counter[tuple[int, ...]] = Counter()
        self.results: list[Tensor] = []

    def head_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        return self.dtypes

    def mm_(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        self.products[(*a.shape, b.shape[1], accumulate)] += 1

    def scale_(self, grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
        """Nothing to do."""

    def rows(self, call: RowCall) -> Rows:
        results = call.results()
        results.loss.zero_()
        return results


def on_paper(
    n: int,
    dtype: torch.dtype,
    logits: torch.dtype,
    wanted: Wanted,
    chunk_bytes: int = 2 * GIB,
    late: bool = False,
) -> OnPaper:
    """n tokens x (4,096 + 2,048) x 151,936, all of which count."""

    def head(h: int) -> tuple[Tensor, Tensor, None]:
        return *(torch.empty(rows, h, dtype=dtype, device="meta") for rows in (n, QWEN)), None

    paper = OnPaper(QWEN, logits, dtype)
    inputs = Inputs(*head(4096), *head(2048), *[None] * 4, torch.ones(n))
    plan = Plan(wanted, backend=paper, chunk_bytes=chunk_bytes, num_counted=n, late=late)
    paper.results = run(inputs, LossSpec(forward_kl(), QWEN), plan)[1:]
    return paper


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpus_products_and_bytes(dtype: torch.dtype) -> None:
    """8,192 tokens in 2 GiB: 16 chunks of logits, and two products each for dh and dW."""
    paper = on_paper(8192, dtype, torch.float32, Wanted(True, True, False, False))
    assert paper.products == {
        (512, 4096, QWEN, False): 16,
        (512, 2048, QWEN, False): 16,
        (4096, QWEN, 4096, False): 2,
        (QWEN, 4096, 4096, False): 1,
        (QWEN, 4096, 4096, True): 1,
    }
    assert GIB < paper.held.peak <= 2 * GIB
    frozen = on_paper(8192, dtype, torch.float32, Wanted(True, False, False, False))
    assert frozen.products == {k: v for k, v in paper.products.items() if k[0] != QWEN}
    evaluated = on_paper(8192, dtype, torch.float32, Wanted(False, False, False, True))
    assert evaluated.products == {k: v for k, v in paper.products.items() if k[0] == 512}
    assert evaluated.held.peak == 512 * QWEN * 8


def test_a_gradient_that_fits_is_one_product() -> None:
    paper = on_paper(4096, torch.bfloat16, torch.float32, Wanted(True, True, False, False))
    assert paper.products[4096, QWEN, 4096, False] == paper.products[QWEN, 4096, 4096, False] == 1
    assert not any(accumulate for *_, accumulate in paper.products)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_that_fits_is_kept_instead_of_fp32_sums(dtype: torch.dtype) -> None:
    """The backward makes dW of it, piece by piece, where that takes no more memory."""
    wanted = Wanted(True, True, False, False)
    paper = on_paper(4096, dtype, torch.float32, wanted, late=True)
    assert not any(rows == QWEN for rows, *_ in paper.products)
    shapes = [tuple(x.shape) for x in paper.results]
    powers = [()] if dtype == torch.float16 else []
    assert shapes == [(4096, 4096), (4096, QWEN), (4096, 4096), *powers]
    for n, logits in ((8192, torch.float32), (4096, dtype)):  # two blocks; dW needs no other dtype
        paper = on_paper(n, dtype, logits, wanted, late=True)
        assert [tuple(x.shape) for x in paper.results] == [(n, 4096), (QWEN, 4096)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dw_in_pieces(
    backend: str, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, with any upstream gradient; as often as it is asked for."""
    module = all_backends.load(backend)
    monkeypatch.setattr(gradients, "PIECE_BYTES", {"cpu": 7 * H * 4, "cuda": 7 * H * 4})
    made, empty = [], module.empty

    def spy(shape: tuple[int, ...], **options: Any) -> Tensor:
        made.append((tuple(shape), options["dtype"]))
        return empty(shape, **options)

    student, teacher = leaves(12, dtype, device)
    names, options = ["weight"], {"ce_weight": 0.5, "reduction": "mean"}
    upstream = torch.tensor(0.3, device=device)
    heads = LMHead(student[0].detach(), *student[1:]), LMHead(*teacher)
    labels = torch.arange(12, device=device) - 1
    case = Case(*heads, labels.masked_fill(labels < 0, -100), options, upstream, names)
    with monkeypatch.context() as patch:
        patch.setattr(module, "empty", spy)
        budget.check(case, backend)
    logits, kept = module.head_dtypes(dtype)
    wide = any(((V, H), x) in made for x in (torch.float32, torch.float64))
    assert wide == (kept == logits)
    loss = kd_loss(*heads, case.labels, **options, backend=backend)
    several = [
        torch.autograd.grad(loss, student[1], upstream, retain_graph=i < 2)[0] for i in range(3)
    ]
    assert torch.equal(several[0], several[1]) and torch.equal(several[1], several[2])


@pytest.mark.parametrize("wanted", [Wanted(True, True, False, False), Wanted(*(False,) * 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_bytes", [1, 10 * QWEN, 1 << 22, 1 << 27, 7 * GIB])
def test_bytes_are_bounded(dtype: torch.dtype, wanted: Wanted, chunk_bytes: int) -> None:
    """At least one row is held."""
    paper = on_paper(300, dtype, torch.float32, wanted, chunk_bytes)
    row = QWEN * (8 + dtype.itemsize % 4 * wanted.any_gradient)
    assert paper.held.peak <= max(chunk_bytes, row)


def test_cuts() -> None:
    """Whatever the sizes: within the bytes, none too few, whole tiles where there are many."""
    options = torch.Generator().manual_seed(0)
    for _ in range(2000):
        length, size, columns = (2 ** (x * torch.rand((), generator=options)) for x in (15, 33, 18))
        logits, gradient = ((0, 4), (8, 2), (8, 0), (4, 4), (4, 2), (12, 8))[
            int(torch.randint(6, (), generator=options))
        ]
        length, size, columns = int(length), int(size), int(columns)
        cut = Cut.of(length, size, logits * columns, gradient * columns)
        assert 1 <= cut.logits <= cut.gradient <= length
        assert cut.bytes == (cut.logits * logits + cut.gradient * gradient) * columns
        assert cut.bytes <= max(size, (logits + gradient) * columns)
        for rows, whole in ((cut.logits, cut.gradient), (cut.gradient, length)):
            assert rows == whole or rows < 256 or rows % 128 == 0
        if gradient and cut.gradient < length // 2 > 512:  # another tile would not have fitted
            assert cut.bytes + 128 * gradient * columns > size / 3


@pytest.mark.parametrize("total, expected", [(80, 2 * GIB), (64, 2 * GIB), (24, 3 * GIB // 4)])
def test_the_default_is_one_number_for_a_device(
    total: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    properties = SimpleNamespace(total_memory=total * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert chunk_budget(None, gpu) == expected
    assert chunk_budget(None, gpu, shared=True) == GIB  # ranks may have other GPUs
    assert chunk_budget(None, cpu) == chunk_budget(None, cpu, shared=True) == GIB // 2
    assert chunk_budget(7, gpu) == chunk_budget(7, cpu, shared=True) == 7


V, H = 61, 8


def leaves(n: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Student's hidden states, weight and bias; the teacher's."""
    make = torch.Generator().manual_seed(n)
    student, teacher = (
        [torch.randn(*s, generator=make).to(device, dtype) for s in ((n, h), (V, h), (V,))]
        for h in (H, 5)
    )
    return [x.requires_grad_() for x in student], teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [19] if INTERPRETED else [1, 127, 128, 129, 513])
def test_no_size_changes_the_answer(
    backend: str,
    device: torch.device,
    n: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From one byte up: within the budget of what eager torch loses, never above the bytes, and
    twice the same bits."""
    module = all_backends.load(backend)
    student, teacher = leaves(n, dtype, device)
    labels = torch.arange(n, device=device) % V
    logits, gradient = (x.itemsize for x in module.head_dtypes(dtype))
    row = V * (2 * logits + (gradient if gradient != logits else 0))
    for chunk_bytes in (5 * row + 3,) if INTERPRETED else (1, row, 5 * row + 3, 100 * row, None):
        held = Held(V, module.empty)
        options = {"chunk_bytes": chunk_bytes, "ce_weight": 0.5, "reduction": "mean"}
        names = ["hidden", "weight", "bias"]
        case = Case(LMHead(*student), LMHead(*teacher), labels, options, None, names)
        with monkeypatch.context() as patch:
            patch.setattr(module, "empty", held.empty)
            budget.check(case, backend)
        assert held.peak <= max(chunk_bytes or GIB // 2, row)
        once, again = (
            torch.autograd.grad(
                kd_loss(case.student, case.teacher, labels, **options, backend=backend), student
            )
            for _ in range(2)
        )
        assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", ["head, sparse", "head, dense", "dense, head", "frozen, head"])
def test_one_head_alone_is_bounded_too(
    backend: str,
    device: torch.device,
    form: str,
    reduction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = all_backends.load(backend)
    n, chunk_bytes = 10 if INTERPRETED else 40, 3 * V * 16 + 5
    (hidden, weight, _), parts = leaves(n, torch.float32, device)
    teacher: Any = LMHead(*parts)
    if form.endswith("sparse"):
        log_probs, ids = torch.randn(n, V, device=device).log_softmax(-1).topk(4)
        teacher = SparseTeacher(ids, log_probs)
    elif form.endswith("dense"):
        teacher = torch.randn(n, V, device=device)
    student: Any = LMHead(hidden, weight.detach() if form.startswith("frozen") else weight)
    wanted = [hidden] if form.startswith("frozen") else [hidden, weight]
    if form.startswith("dense"):
        wanted = [torch.randn(n, V, device=device, requires_grad=True)]
        student = wanted[0]
    labels = torch.arange(n, device=device).masked_fill(
        torch.arange(n, device=device) % 3 == 0, -100
    )

    def grads(**keywords: Any) -> tuple[Tensor, ...]:
        keywords |= {"reduction": reduction, "backend": backend}
        return torch.autograd.grad(kd_loss(student, teacher, labels, **keywords).sum(), wanted)

    whole = grads()
    held = Held(V, module.empty)
    with monkeypatch.context() as patch:
        patch.setattr(module, "empty", held.empty)
        cut = grads(chunk_bytes=chunk_bytes)
    own = n * V * 4 if form.startswith("dense") else 0  # the gradient itself
    assert held.peak <= chunk_bytes + (2 if reduction == "none" else 1) * own
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)
