"""What the row kernels issue for an entry, and the share of the copy bandwidth that this allows.

    python -m benchmarks.counted             # every divergence, dense bf16 rows
    python -m benchmarks.counted --write     # ... and write the table of docs/performance.md
    python -m benchmarks.counted --own       # formulas of one's own, beside the built-in ones
    python -m benchmarks.counted --divergences token_log_probs      # ... and top_k

Compiles what a call of 8,192 x 151,936 launches by default, for sm_90 and without a GPU, counts
(sass.py) and applies the model (roofline.py). ``BOUNDS`` is what tests/kernels/test_counted.py
holds the kernels to, so that no change costs instructions unseen.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

# by absolute names, as in resources.py
from fusedkd import divergences
from fusedkd.benchmarks import machine_code, own, page, resources, sass
from fusedkd.benchmarks.kernel_jobs import DTYPES, TOKEN_KERNELS, Job
from fusedkd.benchmarks.roofline import GPUS, VOCAB, Counts, share
from fusedkd.kernels.triton import config, launches

ROWS, TARGET = 8192, "sm_90"
TOKENS, TOP = "token_log_probs", "top_k"


def job(divergence: str, dtype: str = "bf16", tail: str = "", joint: bool = False) -> Job:
    """What a large call gets by default, or with programs that wait for one another."""
    if divergence in WRITTEN:
        divergence = getattr(own, divergence)().key
    launch = launches.JOINT if joint else config.choose(ROWS, VOCAB, 132)
    return Job(TARGET, dtype, divergence, launch, "joint" if joint else "whole", tail=tail)


def counts(divergence: str, dtype: str = "bf16", tail: str = "", joint: bool = False) -> Counts:
    """Compile a kernel and count."""
    if divergence == TOKENS:
        return token_counts(dtype)
    chosen = job(divergence, dtype, tail, joint)
    kernel = resources.compiled(chosen)
    student, teacher, grad = DTYPES[dtype]
    read = student.itemsize + (0 if tail else teacher.itemsize)
    every = sass.sweeps(sass.listing(machine_code.sass(kernel)), read, grad.itemsize)
    plan = resources.plan_of(job(divergence, dtype))
    two = tail == "bucket" or (plan is not None and plan.closed)
    report = resources.read(kernel, chosen)
    return Counts(
        sass.ordinary(every, 2 if two else 3),
        report.registers,
        kernel.metadata.num_warps,
        report.spilled,
        chosen.launch.pieces,
    )


def token_counts(dtype: str = "bf16", entropy: bool = False) -> Counts:
    """Of the kernels of ``token_log_probs``, forward and backward: two launches, so that neither
    finds in L2 what the other has read, and the model's share does not apply."""
    launch = config.choose(ROWS, VOCAB, 132)
    student, _, grad = DTYPES[dtype]
    found, reports = [], []
    for stage in TOKEN_KERNELS:
        chosen = Job(TARGET, dtype, "-", launch, stage, "entropy" if entropy else "plain")
        kernel = resources.compiled(chosen)
        listing = sass.listing(machine_code.sass(kernel))
        found += sass.sweeps(listing, student.itemsize, grad.itemsize)[:1]
        reports.append(resources.read(kernel, chosen))
    registers = max(report.registers for report in reports)
    spilled = sum(report.spilled for report in reports)
    return Counts(found, registers, launch.warps, spilled)


def top_counts(dtype: str = "bf16") -> Counts:
    """Of the kernel of ``top_k``, an ordinary row's two sweeps."""
    chosen = Job(TARGET, dtype, "-", config.choose(ROWS, VOCAB, 132), "top k")
    kernel, item = resources.compiled(chosen), DTYPES[dtype][0].itemsize
    found = sass.sweeps(sass.listing(machine_code.sass(kernel)), item, item)[:2]
    report = resources.read(kernel, chosen)
    return Counts(found, report.registers, chosen.launch.warps, report.spilled)


class Bound(NamedTuple):
    """Of a kernel: at most so many instructions, and so many on the special-function unit."""

    divergence: str
    instructions: float
    special: float
    dtype: str = "bf16"
    tail: str = ""
    spilled: int = 0  # bytes
    joint: bool = False


# 1 to 2 % above what Triton 3.7.1 gives (2026-11-28). 3.6.0 gives 35.5 for forward KL, the same
# share by the model.
BOUNDS = (
    Bound("forward_kl", 35.2, 4.2),
    Bound("reverse_kl", 29.8, 3.2),
    Bound("jsd", 62.5, 8.2),
    Bound("jsd(0.1)", 69.5, 8.2),
    Bound("total_variation", 52.5, 5.2),
    Bound("alpha", 55.0, 6.4),
    Bound("forward_kl", 34.8, 4.3, "fp32"),
    Bound("jsd", 58.2, 8.3, "head"),
    Bound("forward_kl", 17.1, 2.2, "bf16", "bucket"),
    Bound("forward_kl", 34.9, 4.2, joint=True),
    Bound("jsd", 62.2, 8.2, joint=True),
    Bound(TOKENS, 13.7, 2.1),
    Bound("written_jsd", 70.5, 9.2),
)

# Of one's own, and the built-in one of the same value, if there is one.
WRITTEN = {
    "written_kl": "forward_kl",
    "written_jsd": "jsd",
    "written_alpha": "alpha",
    "written_le_cam": None,
}


INTRODUCTION = """\
**Counted, not measured.** Dense bf16 rows of 151,936 entries, loss and gradient with cross-entropy,
T = 2: what the kernels compiled for sm_90 issue, the share of the copy bandwidth that a model
allows them, and what keeps it from being more. "Joint": four programs a row that wait for one
another (`launches.JOINT`), which is no default before it has run on a GPU.
`python -m benchmarks.counted --write` wrote this; `benchmarks/roofline.py` says what the model
leaves out.

"""


def line(name: str, dtype: str, counted: Counts) -> str:
    sweeps = " + ".join(f"{sweep.instructions:.1f}" for sweep in counted.sweeps)
    shares = [f"{gpu} {_share(counted, gpu)}" for gpu in GPUS if not name.startswith((TOKENS, TOP))]
    numbers = (
        f"{name:24}{dtype:5}{counted.registers:4} registers, {counted.spilled} spilled; "
        f"instructions {sweeps} = {counted.instructions:.1f}, special {counted.special:.1f}"
    )
    return "; ".join([numbers, *shares])


def markdown(table: dict[str, Counts]) -> str:
    """The performance page's, until a GPU was at hand; of each divergence both ways."""
    rows = [
        f"| `{name}` | {c.instructions:.0f} | {c.special:.1f} | "
        + " | ".join(_share(x, gpu) for gpu in GPUS for x in (c, table[f"{name} joint"]))
        + " |"
        for name, c in table.items()
        if not name.endswith("joint")
    ]
    titles = ["divergence", "instructions an entry", "of them special"]
    titles += [title for gpu in GPUS for title in (gpu, f"{gpu}, joint")]
    head = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n"
    return INTRODUCTION + head + "\n".join(rows)


def _share(counted: Counts, gpu: str) -> str:
    percent, limit = share(counted, GPUS[gpu])
    return f"{100 * percent:.0f} %, {limit}"


def print_own(dtype: str) -> None:
    """Each formula, and how many instructions it takes of the built-in one's."""
    for name, builtin in WRITTEN.items():
        counted = counts(name, dtype)
        print(line(name, dtype, counted), flush=True)
        if builtin is not None:
            ours = counts(builtin, dtype)
            ratio = counted.instructions / ours.instructions
            print(f"{line(builtin, dtype, ours)}; {ratio:.2f} of it", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    names = [*divergences.names(), TOKENS]
    parser.add_argument("--divergences", nargs="+", choices=names, help="these alone")
    parser.add_argument("--write", action="store_true", help=f"write the table of {page.PAGE}")
    parser.add_argument("--own", action="store_true", help="formulas of one's own")
    arguments = parser.parse_args()
    if arguments.own:
        print_own(arguments.dtype)
        return 0
    table = {}
    for name in arguments.divergences or names:
        if name == TOKENS:
            for label, entropy in ((name, False), (f"{name}+entropy", True)):
                counted = token_counts(arguments.dtype, entropy)
                print(line(label, arguments.dtype, counted), flush=True)
            print(line(TOP, arguments.dtype, top_counts(arguments.dtype)), flush=True)
            continue
        for label, joint in ((name, False), (f"{name} joint", True)):
            table[label] = counts(name, arguments.dtype, joint=joint)
            print(line(label, arguments.dtype, table[label]), flush=True)
    if arguments.write:
        page.replace(markdown(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
