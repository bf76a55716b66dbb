"""Instructions an entry of eight kernels, held to bounds; and that the counting is right."""
# ruff: noqa: E402 (triton may be missing)

from __future__ import annotations

import os
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="triton is for Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process compiles nothing", allow_module_level=True)

import triton.language as tl
from triton.compiler import ASTSource

from fusedkd.benchmarks import counted, machine_code, roofline, sass
from fusedkd.benchmarks.counted import BOUNDS, Bound
from fusedkd.benchmarks.kernel_jobs import TARGETS
from fusedkd.benchmarks.roofline import Counts, Gpu
from fusedkd.benchmarks.sass import Sweep


def _id(bound: Bound) -> str:
    parts = (bound.divergence, bound.dtype, bound.tail, "joint" * bound.joint)
    return "-".join(filter(None, parts))


@pytest.mark.parametrize("bound", BOUNDS, ids=_id)
def test_within_bounds(bound: Bound) -> None:
    """Where a kernel costs less by now, its bound is lowered with it."""
    counts = counted.counts(bound.divergence, bound.dtype, bound.tail, bound.joint)
    for what in ("instructions", "special", "spilled"):
        value, limit = getattr(counts, what), getattr(bound, what)
        assert value <= limit, f"{what}: {value:.1f}, at most {limit}: {counts}"


# ----------------------------------------------------------------------------------------------
# two kernels counted by hand


@triton.jit
def _scale(x, y, f, tiles, LANES: tl.constexpr):
    """8 entries: 1 load, 8 widenings, 8 FMUL, 4 roundings, 1 store, and the loop of 4 to 12."""
    at = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for tile in range(tiles):
        z = tl.load(x + tile * LANES * 8 + at).to(tl.float32) * f
        tl.store(y + tile * LANES * 8 + at, z.to(tl.bfloat16))


@triton.jit
def _power(x, y, f, tiles, LANES: tl.constexpr):
    """4 entries: 1 load, 4 FMUL, 4 MUFU, 4 FADD, and the loop of 3 to 10."""
    at = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    total = tl.zeros([LANES, 4], tl.float32)
    for tile in tl.range(0, tiles, loop_unroll_factor=1):
        total += tl.exp2(tl.load(x + tile * LANES * 4 + at) * f)
    tl.store(y + at, total)


BY_HAND = [(_scale, "bf16", 8, 2, 26, 34, 0), (_power, "fp32", 4, 4, 16, 23, 4)]


@pytest.mark.parametrize("kernel, kind, entries, size, least, most, special", BY_HAND)
def test_counts_as_a_person_does(kernel, kind, entries, size, least, most, special) -> None:
    signature = dict.fromkeys("xy", f"*{kind}") | {"f": "fp32", "tiles": "i32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    source = ASTSource(kernel, {**signature, "LANES": "constexpr"}, {"LANES": 256}, aligned)
    made = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 8})
    found = sass.sweeps(sass.listing(machine_code.sass(made)), size, size)
    sweep = min(found, key=lambda sweep: sweep.instructions)
    assert least <= sweep.instructions * entries <= most
    assert sweep.special * entries == special
    assert sweep.writes == (kernel is _scale) and sweep.read == size
    fma = sweep.pipes["fma"] * entries
    assert fma == 8, fma  # FMUL, and FADD


# ----------------------------------------------------------------------------------------------
# the model


def _sweep(fma: float = 5.0, special: float = 0.0, writes: bool = False) -> Sweep:
    pipes = {"fma": fma, "special": special}
    turn = round(16 * sum(pipes.values()))
    return Sweep(writes, 16.0, pipes, 4.0, 2.0 * writes, 400, turn)


def test_the_model_names_what_limits() -> None:
    gpu = Gpu()
    clocks = gpu.processors * gpu.hertz * 6 / gpu.copy  # that 6 bytes an entry take, of an SM

    def limit(*sweeps: Sweep, gpu: Gpu = gpu) -> tuple[str, float]:
        counts = Counts(list(sweeps), registers=128, warps=16, spilled=0)
        assert counts.programs == 1
        share = roofline.share(counts, gpu)
        return share.limit, share.share

    few, last = _sweep(), _sweep(writes=True)
    assert limit(few, last, gpu=replace(gpu, l2_bytes=1e6))[0] == "memory"
    assert limit(few, last, gpu=replace(gpu, l2=1e12)) == (
        "L2",
        pytest.approx(1e12 / gpu.copy * 0.6),
    )
    many = _sweep(fma=100.0)
    issued = 0.9 * clocks * 128 / (many.instructions + last.instructions)
    assert limit(many, last) == ("issue", pytest.approx(issued, rel=1e-2))
    special = _sweep(special=20.0)
    assert limit(special, last) == ("special", pytest.approx(clocks * 16 / 20, rel=5e-2))
    assert limit(few, last, gpu=replace(gpu, copy=1e12, l2_bytes=1e9))[1] == 1.0
