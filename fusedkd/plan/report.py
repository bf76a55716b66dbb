"""All that ``fusedkd plan`` says, as plain data, and the advice that follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fusedkd.cut import CHUNK_BYTES, gpu_budget
from fusedkd.models.loading import required
from fusedkd.models.saved import SavedModel
from fusedkd.plan.bodies import Body
from fusedkd.plan.caches import caches
from fusedkd.plan.gpus import RESERVED, Gpu
from fusedkd.plan.losses import EAGER, HEADS, WAYS, Setting
from fusedkd.plan.step import Step

WORTH = 0.03  # of the peak: what saves less is no advice


def report(args: Any, gpu: Gpu | None) -> dict[str, Any]:
    """Of the command line's arguments.

    Raises:
        UserError: a model that cannot be planned.
    """
    budget = CHUNK_BYTES["cuda"] if gpu is None else gpu_budget(gpu.memory)
    setting = Setting(args.counted, chunk_bytes=budget, top_k=args.top_k)
    student, teacher = (
        Body(SavedModel(role, required(role, getattr(args, role)), args.dtype), args.seq)
        for role in ("student", "teacher")
    )
    step = Step(student, teacher, setting)
    ways = {way.name: _way(step, way, args.batch, gpu) for way in WAYS}
    made = {
        "student": _model(student, args.student),
        "teacher": _model(teacher, args.teacher),
        "batch": args.batch,
        "seq": args.seq,
        "counted": args.counted,
        "dtype": args.dtype,
        "gpu": None if gpu is None else {"name": gpu.name, "memory": gpu.memory},
        "losses": ways,
        "caches": [
            {"kind": kept.name, "bytes_per_token": kept.per_token,
             "bytes": round(kept.per_token * args.tokens) + kept.once}
            for kept in caches(
                step.sides.vocab_size, teacher.hidden_size, teacher.head_bytes,
                args.top_k, args.sample,
            )
        ],
    }  # fmt: skip
    if gpu is not None and gpu.bandwidth:
        made["computed_seconds"] = _seconds(step, args.batch, gpu)
    return made | {"advice": advice(made)}


def _model(body: Body, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": type(body.model).__name__,
        "parameters": body.numbers,
        "weights": body.weights,
        "vocabulary": body.vocab_size,
        "hidden": body.hidden_size,
    }


def _way(step: Step, way: Any, batch: int, gpu: Gpu | None) -> dict[str, Any]:
    reason = way.unavailable(step.sides)
    if reason is not None:
        return {"unavailable": reason}
    made: dict[str, Any] = {"what": way.what, "loss": step.loss(way, batch).peak}
    for name, checkpointing in (("plain", False), ("checkpointing", True)):
        peak = step.peak(way, batch, checkpointing)
        made[name] = {"total": peak.total, "when": peak.phase, **peak._asdict()}
        del made[name]["phase"]
        if gpu is not None:
            most = step.largest(way, gpu.memory - RESERVED, checkpointing)
            made[name]["largest_batch"] = most
    return made


def _seconds(step: Step, batch: int, gpu: Gpu) -> dict[str, Any]:
    """The least that each part can take, and what of the whole the loss then is."""
    size = torch.empty((), dtype=step.student.dtype).itemsize
    models = np.concatenate([line.at(batch) for line in (step.answering, *step.training(False))])
    rest = gpu.seconds(models, size)
    found: dict[str, Any] = {"models": rest}
    for way in WAYS:
        if way.name in (EAGER, HEADS):
            own = gpu.seconds(step.loss(way, batch).table, size)
            found[way.name] = {"loss": own, "share": own / (own + rest)}
    return found


def advice(made: dict[str, Any]) -> list[str]:
    """What to change first: what saves most, by the numbers, comes first."""
    ours, eager = made["losses"][HEADS], made["losses"][EAGER]
    now, found = ours["plain"]["total"], list[tuple[int, str]]()

    def offer(saved: int, text: str) -> None:
        if saved > WORTH * now:
            found.append((saved, f"{text}: {gib(saved)} less."))

    checkpointed = ours["checkpointing"]["total"]
    offer(
        now - checkpointed,
        "Gradient checkpointing (--gradient_checkpointing true), for about a third more time of "
        "the student",
    )
    for name, flag in (
        ("fusedkd, hidden cached", "fusedkd cache --hidden int8"),
        ("fusedkd, top k cached", "fusedkd cache --top-k"),
    ):
        cached = made["losses"][name]
        offer(now - cached["plain"]["total"], f"A cache of the teacher's answers ({flag})")
    if ours["plain"]["state"] > ours["plain"]["activations"]:
        state = ours["plain"]["state"]
        offer(round(0.75 * state), "An optimizer of 8-bit states (--optim adamw_bnb_8bit)")
    lines = [text for _, text in sorted(found, reverse=True)]
    if "plain" in eager and eager["plain"]["total"] - now > WORTH * now:
        lines.insert(
            0,
            f"Compute the loss from the heads, as `fusedkd distill` does: {gib(now)} instead of "
            f"the {gib(eager['plain']['total'])} of logits in plain torch.",
        )
    gpu = made["gpu"]
    if gpu is not None:
        lines.insert(0, _fit(made, ours, gpu))
    return lines


def _fit(made: dict[str, Any], ours: dict[str, Any], gpu: dict[str, Any]) -> str:
    plain, checkpointed = (ours[name] for name in ("plain", "checkpointing"))
    batch, room = made["batch"], gpu["memory"] - RESERVED
    if plain["total"] <= room:
        most = plain["largest_batch"]
        return f"A batch of {batch} fits {gpu['name']}, and up to {most} would."
    if checkpointed["total"] <= room:
        most = checkpointed["largest_batch"]
        return (
            f"A batch of {batch} fits {gpu['name']} with gradient checkpointing alone, and up to "
            f"{most} would."
        )
    if checkpointed["largest_batch"]:
        return (
            f"A batch of {batch} does not fit {gpu['name']}: {checkpointed['largest_batch']} with "
            f"gradient checkpointing, and --gradient_accumulation_steps for the rest."
        )
    return (
        f"Not even one sequence fits {gpu['name']}: a shorter --seq, a cache instead of the "
        "teacher, or several devices (FSDP, DeepSpeed)."
    )


def gib(size: float) -> str:
    """Bytes in words."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} B"
