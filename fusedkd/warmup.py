"""Compile the GPU kernels of a loss ahead of time, in parallel: ``fusedkd warmup``, or
``python -m fusedkd.warmup``.

What is compiled is what :func:`fusedkd.kd_loss` launches, because it is what is called, on tensors
without numbers, with a driver that launches nothing. So no GPU is needed, and none is used.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.distributions import LMHead, SparseTeacher
from fusedkd.distributions.sparse import TAILS
from fusedkd.divergences import resolve
from fusedkd.errors import UserError, as_user_error
from fusedkd.loss import kd_loss, kd_loss_and_metrics
from fusedkd.parser import Parser, number

ABOUT = """\
Compile the GPU kernels of a loss before a job starts, into Triton's cache (TRITON_CACHE_DIR, or
~/.triton/cache). Run it once where all processes of the job find that folder; none of them compiles
then. Without a GPU, --target says for which one. The kernels must be compiled by the Triton that
will launch them."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROCESSORS = 132  # of an H100 or H200


class Job(NamedTuple):
    """One call whose kernels are wanted."""

    vocab: int
    rows: int
    dtype: str
    divergence: str
    temperature: float
    form: str  # "logits", "head" or a sparse teacher's tail
    labels: bool
    metrics: bool

    def __str__(self) -> str:
        more = [self.form, *["metrics"] * self.metrics, *["no labels"] * (not self.labels)]
        size = f"{self.rows:,} x {self.vocab:,} {self.dtype}"
        return f"{size}, {self.divergence} at T = {self.temperature:g}, {', '.join(more)}"

    def run(self) -> None:
        """The call, forward and backward."""
        labels = torch.zeros(self.rows, dtype=torch.int64) if self.labels else None
        function = kd_loss_and_metrics if self.metrics else kd_loss
        result: Any = function(
            self._side().requires_grad_() if self.form != "head" else self._head(True),
            self._teacher(),
            labels,
            divergence=self.divergence,
            temperature=self.temperature,
            ce_weight=0.5 if self.labels else 0.0,
            backend="triton",
        )
        (result[0] if self.metrics else result).backward()

    def _side(self) -> Tensor:
        return torch.empty(self.rows, self.vocab, dtype=DTYPES[self.dtype])

    def _head(self, trained: bool) -> LMHead:
        hidden, weight = (
            torch.zeros(n, 8, dtype=DTYPES[self.dtype]) for n in (self.rows, self.vocab)
        )
        return LMHead(hidden.requires_grad_(trained), weight.requires_grad_(trained))

    def _teacher(self) -> Tensor | LMHead | SparseTeacher:
        if self.form == "head":
            return self._head(False)
        if self.form not in TAILS:
            return self._side()
        ids = torch.zeros(self.rows, 1, dtype=torch.int64)
        return SparseTeacher(ids, torch.zeros(self.rows, 1), tail=self.form)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    target, processors = _gpu(args.target)
    jobs = list(_jobs(args))
    context, about = multiprocessing.get_context("spawn"), (target, args.processors or processors)
    start, compiled = time.perf_counter(), 0
    with ProcessPoolExecutor(min(args.workers, len(jobs)), context, _begin, about) as pool:
        for i, future in enumerate(as_completed([pool.submit(_run, job) for job in jobs]), 1):
            with as_user_error():
                job, took = future.result()
            compiled += len(took)
            each = " + ".join(f"{seconds:.1f}" for seconds in took)
            print(f"[{i}/{len(jobs)}] {job}: {each or 'nothing new, 0'} s", flush=True)
    print(
        f"{compiled} kernels for {target} in {time.perf_counter() - start:.0f} s, by "
        f"{min(args.workers, len(jobs))} processes, in {_folder()}"
    )
    return 0


def _parser() -> Parser:
    parser = Parser("warmup", ABOUT)
    many: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--vocab", type=number(1), required=True, help="columns of the logits")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of both sides")
    parser.add_argument("--divergence", default=["forward_kl"], help="as kd_loss takes it", **many)
    parser.add_argument(
        "--temperature",
        type=number(1e-30, 1e6, float),
        default=[1.0, 2.0, 3.0],
        help="one of each kernel's: 1, 2 and any other (the default is all three)",
        **many,
    )
    parser.add_argument(
        "--form",
        choices=("logits", "head", *TAILS),
        default=["logits"],
        help="logits, a chunk of a head's, or a sparse teacher's tail",
        **many,
    )
    parser.add_argument(
        "--rows",
        type=number(1),
        default=[1024],
        help="tokens in a call; fewer than the GPU has processors are other kernels",
        **many,
    )
    parser.add_argument("--metrics", action="store_true", help="as the trainer asks for them")
    parser.add_argument("--no-labels", action="store_true", help="without cross-entropy")
    parser.add_argument("--target", help="sm_90, gfx942, ...; default: the GPU that is here")
    parser.add_argument(
        "--processors", type=number(1), help="SMs of the target (default 132, an H100's)"
    )
    parser.add_argument(
        "--workers", type=number(1), default=os.cpu_count() or 1, help="processes (all cores)"
    )
    return parser


def _jobs(args: Any) -> Iterator[Job]:
    with as_user_error():
        for name in args.divergence:
            resolve(name)
    axes = (args.divergence, args.form, args.temperature, args.rows)
    for divergence, form, temperature, rows in itertools.product(*axes):
        yield Job(
            vocab=args.vocab,
            rows=rows,
            dtype=args.dtype,
            divergence=divergence,
            temperature=temperature,
            form=form,
            labels=not args.no_labels,
            metrics=args.metrics,
        )


def _gpu(target: str | None) -> tuple[str, int]:
    """The target by its name, and how many processors it has."""
    with as_user_error("fusedkd warmup needs triton"):
        from fusedkd.kernels.triton import device, rehearsal
    if device.INTERPRETED:
        raise UserError("TRITON_INTERPRET is set, so nothing would be compiled: unset it.")
    if target is not None:
        with as_user_error("--target"):
            rehearsal.target_of(target)
        return target, PROCESSORS
    if device.unavailable():
        raise UserError("there is no GPU here: say for which one, such as --target sm_90")
    return rehearsal.name_of_gpu(), device.processors(torch.device("cuda", 0))


def _folder() -> str:
    from triton import knobs

    return str(knobs.cache.dir)


# --------------------------------------------------------------------------------------------------
# in the processes

_rehearsal: Any = None


def _begin(target: str, processors: int) -> None:
    global _rehearsal
    from fusedkd.kernels.triton.rehearsal import Rehearsal, target_of

    torch.set_num_threads(1)
    _rehearsal = Rehearsal(target_of(target))
    _rehearsal.begin(processors)


def _run(job: Job) -> tuple[Job, list[float]]:
    """And the seconds of each kernel that it compiled."""
    before = len(_rehearsal.compiled)
    job.run()
    return job, _rehearsal.compiled[before:]


if __name__ == "__main__":
    from fusedkd.cli.main import main as command

    sys.exit(command(["warmup", *sys.argv[1:]]))
