"""What the machine code of a compiled Triton kernel takes and does, for NVIDIA and for AMD."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Loop(NamedTuple):
    """A loop without those in it."""

    instructions: int
    special: int  # of them on the special-function unit
    loads: list[int]  # bytes of each access to global memory
    stores: list[int]


class Code(NamedTuple):
    """Of one kernel; the loops in the code's order."""

    registers: int  # of a thread
    spilled: int  # bytes
    calls: int
    loops: list[Loop]


def narrowest(widths: list[list[int]]) -> tuple[int, ...]:
    """Of the accesses of each loop that has any; widest loops first."""
    return tuple(sorted(map(min, filter(None, widths)), reverse=True))


def nvidia(compiled: Any) -> Code:
    """By what cuobjdump says, which comes with triton."""
    usage, sass_ = _dump(compiled.asm["cubin"], "--dump-resource-usage"), sass(compiled)
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass_, re.M)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    jumps = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"BRA(?:\.\w+)* (?:`\(\S+\)|\S+, )?0x([0-9a-f]+)", text)
        if jump:
            jumps.append((place.get(int(jump[1], 16), i), i))
    calls = len(re.findall(r"\bcall", compiled.asm["ptx"]))
    loops = [_loop_sass([lines[i][1] for i in body]) for body in _bodies(jumps)]
    return Code(sizes["REG"], sizes["STACK"] + sizes["LOCAL"], calls, loops)


def sass(compiled: Any) -> str:
    """Its disassembly."""
    return _dump(compiled.asm["cubin"], "-sass")


def _dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, what, file.name], capture_output=True, text=True, check=True
        ).stdout


def _loop_sass(lines: list[str]) -> Loop:
    widths: dict[str, list[int]] = {"LDG": [], "STG": []}
    for text in lines:
        access = re.search(r"\b(?:(LDG)(?:STS)?|(STG))(\.\S+)", text)  # LDGSTS: to shared memory
        if access:
            bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", access[3])
            widths[access[1] or access[2]].append(int(bits[1]) // 8 if bits else 4)
    return Loop(len(lines), sum("MUFU" in text for text in lines), *widths.values())


def amd(compiled: Any) -> Code:
    """By the assembly."""
    text = compiled.asm["amdgcn"]
    sizes = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
    lines = text.splitlines()
    place = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    jumps = []
    for i, line in enumerate(lines):
        if jump := re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line):
            jumps.append((place.get(jump[1], i), i))
    # SGPRs spill to lanes of a VGPR, which is no memory; scratch is what a spill costs.
    spilled = sizes["vgpr_spill_count"] + sizes["private_segment_fixed_size"]
    calls = len(re.findall(r"s_swappc|s_call", text))
    loops = [_loop_gcn([lines[i] for i in body]) for body in _bodies(jumps)]
    return Code(sizes["vgpr_count"], spilled, calls, loops)


def _loop_gcn(lines: list[str]) -> Loop:
    lines = [line for line in lines if re.match(r"\s+[a-z]+_\w+", line)]
    loads, stores = (
        [_bytes_gcn(m[1]) for m in re.finditer(rf"(?:global|buffer|flat)_{kind}_(\w+)", text)]
        for text, kind in (("\n".join(lines), "load"), ("\n".join(lines), "store"))
    )
    special = sum(bool(re.match(r"\s+v_(exp|log|rcp)_", line)) for line in lines)
    return Loop(len(lines), special, loads, stores)


def _bytes_gcn(name: str) -> int:
    if name.startswith("dword"):
        return 4 * int(name[6:] or 1)
    return 1 if "byte" in name else 2


def _bodies(jumps: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Of each loop, the target and place of a jump backwards, the lines that are in no loop within
    it."""
    merged: dict[int, int] = {}
    for start, end in jumps:  # a loop with several exits jumps back more than once
        if start < end:
            merged[start] = max(end, merged.get(start, end))
    loops = list(merged.items())
    for a in loops:
        inner = [b for b in loops if b != a and a[0] <= b[0] and b[1] <= a[1]]
        yield [i for i in range(a[0], a[1] + 1) if not any(b[0] <= i <= b[1] for b in inner)]
