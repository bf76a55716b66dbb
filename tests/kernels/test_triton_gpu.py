"""What only a GPU can show: no synchronisation, capture in a graph, widening products."""

from __future__ import annotations

import pytest
import torch

from fusedkd import LMHead, backends, kd_loss, kd_loss_and_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = {"many rows": (300, 5003), "a row in pieces": (2, 40001)}


def _dense(n: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = (torch.randn(n, v, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(v, (n,), device="cuda")


def _heads(n: int, v: int) -> tuple[LMHead, LMHead, torch.Tensor]:
    def head(width: int, grad: bool) -> LMHead:
        parts = (torch.randn(s, width, device="cuda", dtype=torch.bfloat16) for s in (n, v))
        return LMHead(*(x.requires_grad_(grad) for x in parts))

    return head(64, True), head(32, False), torch.randint(v, (n,), device="cuda")


def _step(student, teacher, labels) -> list[torch.Tensor]:
    options = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.5, "chunk_bytes": 1 << 22}
    if isinstance(student, LMHead):
        options["num_counted"] = len(labels)  # without it the host asks the GPU, once a call
    loss, metrics = kd_loss_and_metrics(student, teacher, labels, **options)
    leaves = [student] if isinstance(student, torch.Tensor) else [student.hidden, student.weight]
    return [loss.detach(), metrics.kd, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("form", [_dense, _heads])
@pytest.mark.parametrize("case", CASES)
def test_the_host_never_waits(form, case: str) -> None:
    inputs = form(*CASES[case])
    _step(*inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", [_dense, _heads])
@pytest.mark.parametrize("case", CASES)
def test_a_graph_captures_it(form, case: str) -> None:
    inputs = form(*CASES[case])
    want = _step(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _step(*inputs)
    graph.replay()
    for got, exact in zip(found, want, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_are_summed_in_fp32(accumulate: bool) -> None:
    a = torch.randn(96, 200, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(72, 200, device="cuda", dtype=torch.bfloat16).T
    out = torch.randn(96, 72, device="cuda")
    want = a.double() @ b.double() + (out.double() if accumulate else 0)
    backends.load("triton").mm_(out, a, b, accumulate)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)


def test_no_temperature_compiles_a_kernel() -> None:
    from fusedkd.kernels.triton import programs

    inputs = _dense(40, 3001)
    kd_loss(*inputs, ce_weight=0.5)
    count = sum(len(cache[0]) for cache in programs.row_kernel.device_caches.values())
    for temperature in (1.0, 2.0, 3.0, 0.7):
        kd_loss(*inputs, ce_weight=0.25, temperature=temperature)
    assert count == sum(len(cache[0]) for cache in programs.row_kernel.device_caches.values())
