"""``fusedkd cache``: a teacher and text from disk, run into a cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fusedkd.cache.build import Job, build
from fusedkd.cache.of_model import job_of
from fusedkd.cache.policy import ACTUAL, Policy
from fusedkd.cache.writer import ALONE, Share
from fusedkd.data.arguments import DataArguments
from fusedkd.data.loading import load_rows, say
from fusedkd.data.two_templates import Reading
from fusedkd.errors import UserError, as_user_error
from fusedkd.models.kinds import is_placed
from fusedkd.models.loading import load_tokenizer, required, tokenizer_at
from fusedkd.models.saved import SavedModel
from fusedkd.models.served import ServedArguments
from fusedkd.teachers import LiveTeacher, ServedTeacher, Service
from fusedkd.teachers.aligned import context, told
from fusedkd.teachers.filling import fill
from fusedkd.teachers.service import is_url
from fusedkd.teachers.spread import LedTeacher, is_spread
from fusedkd.train.tasks import saved_task


@dataclass(frozen=True)
class CacheArguments:
    """The flags of ``fusedkd cache``, under their names."""

    teacher: str | None
    output: Path
    data: DataArguments
    tokenizer: str | None
    student_tokenizer: str | None
    teacher_dtype: str
    teacher_device_map: str | None
    teacher_load_in_4bit: bool
    teacher_load_in_8bit: bool
    teacher_tp: bool
    vocab_size: int | None
    device: str | None
    batch_size: int
    shard_mb: float
    policy: Policy
    temperatures: tuple[float, ...]
    served: ServedArguments


def make_cache(args: CacheArguments) -> None:
    """Run the teacher over the data, or over what is missing of it. Each of torchrun's processes
    writes shards of its own; but one that a teacher is spread over.

    Raises:
        UserError: a missing or wrong argument, model or file.
    """
    console = Console(markup=False, emoji=False)  # names may have brackets
    share = ALONE if args.teacher_tp else Share.of_torchrun()
    shown = Console(markup=False, emoji=False, quiet=share.rank > 0)
    complete = (_fill if is_url(args.teacher) else _run)(args, shown, share)
    if complete is None:
        return
    if not complete:
        console.print(
            f"{args.output}: process {share.rank} of {share.world} has written its shards. Who is "
            "the last completes the cache."
        )
        return
    size = sum(path.stat().st_size for path in args.output.iterdir())
    console.print(f"{args.output}: {size / 1e6:,.1f} MB. `fusedkd cache info {args.output}` tells.")


_OF_MODELS: dict[str, Any] = {
    "teacher_dtype": "auto",
    "teacher_device_map": None,
    "teacher_load_in_4bit": False,
    "teacher_load_in_8bit": False,
    "teacher_tp": False,
    "device": None,
}


def _fill(args: CacheArguments, console: Console, share: Share) -> bool:
    """From a server; whether the cache is complete."""
    given = args.policy.kind in ("top", ACTUAL) and args.policy.top_p is None
    if not given or len(args.temperatures) > 1:
        raise UserError(
            f"--teacher {args.teacher}: a server gives the top entries at one temperature, or the "
            "actual token's: expected --top-k and one of --temperatures, or --actual."
        )
    for flag, plain in _OF_MODELS.items():
        if getattr(args, flag) != plain:
            raise UserError(
                f"--teacher {args.teacher}: a served teacher runs elsewhere: expected no --{flag}."
            )
    tokenizer = load_tokenizer(required("tokenizer", args.tokenizer))
    sequences = _sequences(args, tokenizer)
    service = Service.of(
        str(args.teacher),
        args.served,
        top_k=0 if args.policy.kind == ACTUAL else args.policy.k,
        temperature=args.temperatures[0],
        vocab_size=args.vocab_size,
    )
    beside = args.output.with_name(f"{args.output.name}.answers")
    teacher = ServedTeacher(service, tokenizer, args.served.teacher_answers or beside)
    teacher.check_rows("given", sequences)
    console.print(f"{len(sequences):,} sequences, {teacher}")
    with _bar(console) as bar:
        shown = bar.add_task("tokens", total=sum(map(len, sequences)) / share.world)
        return fill(
            args.output,
            sequences,
            teacher,
            int(args.shard_mb * 2**20),
            lambda tokens: bar.advance(shown, tokens),
            share,
        )


def _sequences(args: CacheArguments, tokenizer: Any, most: int | None = None) -> Sequences:
    """What the teacher is to be asked about: the rows, or those of a student with another
    tokenizer, read to the teacher's.

    Raises:
        UserError: the teacher takes none so long as one that was read to it.
    """
    if args.student_tokenizer is None:
        rows = _rows(args, tokenizer)
        return Sequences(rows.train, rows.test)
    student = tokenizer_at("student_tokenizer", args.student_tokenizer)
    args.data.conversations = True
    rows = _rows(args, student)
    with as_user_error("--student_tokenizer", Exception):
        reading = Reading(student, tokenizer)
        found = Sequences(*(told(part, reading) for part in (rows.train, rows.test) if part))
    longest = len(found[len(found) - 1]) if len(found) else 0
    if most is not None and longest > most:
        raise UserError(
            f"--student_tokenizer {args.student_tokenizer}: a row becomes {longest:,} of the "
            f"teacher's tokens, and the teacher reads {most:,}: expected shorter ones "
            "(--max_length, --block_size)."
        )
    return found


def _rows(args: CacheArguments, tokenizer: Any) -> Any:
    # a row that is flattened is looked up sequence by sequence
    packing = "none" if args.data.packing == "flatten" else None
    rows = load_rows(args.data, tokenizer, packing)
    say(rows.summary)
    return rows


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _run(args: CacheArguments, console: Console, share: Share) -> bool | None:
    """From a model; whether the cache is complete, or None in a process that helps the writer."""
    name = required("teacher", args.teacher)
    device = _device(args.device)
    if args.teacher_load_in_4bit and args.teacher_load_in_8bit:
        raise UserError("--teacher_load_in_4bit, --teacher_load_in_8bit: expected one.")
    bits = [n for n in (4, 8) if getattr(args, f"teacher_load_in_{n}bit")]
    saved = SavedModel(
        *("teacher", name, args.teacher_dtype),
        bits=bits[0] if bits else None,
        device_map=args.teacher_device_map,
        spread=args.teacher_tp,
    )
    task = saved_task(saved)
    if task is None:
        raise UserError(f"--teacher {name}: its config names no architecture of transformers.")
    if task.no_cache:
        raise UserError(task.no_cache)
    tokenizer = load_tokenizer(args.tokenizer, teacher=saved)
    sequences = _sequences(args, tokenizer, context(saved.config()))
    model = saved.load(task.loader(saved.config()))
    model = model.eval().requires_grad_(False)
    if is_spread(model):
        run: LiveTeacher = LedTeacher(model)
    else:
        run = LiveTeacher(model if is_placed(model) else model.to(device))
    job = job_of(
        *(run, tokenizer, sequences, args.policy, args.temperatures),
        name=name,
        vocab_size=args.vocab_size,
        batch_size=args.batch_size,
        shard_bytes=int(args.shard_mb * 2**20),
    )
    if isinstance(run, LedTeacher) and not run.leads:
        run.follow()
        return None
    _say(console, job)
    with _bar(console) as bar:
        shown = bar.add_task("tokens", total=sum(map(len, job.sequences)) / share.world)
        try:
            return build(
                args.output,
                job,
                lambda ids: run({"input_ids": ids.to(device)}),
                lambda tokens: bar.advance(shown, tokens),
                share,
            )
        finally:
            if isinstance(run, LedTeacher):
                run.done()


def _device(name: str | None) -> torch.device:
    """
    Raises:
        UserError: torch cannot compute there.
    """
    found = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with as_user_error(
        f"--device {found}: expected one that torch has here, such as cpu", Exception
    ):
        device = torch.device(found)
        if device.type == "cuda" and device.index is None:  # each of a machine's processes its own
            here = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            device = torch.device("cuda", here)
        torch.zeros(1, device=device).add(1).cpu()
    return device


def _say(console: Console, job: Job) -> None:
    tokens, size = sum(map(len, job.sequences)), job.layout.most_bytes_per_token
    fixed = job.layout.policy.kind != "sample" and job.layout.policy.top_p is None
    console.print(
        f"{len(job.sequences):,} sequences, {tokens:,} tokens, {job.layout.policy}: "
        f"{'about' if fixed else 'at most'} {size:.1f} bytes per token, "
        f"{tokens * size / 1e6:,.1f} MB in {job.facts['dtype']} from {job.facts['teacher']}"
    )


class Sequences(Sequence[np.ndarray]):
    """The rows of data sets, neighbours of one length, as arrays that are made when they are asked
    for."""

    def __init__(self, *parts: Dataset | None) -> None:
        there = [part.select_columns("input_ids") for part in parts if part is not None]
        rows = concatenate_datasets(there)
        lengths = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
        if (lengths[1:] < lengths[:-1]).any():
            rows = rows.select(np.argsort(lengths, kind="stable"))
        self.rows = rows.with_format("numpy")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.rows[place]["input_ids"]
