"""The share of a GPU's copy bandwidth that a row kernel can reach, by what an ordinary row issues.

It is the least of these, each held against the bytes that must be moved, every tensor once:

* issue slots, of which a loop fills at most 90 %; the FMA, ALU and special-function pipes;
* L2's throughput, for every byte of every sweep;
* latency, by Little's law: what the warps of an SM have in flight, 900 clocks to memory, 320 to L2;
* memory, where a later sweep finds in L2 what of the rows in flight fits there.

Not in it: dependencies between instructions, the instruction cache, a row's start and end, clocks
that drop. For sm_90; no torch in here, nor triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .sass import Sweep

VOCAB = 151936
# Lanes a clock and SM (CUDA's programming guide, arithmetic throughput, 9.0)
LANES = {"issue": 128, "fma": 128, "heavy": 64, "alu": 64, "special": 16}
ISSUED = 0.9  # of the issue slots, by a loop that never waits for memory
WARPS, REGISTERS, LINE = 64, 65536, 128  # of an SM; bytes that its L1 delivers a clock
TO_MEMORY, TO_L2 = 900, 320  # clocks, under load
ALONE = 2.0  # clocks between two instructions of one warp
# Hits of a later sweep = HITS x L2 / rows in flight: an LRU with sweeps of alternating direction
# and the gradient's lines in it, simulated for 132 SMs.
HITS = 1.07


@dataclass(frozen=True)
class Gpu:
    """What the model knows of one; ``make gpu`` measures the last three."""

    processors: int = 132
    hertz: float = 1.98e9
    copy: float = 4.3e12  # bytes a second, read and written
    l2: float = 6.5e12
    l2_bytes: float = 50e6


GPUS = {"H100": Gpu(copy=3.0e12), "H200": Gpu()}


class Counts(NamedTuple):
    """Of one compiled kernel."""

    sweeps: list[Sweep]  # an ordinary row's
    registers: int
    warps: int  # of a program
    spilled: int
    pieces: int = 1  # programs that have a row in flight together

    @property
    def instructions(self) -> float:
        """For an entry, all sweeps together."""
        return sum(sweep.instructions for sweep in self.sweeps)

    @property
    def special(self) -> float:
        return sum(sweep.special for sweep in self.sweeps)

    @property
    def programs(self) -> int:
        """That an SM has room for."""
        of_a_warp = -(-self.registers // 8) * 8 * 32
        return max(1, min(REGISTERS // (of_a_warp * self.warps), WARPS // self.warps))


class Share(NamedTuple):
    """Of the copy bandwidth, and what keeps it from being more."""

    share: float
    limit: str


def share(counted: Counts, gpu: Gpu) -> Share:
    """By the model above."""
    found = counted.sweeps
    first, *later = found
    minimal = first.read + found[-1].written
    read, written = (sum(getattr(s, name) for s in found) for name in ("read", "written"))
    clocks = gpu.processors * gpu.hertz  # of all SMs, a second
    goal = minimal / gpu.copy * clocks  # clocks of an SM that an entry may take
    in_flight = gpu.processors * counted.programs / counted.pieces * VOCAB * first.read
    hits = min(1.0, HITS * gpu.l2_bytes / in_flight)
    limits = {
        "issue": ISSUED * goal / (counted.instructions / LANES["issue"]),
        "L2": goal / ((read + written) * clocks / gpu.l2),
        "latency": goal / _latency(found, counted.programs * counted.warps),
        "memory": minimal / (first.read + (1 - hits) * sum(s.read for s in later) + written),
    }
    for pipe in ("fma", "alu", "special"):
        limits[pipe] = goal / sum(_clocks(sweep, pipe) for sweep in found)
    limit = min(limits, key=limits.__getitem__)
    own = goal / sum(_slowest_pipe(sweep) for sweep in found)  # one may wait for another pipe
    return Share(min(1.0, limits[limit], own), limit)


def _clocks(sweep: Sweep, pipe: str) -> float:
    """Of an SM, for an entry."""
    amount = sweep.pipes.get(pipe, 0.0) + (sweep.pipes.get("heavy", 0.0) if pipe == "fma" else 0.0)
    return max(amount, 1e-9) / LANES[pipe]


def _slowest_pipe(sweep: Sweep) -> float:
    """One sweep's own limit, without the slots that it cannot fill."""
    l1 = (sweep.read + 2 * sweep.written) / LINE
    pipes = (_clocks(sweep, pipe) for pipe in ("fma", "heavy", "alu", "special"))
    return max(l1, sweep.instructions / LANES["issue"], *pipes)


def _latency(found: list[Sweep], warps: int) -> float:
    """Clocks of an SM for an entry, where each warp waits for what it has asked for."""
    total = 0.0
    for i, sweep in enumerate(found):
        wait = max((TO_L2 if i else TO_MEMORY) - ALONE * sweep.distance, 0) + ALONE * sweep.turn
        total += max(wait, warps / 4 * sweep.turn) / (sweep.entries * 32 * warps)
    return total
