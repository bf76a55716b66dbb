"""What a row kernel issues for an entry, counted in its machine code (sm_90's SASS): its loops over
a row, the way that an ordinary row takes through them, and its instructions by execution pipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# Nsight Compute's pipes of sm_90. IMAD runs on the heavy half of the FMA pipe alone; what is in no
# list (uniform datapath, branches, barriers, memory) takes an issue slot and nothing else here.
PIPES = {
    "fma": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I HFMA2 HADD2 HMUL2",
    "heavy": "IMAD IMUL IDP IMUL32I",
    "alu": "FMNMX LOP3 LOP LOP32I PRMT SHF SHL SHR SEL FSEL ISETP FSETP IADD3 IADD IADD32I LEA "
    "IMNMX VIMNMX MOV MOV32I IABS P2R R2P PLOP3 HMNMX2 HSETP2 HSET2 F2FP BMSK SGXT FCHK I2FP "
    "VABSDIFF FSET ISCADD CS2R VOTE VIADD VIADDMNMX FSWZADD I2IP",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV I2I S2R",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
WAYS = 256  # through a loop, of which the count goes on no further


class Line(NamedTuple):
    address: int
    guarded: bool  # runs under a predicate
    op: str  # "LDG.E.128"
    text: str

    @property
    def name(self) -> str:
        return self.op.split(".")[0]

    @property
    def target(self) -> int | None:
        """Of a branch."""
        match = re.search(r"0x([0-9a-f]+)", self.text) if self.op.startswith("BRA") else None
        return int(match[1], 16) if match else None

    @property
    def conditional(self) -> bool:
        return self.guarded or bool(re.search(r"BRA\S* (!?U?P\d|!?UP)", self.text))

    def moves(self, kind: str) -> int:
        """Bytes of a thread's access to global memory; 0: none of this ``kind``."""
        if self.name not in (kind, f"{kind}STS"):  # LDGSTS: to shared memory
            return 0
        match = re.search(r"\.(?:[US])?(8|16|64|128)\b", self.op)
        return int(match[1]) // 8 if match else 4


class Sweep(NamedTuple):
    """A loop that makes 16-byte accesses, on its ordinary way; instructions are of an entry."""

    writes: bool
    entries: float  # of a thread in one turn
    pipes: dict[str, float]
    read: float  # bytes of an entry
    written: float
    distance: int  # instructions from the last wide load to the first use of one, round the loop
    turn: int  # instructions

    @property
    def instructions(self) -> float:
        return self.turn / self.entries

    @property
    def special(self) -> float:
        return self.pipes.get("special", 0.0)


def listing(sass: str) -> list[Line]:
    """Of the largest function of what ``cuobjdump -sass`` prints."""
    functions: list[list[Line]] = [[]]
    for text in sass.splitlines():
        if "Function :" in text:
            functions.append([])
        code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?(\S+?)[;\s]", text)
        if code:
            body = text.split("*/", 1)[1].split("/* 0x")[0].strip().rstrip("; ")
            functions[-1].append(Line(int(code[1], 16), bool(code[2]), code[3].rstrip(";"), body))
    return max(functions, key=len)


def sweeps(lines: list[Line], read: float, written: float) -> list[Sweep]:
    """All of them, in the code's order; ``read``, ``written``: bytes of an entry."""
    found = (_sweep([lines[i] for i in way], read, written) for way in _ordinary_ways(lines))
    return [sweep for sweep in found if sweep is not None]


def ordinary(every: list[Sweep], count: int) -> list[Sweep]:
    """The ``count`` sweeps that an ordinary row goes through. The statistics come first in the
    code; a middle sweep is the next that only reads and is no remainder of an unrolled loop; of
    those that write it is the cheapest. What is left are careful ways (masks, overflow)."""
    reads = [sweep for sweep in every if not sweep.writes]
    chosen = reads[:1]
    if count > 2:
        cost = chosen[0].instructions if chosen else 0.0
        others = [s for s in reads[1:] if abs(s.instructions - cost) > 0.02 * cost] or reads[1:]
        chosen += others[:1]
    writes = [sweep for sweep in every if sweep.writes]
    return chosen + sorted(writes, key=lambda sweep: sweep.instructions)[:1]


def _sweep(way: list[Line], read: float, written: float) -> Sweep | None:
    wide = [line.moves("LDG") == 16 for line in way]
    if not any(wide):
        return None
    entries = 16 * sum(wide) / read
    counts = Counter(PIPE.get(line.name, "other") for line in way)
    writes = any(line.moves("STG") == 16 for line in way)
    return Sweep(
        writes=writes,
        entries=entries,
        pipes={pipe: count / entries for pipe, count in counts.items()},
        read=read,
        written=written if writes else 0.0,
        distance=_distance(way, wide),
        turn=len(way),
    )


def _distance(way: list[Line], wide: list[bool]) -> int:
    registers = set()
    for line, is_wide in zip(way, wide, strict=True):
        match = re.search(r"\bR(\d+)\b", line.text) if is_wide else None
        if match:
            registers |= {f"R{int(match[1]) + i}" for i in range(4)}
    last = len(way) - 1 - wide[::-1].index(True)
    for step in range(1, len(way)):
        place = (last + step) % len(way)
        sources = way[place].text.partition(",")[2]
        if not wide[place] and registers & set(re.findall(r"R\d+", sources)):
            return step
    return len(way)


def _ordinary_ways(lines: list[Line]) -> Iterator[list[int]]:
    """Through each loop, inner loops stepped over: of three or more lengths the second (T = 2 of
    1, 2 and any other), else the shortest."""
    place = {line.address: i for i, line in enumerate(lines)}
    spans: dict[int, int] = {}
    for i, line in enumerate(lines):
        start = i if line.target is None else place.get(line.target, i)
        if start < i:  # a loop with several exits jumps back more than once
            spans[start] = max(i, spans.get(start, i))
    loops = sorted(spans.items())
    for start, end in loops:
        inner = [(a, b) for a, b in loops if (a, b) != (start, end) and start <= a and b <= end]
        ways = _ways(lines, place, start, end, dict(inner))
        lengths = sorted({len(way) for way in ways})
        if lengths:
            wanted = lengths[1] if len(lengths) > 2 else lengths[0]
            yield next(way for way in ways if len(way) == wanted)


def _ways(
    lines: list[Line], place: dict[int, int], start: int, end: int, inner: dict[int, int]
) -> list[list[int]]:
    """From the head of a loop back to it."""
    done: list[list[int]] = []
    open_ways: list[tuple[list[int], int]] = [([], start)]
    while open_ways and len(done) < WAYS:
        way, i = open_ways.pop()
        while start <= i <= end:
            if i in inner:
                i = inner[i] + 1
                continue
            line = lines[i]
            way = [*way, i]
            if line.name in ("EXIT", "RET") and not line.guarded:
                break
            there = None if line.target is None else place.get(line.target, -1)
            i += 1
            if there == start:
                done.append(way)
                i = i if line.conditional else end + 1
            elif there is not None and not start <= there < i:  # forwards, or out of the loop
                if not line.conditional:
                    i = there
                elif there <= end:
                    open_ways.append((way, there))
    return sorted(done, key=len)
