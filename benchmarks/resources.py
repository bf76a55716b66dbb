"""What the Triton kernels take on each GPU, from ahead-of-time compilation: no GPU needed.

    python -m benchmarks.resources           # the table for sm_90, every divergence
    python -m benchmarks.resources --all     # every target, dtype and flag (two hours on 2 cores)
    python -m benchmarks.resources --all --targets gfx942 --dtypes head --workers 2

It compiles what the launcher would compile (``config.plan`` and ``config.constants`` are shared)
and reads registers, spills and access widths out of the machine code. ``problems`` is the verdict
that the tests hold every kernel to. Run it from a checkout; without the repository root on
sys.path, as ``.venv/bin/python benchmarks/resources.py``.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedkd import divergences
from fusedkd.kernels.triton import config, launches, programs, sparse, sparse_ops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# student, teacher, gradient; the last is a head's chunk (ops.head_dtypes)
DTYPES = {
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "fp32": (FP32, FP32, FP32),
    "head": (FP32, FP32, BF16),
}
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
# Every launch of the table, but of the pieces only one count: it enters a kernel as the length of
# one tiny load.
LAUNCHES = tuple(entry.launch(1, 262144, 132) for entry in launches.TABLE)
TAILS = ("", "bucket", "drop")
FLAGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "all": {"metrics": True, "bent_s": True, "bent_t": True},
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    target: str
    dtype: str
    divergence: str
    launch: config.Launch
    stage: str
    flags: str = "plain"
    tail: str = ""  # "bucket" or "drop": against a teacher of K entries; "": against a dense one

    @property
    def backend(self) -> str:
        """ "cuda" or "hip"."""
        return TARGETS[self.target].backend


@dataclass(frozen=True)
class Report:
    """What came of it. Widths in bytes; the loops are those over a row, in the code's order."""

    job: Job
    registers: int
    budget: int  # per thread, for one program of that many warps to fit
    shared: int
    spilled: int
    calls: int
    loads: tuple[int, ...]  # narrowest global load of each loop, widest loops first
    stores: tuple[int, ...]
    cost: tuple[float, ...] = ()  # instructions per entry of the 16-byte loops
    special: tuple[float, ...] = ()  # of which on the special-function unit


def jobs(targets: Sequence[str], dtypes: Sequence[str], flags: Sequence[str]) -> Iterator[Job]:
    """Every kernel that a launch can choose."""
    for target, dtype in itertools.product(targets, dtypes):
        if dtype != "head":  # scales one tensor
            yield Job(target, dtype, "-", config.SCALE, "scale")
        for name, flag, launch in itertools.product(divergences.names(), flags, LAUNCHES):
            for tail in TAILS:
                for stage in _stages(dtype, name, flag, launch, tail):
                    yield Job(target, dtype, name, launch, stage, flag, tail)


def sample() -> list[Job]:
    """Few of them, but every divergence in every stage, and every target with every dtype and
    flag: then the divergence, the launch and the stage go round."""
    found = [
        Job("sm_90", "bf16", name, launch, stage)
        for name in divergences.names()
        for launch in LAUNCHES[2:]
        for stage in config.stages(_variant("bf16", name, "plain"), launch)
    ]
    # against K entries: every way through the sweeps (closed or not, bucket or not)
    found += [
        Job("sm_90", "bf16", name, launch, stage, "plain", tail)
        for name, tail in (("forward_kl", "bucket"), ("jsd", "bucket"), ("total_variation", "drop"))
        for launch in LAUNCHES[2:]
        for stage in _stages("bf16", name, "plain", launch, tail)
    ]
    # the one that needs the most registers
    found.append(Job("sm_100", "head", "forward_kl", LAUNCHES[2], "statistics", "all"))
    turn = itertools.product(TARGETS, DTYPES, FLAGS)
    for i, (target, dtype, flag) in enumerate(turn):
        name = divergences.names()[i % len(divergences.names())]
        launch = LAUNCHES[i % len(LAUNCHES)]
        for tail in ("", TAILS[1 + i % 2])[: 1 + (i % 3 == 0)]:
            stages = _stages(dtype, name, flag, launch, tail)
            found.append(Job(target, dtype, name, launch, stages[i // 4 % len(stages)], flag, tail))
        if flag == "plain" and dtype != "head":
            found.append(Job(target, dtype, "-", config.SCALE, "scale"))
    return found


def _variant(dtype: str, divergence: str, flags: str, tail: str = "") -> config.Variant:
    variant = config.Variant(*DTYPES[dtype], divergence, **FLAGS[flags])
    return replace(variant, teacher=variant.student, bent_t=False) if tail else variant


def _stages(
    dtype: str, divergence: str, flags: str, launch: config.Launch, tail: str
) -> tuple[str, ...]:
    variant = _variant(dtype, divergence, flags, tail)
    if tail:
        return sparse_ops.stages(variant, launch, tail == "bucket")
    return config.stages(variant, launch)


def source(job: Job) -> ASTSource:
    """What the launcher would hand to Triton's compiler."""
    if job.stage == "scale":
        return _scale_source(job)
    variant = _variant(job.dtype, job.divergence, job.flags, job.tail)
    kernel, constants = _kernel(job, variant)
    plan = constants["plan"]
    if not plan.metrics:
        constants["metrics"] = None
    if not plan.ce:
        constants["labels"] = None
    if job.stage == "whole":
        constants |= {"partial": None, "sums": None}
    acc = "fp64" if plan.acc == tl.float64 else "fp32"
    pointers = dict.fromkeys(("row_scale", "loss", "metrics"), f"*{acc}") | {"log_probs": "*fp64"}
    pointers |= {"labels": "*i64", "indices": "*i32", "partial": "*fp64", "sums": "*fp64"}
    pointers["held"] = f"*{NAMES[variant.student]}"
    for name in ("student", "teacher", "grad"):
        pointers[name] = f"*{NAMES[getattr(variant, name)]}"
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        known = "constexpr" if name in constants else pointers.get(name)
        signature[name] = known or parameter.annotation_type
    return ASTSource(kernel, signature, constants)


def _kernel(job: Job, variant: config.Variant) -> tuple[Any, dict[str, Any]]:
    """The kernel and its constants, as the launchers have them."""
    if job.tail:
        of = (variant, job.launch, job.stage, job.tail == "bucket", job.backend)
        return sparse.sparse_kernel, sparse_ops.constants(*of)
    return programs.row_kernel, config.constants(job.divergence, _plan(job))


def _plan(job: Job) -> config.Plan | None:
    """Of a row kernel."""
    if job.tail or job.stage == "scale":
        return None
    variant = _variant(job.dtype, job.divergence, job.flags)
    return config.plan(variant, job.launch, job.stage, job.backend)


def _scale_source(job: Job) -> ASTSource:
    dtype = DTYPES[job.dtype][0]
    signature = {p.name: p.annotation_type for p in programs.scale_kernel.params}
    signature |= {"x": f"*{NAMES[dtype]}", "factor": "*fp32", "plan": "constexpr"}
    constants = {"plan": config.scale_plan(dtype, job.backend)}
    return ASTSource(programs.scale_kernel, signature, constants)


def compile_(job: Job, kernel: ASTSource | None = None) -> Report:
    """Compile the job's kernel, or another one in its place, and read the result."""
    options = config.options(job.launch, job.backend, _plan(job))
    compiled = triton.compile(kernel or source(job), target=TARGETS[job.target], options=options)
    return read(compiled, job)


def read(compiled: Any, job: Job) -> Report:
    """Registers, spills, calls and the width of the accesses in the loops of a compiled kernel."""
    if job.backend == "hip":
        return _read_hip(compiled, job)
    return _read_cuda(compiled, job)


# --------------------------------------------------------------------------------------------------
# NVIDIA


def _read_cuda(compiled: Any, job: Job) -> Report:
    usage, sass = (
        _dump(compiled.asm["cubin"], "--dump-resource-usage"),
        _dump(compiled.asm["cubin"], "-sass"),
    )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loops = list(_loops_sass(sass))
    wide = [loop for loop in loops if 16 in _narrowest([loop], "LDG", cursor=bool(job.tail))]
    entries = _entries_per_thread(job)
    return Report(
        job=job,
        registers=found["REG"],
        budget=min(config.most_registers(_plan(job)), 65536 // (32 * job.launch.warps)),
        shared=compiled.metadata.shared,
        spilled=found["STACK"] + found["LOCAL"],
        calls=len(re.findall(r"\bcall", compiled.asm["ptx"])),
        loads=_narrowest(loops, "LDG", cursor=bool(job.tail)),
        stores=_narrowest(loops, "STG"),
        cost=tuple(len(loop) / entries for loop in wide),
        special=tuple(sum("MUFU" in line for line in loop) / entries for loop in wide),
    )


def _dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, what, file.name], capture_output=True, text=True, check=True
        ).stdout


def _loops_sass(sass: str) -> Iterator[list[str]]:
    """The loops (backward branches), each a list of instructions less those of loops in it."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"BRA(?:\.\w+)* (?:`\(\S+\)|\S+, )?0x([0-9a-f]+)", text)
        if jump and (start := place.get(int(jump[1], 16), i)) < i:
            spans.append((start, i))
    for own in _own_parts(spans):
        yield [lines[i][1] for i in own]


def _own_parts(spans: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Of each loop the lines that are in no loop within it."""
    merged: dict[int, int] = {}
    for start, end in spans:  # a loop with several exits jumps back more than once
        merged[start] = max(end, merged.get(start, end))
    loops = list(merged.items())
    for a in loops:
        inner = [b for b in loops if b != a and a[0] <= b[0] and b[1] <= a[1]]
        yield [i for i in range(a[0], a[1] + 1) if not any(b[0] <= i <= b[1] for b in inner)]


def _widths_sass(loop: list[str], kind: str) -> list[int]:
    """Bytes of every global access (LDG, STG) or copy to shared memory (LDGSTS) in a loop."""
    found = []
    for text in loop:
        match = re.search(rf"\b{kind}(STS)?(\.\S+)", text)
        if match and not (kind == "STG" and match[1]):
            bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", match[2])
            found.append(int(bits[1]) // 8 if bits else 4)
    return found


def _narrowest(loops: list[list[str]], kind: str, cursor: bool = False) -> tuple[int, ...]:
    """Of the accesses of each loop, widest loops first; ``cursor``: without the one id that a tile
    is compared with (4 bytes; on AMD a scalar load, which is none of these)."""
    widths = []
    for loop in loops:
        found = _widths_sass(loop, kind)
        if cursor and 16 in found and 4 in found:
            found.remove(4)
        widths += [min(found)] if found else []
    return tuple(sorted(widths, reverse=True))


def _entries_per_thread(job: Job) -> int:
    items = DTYPES[job.dtype][:1] if job.stage == "scale" else DTYPES[job.dtype]
    return 16 // min(dtype.itemsize for dtype in items) * job.launch.unroll


# --------------------------------------------------------------------------------------------------
# AMD


def _read_hip(compiled: Any, job: Job) -> Report:
    text = compiled.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
    loops = list(_loops_gcn(text))
    wide = [loop for loop in loops if _narrowest_gcn([loop], "load") == (16,)]
    entries = _entries_per_thread(job)
    return Report(
        job=job,
        registers=found["vgpr_count"],
        budget=min(
            512, 512 // -(-config.options(job.launch, "hip")["num_warps"] // 4)
        ),  # 4 SIMDs with 512 each
        shared=compiled.metadata.shared,
        # SGPRs spill to lanes of a VGPR, which is no memory; scratch is what a spill costs.
        spilled=found["vgpr_spill_count"] + found["private_segment_fixed_size"],
        calls=len(re.findall(r"s_swappc|s_call", text)),
        loads=_narrowest_gcn(loops, "load"),
        stores=_narrowest_gcn(loops, "store"),
        cost=tuple(sum(bool(_OP_GCN.match(line)) for line in loop) / entries for loop in wide),
        special=tuple(
            sum(bool(_SPECIAL_GCN.match(line)) for line in loop) / entries for loop in wide
        ),
    )


_OP_GCN = re.compile(r"\s+[a-z]+_\w+")
_SPECIAL_GCN = re.compile(r"\s+v_(exp|log|rcp)_")


def _loops_gcn(text: str) -> Iterator[list[str]]:
    lines = text.splitlines()
    place = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        jump = re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if jump and (start := place.get(jump[1], i)) < i:
            spans.append((start, i))
    for own in _own_parts(spans):
        yield [lines[i] for i in own]


def _narrowest_gcn(loops: list[list[str]], kind: str) -> tuple[int, ...]:
    widths = []
    for loop in loops:
        found = re.findall(rf"(?:global|buffer|flat)_{kind}_(\w+)", "\n".join(loop))
        if found:
            widths.append(min(_bytes_gcn(name) for name in found))
    return tuple(sorted(widths, reverse=True))


def _bytes_gcn(name: str) -> int:
    if name.startswith("dword"):
        return 4 * int(name[6:] or 1)
    return 1 if "byte" in name else 2


# --------------------------------------------------------------------------------------------------
# the verdict and the table


def problems(report: Report) -> list[str]:
    """What is wrong with a kernel; nothing for a good one."""
    stage, found = report.job.stage, []
    sweeps = _sweeps(report.job) if stage == "whole" else 1
    if report.spilled:
        found.append(f"{report.spilled} bytes of registers spilled")
    if report.registers > report.budget:
        found.append(f"{report.registers} registers, {report.budget} fit")
    if report.calls:
        found.append(f"{report.calls} calls")
    if report.loads[:sweeps] != (16,) * sweeps:
        found.append(f"loads of {report.loads} bytes, expected {sweeps} loops of 16 only")
    # One loop for the gradient, one or more (unrolled) for the zeros of a row that does not count.
    loops = {"whole": 2, "gradient": 2, "scale": 1}.get(stage, 0)
    if report.stores[:loops] != (16,) * loops:
        found.append(f"stores of {report.stores} bytes, expected {loops} loops of 16 only")
    return found


def _sweeps(job: Job) -> int:
    """Of a program that does a whole row: what would be launches if the row were split."""
    split = replace(job.launch, pieces=2)
    return len(_stages(job.dtype, job.divergence, job.flags, split, job.tail))


def _line(report: Report) -> str:
    job, launch = report.job, report.job.launch
    cost = " ".join(f"{c:.0f}/{s:.1f}" for c, s in zip(report.cost, report.special, strict=True))
    return (
        f"{job.target:7s}{job.dtype:5s}{job.divergence:17s}{job.tail or 'dense':7s}"
        f"{job.stage:11s}{job.flags:6s}"
        f"{launch.warps:3d} x {launch.unroll}{report.registers:5d}/{report.budget:3d}"
        f"{report.shared:7d}{report.spilled:5d}{report.calls:4d}"
        f"  {report.loads[0] if report.loads else '-':>3}"
        f"{report.stores[0] if report.stores else '-':>5}   {cost:24s}{'; '.join(problems(report))}"
    )


HEADER = (
    "target dtype divergence      tail   stage     flags  warps regs/budget shared spill call load"
    " store instructions/special per entry, by sweep"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every target, dtype and flag")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="these alone")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="these alone")
    parser.add_argument("--flags", nargs="+", choices=FLAGS, help="these alone")
    parser.add_argument("--workers", type=int, default=1, help="processes to compile in")
    arguments = parser.parse_args()
    everything = (TARGETS, DTYPES, FLAGS) if arguments.all else (("sm_90",), ("bf16",), ("plain",))
    given = (arguments.targets, arguments.dtypes, arguments.flags)
    axes = [list(chosen or axis) for chosen, axis in zip(given, everything, strict=True)]
    bad = 0
    print(HEADER)
    with ProcessPoolExecutor(arguments.workers) as pool:
        for report in pool.map(compile_, jobs(*axes)):
            print(_line(report), flush=True)
            bad += bool(problems(report))
    print(f"{bad} of these break a bound." if bad else "All within bounds.")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
