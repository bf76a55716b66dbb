"""The launch table: how many programs share a row, how big each is, and why.

Nobody has timed it on a GPU yet: the reasons below are arithmetic, for an H200 (132 SMs, 50 MB of
L2, 4.8 TB/s of memory, about 28 T fp32 instructions and 3.6 T exp2, log2 or 1 / x per second).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How many programs share a row, and how big each is."""

    pieces: int  # programs per row; a power of two
    warps: int
    unroll: int  # 16-byte accesses per thread, tensor and tile: latency hidden within a thread
    # Tiles on their way to shared memory, 1: none, loads go straight to registers. More hide more
    # latency, for a barrier per tile and without the eviction hints (cp.async has none).
    stages: int = 1
    # Whether the programs of a row are one launch and wait for one another, or three launches.
    joint: bool = False


@dataclass(frozen=True)
class Entry:
    """One line of the table; the first that fits a call serves it."""

    below: int | None  # serves vocabularies of fewer columns; None: of any size
    few: bool  # serves only calls with fewer rows than the GPU has SMs
    warps: int
    unroll: int
    stages: int
    piece: int  # least columns of a piece where a row is split; 0: a row is one program's
    why: str
    together: int = 0  # programs a row that are one launch and wait for one another (JOINT)

    def fits(self, rows: int, vocab: int, processors: int) -> bool:
        """Whether it serves so many rows of so many columns on a GPU with so many SMs."""
        return (self.below is None or vocab < self.below) and not (self.few and rows >= processors)

    def launch(self, rows: int, vocab: int, processors: int) -> Launch:
        """With pieces enough for four programs per SM, none narrower than ``piece``."""
        if self.together:
            return Launch(self.together, self.warps, self.unroll, self.stages, joint=True)
        pieces = 1
        while (
            self.piece
            and pieces < 64
            and rows * pieces < 4 * processors
            and vocab // (2 * pieces) >= self.piece
        ):
            pieces *= 2
        return Launch(pieces, self.warps, self.unroll, self.stages)


TABLE = (
    Entry(
        below=8192,
        few=False,
        warps=4,
        unroll=1,
        stages=1,
        piece=0,
        why="4 warps take 1,024 bf16 columns per tile; more threads would mostly walk the edges. "
        "8 rows per SM in flight are at most 34 MB: every later sweep finds its row in L2.",
    ),
    Entry(
        below=32768,
        few=False,
        warps=8,
        unroll=1,
        stages=1,
        piece=0,
        why="Two programs per SM: a row is short, and what one waits for at its end the other "
        "fills. 264 rows in flight are at most 34 MB, within L2.",
    ),
    Entry(
        below=None,
        few=True,
        warps=8,
        unroll=1,
        stages=1,
        piece=8192,
        why="A row per SM would leave SMs idle: 32 rows of 262,144 columns use 24 % of an H200. In "
        "pieces they use all of it; 8,192 columns take longer to read than the 12 x pieces "
        "numbers that are merged for them. Those 32 rows are 34 MB, so the gradient's launch finds "
        "them in L2: 50 MB to move, 11 us, and three launches of about 2 us each.",
    ),
    Entry(
        below=None,
        few=False,
        warps=16,
        unroll=2,
        stages=1,
        piece=0,
        why="16 warps of up to 128 registers fill an SM: one row per SM keeps the rows in flight "
        "few (config.py), with the loads in flight of four programs of 4 warps. Two accesses of "
        "each tensor per thread keep 32 kB in flight, twice what memory's latency asks for.",
    ),
)

# The other way for many long rows, for tests and counts (programs.py, stage "joint"): 4 programs a
# row, 2 on an SM. 66 rows in flight instead of 132 are 40 MB and stay in L2, so every later sweep
# hits, where with a program a row a third does not. It has not run on a GPU, and a program that
# waits for one that never starts hangs, so the table has none: ``together=4, warps=8`` in its last
# entry does it.
JOINT = Launch(pieces=4, warps=8, unroll=2, joint=True)
