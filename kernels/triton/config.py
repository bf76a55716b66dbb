"""Which kernel runs how: all that a kernel is told at compile time. The launches and their reasons
are in launches.py.

The launcher (ops.py) and the ahead-of-time checks (benchmarks/resources.py) build their kernels
here, so what is checked is what is launched.

What is proven, and how: the results, in Triton's interpreter (tests/loss/test_interpreter.py);
registers, spills, calls and access widths, by compiling for sm_80, sm_90, sm_100 and gfx942
(tests/kernels/test_resources.py). Nobody has seen these kernels run on a GPU: no time, no race, no
hardware's rounding of exp2. What follows is arithmetic, for an H200 (see launches.py).

Bytes per entry (bf16): 2 student + 2 teacher + 2 gradient = 6 if the later sweeps find the row in
L2; 10 (two sweeps) or 14 (three) if they never do.

Arithmetic per entry (sm_90, counted 2026-11-28): forward KL + CE 20 + 15 instructions, reverse
18 + 12, alpha 21 + 33, JSD 15 + 28 + 18 (15 + 35 + 18 where its beta is not 1/2); 6 bytes at 4.3
TB/s, an H200's copy, take as long as 47. By that count the KLs and alpha reach 78 to 82 % of the
copy, mostly for the third of L2 that a row per SM misses, and JSD 65, L2 being its limit. Before
lean.py it was 69, 21 and 25.

Against a teacher of K entries (sparse.py) only the student is swept: 4 bytes per entry, 6 if the
second sweep never finds the row in L2, and 8 bytes for each of the K, which is nothing beside a
row. 9 + 8 instructions, whatever the divergence and the tail; only alpha_beta sweeps once more
where the teacher is absent outside the ids, 9 + 10 + 15 (benchmarks/counted.py, 2026-11-28). 4
bytes take as long as 31, so memory is the limit. A row is half as long as a dense pair, so 132 of
them fit into L2. scale_kernel moves 4 bytes for 4 instructions: bytes are its limit, unless the
factor is 1, when it moves none.

Rows in flight: a row of student and teacher at V = 151,936 is 608 kB, so 132 rows at a time are
80 MB, more than L2's 50 MB. Hence one fat program per SM, sweeps that alternate in direction (what
was read last is read first), and eviction hints (the first sweep's lines stay, the last one's and
the gradient go). With all programs in step 62 % of the second sweep hits (7.5 bytes per entry, 80 %
of the limit); with their phases spread, half of the rows is live at a time, 40 MB, and nearly all
of it hits. With 30 MB of usable L2 it is 37 % (8.5 bytes, 70 %). Below V = 64k all of it hits.

What else was weighed. Launches over blocks of 60 rows, statistics then gradient, keep a block in
L2, but a pair moves 11 us worth of bytes and costs two launches: about 65 %, and 270 launches for
8,192 rows. Two programs that both read the whole row for its statistics halve the rows in flight
without talking to each other, for 25 more instructions where instructions are the limit.
Programs that share a row and wait for each other's statistics (launches.JOINT) are built, and have
not run; a cluster (quack's answer) spills, or ends Triton 3.7. Of Hopper's own means, a tensor
descriptor needs rows that are a multiple of 16 bytes apart, which 50,257 columns of bf16 are not,
and warp specialisation hides loads behind arithmetic, which 16 warps do already where arithmetic is
the limit. Both save loads and their addresses: two loads for 8 entries, each of which takes 12 to
35 other instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fusedkd.divergences import recorded_tape
from fusedkd.row_rules import recorded_tape as recorded_rule

from . import launches, lean, pointwise
from .launches import Launch
from .numerics import INTERPRETED as _INTERPRETED

INTERPRETED = bool(_INTERPRETED.value)

# Threads of a warp on NVIDIA; AMD's CDNA has 64.
WARP = {"cuda": 32, "hip": 64}
MOST_REGISTERS = 128  # per thread, on NVIDIA
# What a divergence of many operations is launched as at most, with all of an SM's registers.
LARGE = Launch(pieces=1, warps=8, unroll=1)
# Statistics that the programs of a row hand on (programs.py, sparse.py), and sums after them.
PARTIALS, SPARSE_PARTIALS, SUMS = 17, 7, 2
AT_ONCE = ("whole", "joint")  # the stages that do all of a row


def _threads(launch: Launch, target: str) -> int:
    """The table counts warps of 32; a CDNA one is 64 wide, and with 16 of those per program, of 128
    registers each, alpha and mixed_kl spill (gfx942, Triton 3.7.1)."""
    return max(launch.warps * 32, WARP[target])


@dataclass(frozen=True, repr=False)
class Tiling:
    """How a kernel walks a row; see row.py."""

    acc: tl.dtype
    lanes: int  # threads
    unroll: int  # lines of a lane in a tile
    width: int  # entries per lane: 16 bytes of the smallest item
    item: int  # bytes of the smallest item among the tensors
    aligned: bool  # all of them reach a 16-byte boundary at the same column, in every row

    @cached_property
    def _text(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in values)})"

    def __repr__(self) -> str:  # part of Triton's cache key, so it is asked for at every launch
        return self._text


@dataclass(frozen=True, repr=False)
class Plan(Tiling):
    """Everything that a row kernel knows at compile time."""

    stage: str  # see programs.py
    pieces: int  # a power of two
    stages: int  # see Launch
    aligned_to: str  # which tensor has the smallest items
    nvidia: bool  # its approximate instructions are there
    careful: Any  # the divergence's function in pointwise.py, or the one that emit.py made of it
    own: bool  # the latter, with parameters of its own
    weighted: bool  # and a weight in front of the form, which is a built-in divergence's
    emitted: bool  # or a form of its own,
    doubted: bool  # which may prove not to be right for a row
    large: bool  # so many operations that 128 registers are too few
    form: lean.Lean
    exact: bool  # entry by entry: fp64, and some of somebody's own
    closed: bool  # the statistics give the divergence, ...
    kls: bool  # ... as a mix of KL(p || q) and KL(q || p)
    forward: bool  # they hold the gaps weighted by p
    reverse: bool  # ... and by q
    powers: int  # ... sums of powers, see Lean
    terms: bool  # there is a sweep for the divergence's value
    unroll_terms: int  # its lines of a lane
    unroll_slope: int  # the gradient's
    late: bool  # it is that of the gradient
    sharp: bool  # rows of one sharp peak have a gradient of their own
    mixes: bool  # the divergence is made of a mixture of p and q (pointwise.MIXTURES)
    teacher: bool  # it has a say
    kd: bool  # in the loss too
    ce: bool  # cross-entropy, for the loss or for the metrics
    z: bool  # z-loss
    unit: bool  # either of them: the softmax at T = 1
    power: int  # the student's temperature if it is 1 or 2, else 0
    smoothing: bool
    metrics: bool
    transformed_s: bool  # the student's logits are scaled or capped
    transformed_t: bool
    part: bool  # of the row's columns, and statistics by their names (named.py)
    rule: Any  # the row rule's function of a row's statistics, or None

    @cached_property
    def cache_key(self) -> str:  # Triton's, so that an edited divergence is compiled anew
        rule = "" if self.rule is None else self.rule.cache_key
        return " ".join((self._text, self.careful.cache_key, self.form.cache_key, rule))


@dataclass(frozen=True, repr=False)
class SparsePlan(Plan):
    """Of a kernel that walks the student alone."""

    outside: bool  # entries that are no ids have a say of their own


@lru_cache(maxsize=1024)
def choose(rows: int, vocab: int, processors: int) -> Launch:
    """The launch for so many rows of so many columns on a GPU with so many SMs (AMD: CUs)."""
    entry = next(entry for entry in launches.TABLE if entry.fits(rows, vocab, processors))
    return entry.launch(rows, vocab, processors)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether in every row all (B, T, C) tensors reach a 16-byte boundary at the same column."""
    lead = min(tensors, key=Tensor.element_size)
    start = lead.data_ptr() // lead.element_size()
    (batch, length, _), (lead_b, lead_t, _) = lead.shape, lead.stride()
    for x in tensors:
        item, (step_b, step_t, _) = x.element_size(), x.stride()
        line = 16 // item
        if (
            (x.data_ptr() // item - start) % line
            or (batch > 1 and (step_b - lead_b) % line)
            or (length > 1 and (step_t - lead_t) % line)
        ):
            return False
    return True


class Variant(NamedTuple):
    """What decides which row kernels a call needs, besides its launch."""

    student: torch.dtype
    teacher: torch.dtype
    grad: torch.dtype | None
    divergence: str
    aligned: bool = True
    kd: bool = True
    ce: bool = True
    z: bool = False
    power: int = 2
    smoothing: bool = False
    metrics: bool = False
    transformed_s: bool = False
    transformed_t: bool = False
    part: bool = False
    rule: str | None = None


def stages(variant: Variant, launch: Launch) -> tuple[str, ...]:
    """The launches of one call, in order."""
    # A closed divergence has a middle stage too: its programs return at once unless their row
    # turned out to hold masks, which only the device knows.
    if variant.part:  # the ranks of a group have something to tell one another in between
        return ("statistics", "middle", "gradient")
    if launch.joint and not INTERPRETED:
        return ("joint",)
    return ("whole",) if launch.pieces == 1 else ("statistics", "middle", "gradient")


def plan(variant: Variant, launch: Launch, stage: str, target: str) -> Plan:
    """The compile-time half of a launch on "cuda" or "hip"."""
    named = {"student": variant.student, "teacher": variant.teacher}
    if variant.grad:
        named["grad"] = variant.grad
    lead = min(named, key=lambda name: named[name].itemsize)
    item = named[lead].itemsize
    wide = torch.float64 in (variant.student, variant.teacher)
    careful = function(variant.divergence)
    form, own = form_of(variant.divergence), recorded_tape(variant.divergence) is not None
    # the named statistics have no sums of powers; and what is doubted is tried and done again by
    # one program, which has all of the row
    exact = wide or (variant.part and form.powers > 0) or (form.emitted and stage != "whole")
    kls = (form.forward or form.reverse) and not (own and exact)
    powers = 0 if exact else form.powers
    if form.large and launch.warps > LARGE.warps:
        launch = replace(launch, warps=LARGE.warps, unroll=LARGE.unroll)
    # with twice the lines these spill (benchmarks/resources.py)
    unroll = 1 if variant.transformed_s or variant.transformed_t else launch.unroll
    return Plan(
        acc=tl.float64 if wide else tl.float32,
        lanes=_threads(launch, target),
        unroll=unroll,
        width=16 // item,
        item=item,
        aligned=variant.aligned,
        stage=stage,
        pieces=launch.pieces,
        stages=launch.stages,
        aligned_to=lead,
        nvidia=target == "cuda" and not INTERPRETED,
        careful=careful,
        own=own,
        weighted=own and not form.emitted and not exact,
        emitted=form.emitted and not exact,
        doubted=form.doubted and not exact,
        large=form.large,
        form=form,
        exact=exact,
        closed=kls or powers > 0,
        kls=kls,
        forward=form.forward and kls,
        reverse=form.reverse and kls,
        powers=powers,
        terms=form.terms is not None,
        unroll_terms=1 if form.heavy or stage == "joint" or lead == "grad" else unroll,
        unroll_slope=1 if form.emitted else unroll,
        sharp=form.sharp is not None and variant.kd and not exact,
        late=powers > 0
        and variant.kd
        and variant.grad is not None
        and stage in AT_ONCE
        and variant.rule is None,
        mixes=variant.divergence in pointwise.MIXTURES,
        teacher=variant.kd or variant.metrics,
        kd=variant.kd,
        ce=variant.ce,
        z=variant.z,
        unit=variant.ce or variant.z,
        power=variant.power,
        smoothing=variant.smoothing,
        metrics=variant.metrics,
        transformed_s=variant.transformed_s,
        transformed_t=variant.transformed_t,
        part=variant.part,
        rule=None if variant.rule is None else _rule(variant.rule),
    )


def options(launch: Launch, target: str, plan: Plan | None = None) -> dict[str, int]:
    """What Triton's compiler is told besides.

    128 registers leave 16 warps per SM, which the table counts on. Without a bound ptxas aims
    lower on its own, for small programs, and spills: skew_reverse_kl with 4 warps on sm_90 took 96
    registers and 8 bytes of stack, and with the bound 125 and none (Triton 3.7.1).
    """
    warps = (_threads(launch, target) if plan is None else plan.lanes) // WARP[target]
    return {"num_warps": warps} | ({"maxnreg": most_registers(plan)} if target == "cuda" else {})


def most_registers(plan: Plan | None) -> int:
    """Per thread, on NVIDIA. The statistics of a head's row in pieces, with metrics and both sides
    bent, take more: with 128 they spill 24 to 48 bytes on sm_100 (Triton 3.7.1, 2026-11-25). That
    costs the second program of an SM, in calls of fewer rows than there are SMs.
    """
    if plan is not None and plan.large:
        return 255
    if plan is None or plan.stage != "statistics":
        return MOST_REGISTERS
    head = plan.aligned_to == "grad"  # its logits are wider than their gradient
    return (
        160
        if head and plan.metrics and plan.transformed_s and plan.transformed_t
        else MOST_REGISTERS
    )


# A copy with one factor: wide enough to saturate memory, nothing else to weigh.
SCALE = Launch(pieces=1, warps=8, unroll=1)


def scale_plan(dtype: torch.dtype, target: str) -> Tiling:
    """The compile-time half of ``scale_kernel``."""
    return Tiling(
        acc=tl.float64 if dtype == torch.float64 else tl.float32,
        lanes=_threads(SCALE, target),
        unroll=SCALE.unroll,
        width=16 // dtype.itemsize,
        item=dtype.itemsize,
        aligned=True,  # a tensor is always aligned with itself
    )


def form_of(divergence: str) -> lean.Lean:
    """The lean form of a divergence."""
    if (tape := recorded_tape(divergence)) is not None:
        from . import emit

        return emit.form(tape)
    return lean.FORMS[divergence]


def _rule(key: str) -> Any:
    from . import emit

    return emit.rule(recorded_rule(key))


def function(divergence: str) -> Any:
    """The pointwise function of a divergence."""
    if (tape := recorded_tape(divergence)) is not None:
        from . import emit

        return emit.function(tape)
    found = getattr(pointwise, divergence, None)
    if found is None or divergence.startswith("_"):
        raise NotImplementedError(
            f"the divergence {divergence!r} has no Triton function. It is described once per "
            "language, under the same name: fusedkd/divergences.py, kernels/triton/pointwise.py "
            "and kernels/cpu/pointwise.h; one of your own, @divergences.custom makes."
        )
    return found
