"""What the Triton kernels compile to for each GPU, without one: registers, spills, access widths.

``python -m benchmarks.resources --all`` is the full product (two hours); ``make test-slow`` has a
sample of it that covers every divergence in every stage and every target with every dtype, and
``make test`` a third of that.
"""
# ruff: noqa: E402 (triton may be missing)

from __future__ import annotations

import os
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="triton is for Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process compiles nothing", allow_module_level=True)

import triton.language as tl
from own_divergences import random_formula
from own_rules import of_everything
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fusedkd import divergences
from fusedkd.benchmarks import counted, kernel_jobs, resources
from fusedkd.kernels.triton import config, ops, programs


def _id(job: resources.Job) -> str:
    return "-".join(
        (job.target, job.dtype, job.divergence, job.tail or "dense", job.stage, job.flags)
    )


JOBS = [
    pytest.param(job, id=_id(job), marks=[pytest.mark.slow] if i % 3 else [])
    for i, job in enumerate(resources.sample())
]


@pytest.mark.parametrize("job", JOBS)
def test_within_bounds(job: resources.Job) -> None:
    report = resources.compile_(job)
    assert not resources.problems(report), report


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.filterwarnings("ignore:random_")
def test_formulas_of_ones_own(seed: int) -> None:
    """Random ones, of up to 150 operations an entry: many rows on every target, few rows."""
    own = divergences.custom(random_formula(seed))(a=0.4)
    job = counted.job(own.key)
    few = [
        replace(job, launch=resources.LAUNCHES[2], stage=stage)
        for stage in ("statistics", "middle", "gradient")
    ]
    for one in (*(replace(job, target=target) for target in resources.TARGETS), *few):
        report = resources.compile_(one)
        assert not resources.problems(report), report


@pytest.mark.slow
@pytest.mark.parametrize("target", resources.TARGETS)
def test_row_rules(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a row: as many instructions an entry as with metrics alone."""
    ruled = {"metrics": True, "rule": of_everything().key}
    monkeypatch.setitem(kernel_jobs.FLAGS, "ruled", ruled)  # type: ignore[arg-type]
    monkeypatch.setitem(kernel_jobs.FLAGS, "metrics", {"metrics": True})
    for divergence, tail in (("forward_kl", ""), ("jsd", "bucket")):
        launch = resources.LAUNCHES[-1]
        job = resources.Job(target, "bf16", divergence, launch, "whole", "ruled", tail)
        report, plain = (resources.compile_(replace(job, flags=x)) for x in ("ruled", "metrics"))
        assert not resources.problems(report), report
        assert report.cost == pytest.approx(plain.cost, rel=0.02)


# ----------------------------------------------------------------------------------------------
# and the verdict can be bad


@triton.jit
def _masked(x, out, columns: tl.int32, BLOCK: tl.constexpr):
    """What one writes first. Rows of 50,257 start anywhere, so every load is of 2 bytes."""
    row = x + tl.program_id(0).to(tl.int64) * columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(row + at, mask=at < columns, other=-float("inf")).to(tl.float32))
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _at_once(x, t, grad, columns: tl.int32, BLOCK: tl.constexpr):
    """A row in one block: 65,536 columns are 128 registers per thread and side."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    s = tl.load(x + row + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    t = tl.load(t + row + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    q, p = tl.exp(s - tl.max(s, axis=0)), tl.exp(t - tl.max(t, axis=0))
    g = q / tl.sum(q, axis=0) - p / tl.sum(p, axis=0)
    tl.store(grad + row + at, g.to(tl.bfloat16), mask=at < columns)


def _problems(kernel: triton.JITFunction, pointers: dict[str, str], block: int, stage: str) -> str:
    job = resources.Job("sm_90", "bf16", "forward_kl", config.Launch(1, 16, 1), stage)
    signature = {**pointers, "columns": "i32", "BLOCK": "constexpr"}
    source = ASTSource(kernel, signature, {"BLOCK": block})
    return "; ".join(resources.problems(resources.compile_(job, source)))


def test_a_masked_loop_is_reported() -> None:
    found = _problems(_masked, {"x": "*bf16", "out": "*fp32"}, 4096, "statistics")
    assert "loads of (2,) bytes" in found


def test_a_huge_block_is_reported() -> None:
    pointers = dict.fromkeys(("x", "t", "grad"), "*bf16")
    found = _problems(_at_once, pointers, 65536, "gradient")
    assert "bytes of registers spilled" in found and "loads of" in found


# ----------------------------------------------------------------------------------------------
# one kernel per structure


def _key(**changes: object) -> list[object]:
    """What Triton would look a compiled kernel up by, for a call with these arguments."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernel = programs.row_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    x = ops.torch.zeros(64)
    tensors = dict.fromkeys(programs.POINTERS, x) | {"metrics": None}
    sizes = dict.fromkeys(programs.SIZES, 17)
    numbers = {p.name: 0.5 for p in kernel.params} | sizes | tensors | {"plan": None}
    return bind(**{**numbers, **changes})[1]


@pytest.mark.skipif(not hasattr(programs.row_kernel, "signature"), reason="interpreted")
def test_no_number_compiles_a_kernel() -> None:
    """Neither sizes of 1 or of multiples of 16, nor any hyper-parameter, nor an offset."""
    plain = _key()
    for name in programs.SIZES:
        assert _key(**{name: 1}) == _key(**{name: 16}) == plain, name
    own = ("weight", "constant", "own_0", "own_6")
    for name in (
        *own,
        "inverse_s",
        "kd_scale",
        "a",
        "b",
        "own_3",
        "rule_0",
        "ce_weight",
        "smoothing",
        "z_weight",
    ):
        assert _key(**{name: 1.0}) == _key(**{name: 0.0}) == plain, name
    for name in set(programs.POINTERS) - {"metrics"}:
        assert _key(**{name: ops.torch.zeros(64)[1:]}) == plain, name
    assert _key(metrics=ops.torch.zeros(7)) != plain
