"""Step: milliseconds a step, and the share of the copy bandwidth that they are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import roofline
from ..roofline import Counts, Gpu
from ..sass import Sweep
from . import plans
from .calls import Call, Problem, keywords_of, problem_of, step_of
from .card import Card, rate
from .journal import Item, Journal, items_of
from .plans import Sizes


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    gigabytes = sizes.copies[len(sizes.copies) // 2]
    copied = card.copy(gigabytes, sizes.laps)
    card.free()
    journal.item("copy before", lambda: copied)
    held, models = _Held(card), _models(card, copied["gb_s"] * 1e9)

    def share(lap: Item, size: int) -> Item:
        moved = rate(lap, size)
        return {**moved, "share": round(100 * moved["gb_s"] / copied["gb_s"], 1)}

    def call_(call: Call) -> Item:
        step = step_of(call, held.problem(call))
        lap = card.lap(step, sizes.laps)
        item = share(lap, call.bytes_an_entry * call.rows * call.vocab)
        plain = Call(divergence=call.divergence, rows=sizes.rows, vocab=sizes.vocab)
        ways = {plain: call.divergence, plain.but(launch=plans.JOINT): f"{call.divergence} joint"}
        modelled = models.get(ways.get(call, ""), {})
        return {**item, **modelled, "peak": card.peak(step)}

    def chunk(name: str) -> Item:
        rows, vocab = max(2, sizes.rows // 2), sizes.vocab
        lap = card.lap(_chunk(name, rows, vocab, card), sizes.laps)
        return share(lap, 10 * rows * vocab)

    for call in plans.timed(sizes):
        journal.item(call.label, call_, call)
    held.clear()
    for name in ("forward_kl", "jsd", "alpha")[: 1 if sizes.tiny else 3]:
        journal.item(f"{name} head's chunk", chunk, name)
        card.free()
    journal.item("copy after", card.copy, gigabytes, sizes.laps)


def _models(card: Card, copy: float) -> dict[str, Item]:
    """By divergence: what the kernels that "compile" has counted could reach here."""
    gpu = Gpu(copy=copy)
    if card.cuda:
        properties = torch.cuda.get_device_properties(0)
        sizes = {"processors": card.processors, "l2_bytes": float(properties.L2_cache_size)}
        gpu = replace(gpu, **sizes)
    state = Path(os.environ["TRITON_CACHE_DIR"]).parent
    models = {}
    for item in items_of(state / "compile.jsonl"):
        if item["name"].startswith("counted ") and "sweeps" in item:
            sweeps = [Sweep(**sweep) for sweep in item["sweeps"]]
            fields = {field: item[field] for field in Counts._fields}
            modelled = roofline.share(Counts(**{**fields, "sweeps": sweeps}), gpu)
            percent = round(100 * modelled.share, 1)
            models[item["name"].removeprefix("counted ")] = {
                "modelled": percent,
                "limit": modelled.limit,
            }
    return models


class _Held:
    """The last tensors, for calls that differ in numbers alone."""

    def __init__(self, card: Card) -> None:
        self.card, self.tensors = card, dict[Call, Problem]()

    def clear(self) -> None:
        self.tensors.clear()
        self.card.free()

    def problem(self, call: Call) -> Problem:
        key = call.but(divergence="", temperature=2.0, ce=1.0, mode="train")
        if key not in self.tensors:
            self.clear()
            self.tensors[key] = problem_of(key.but(divergence=call.divergence), self.card)
        problem = self.tensors[key]
        labels = problem.labels if call.ce else None
        return problem._replace(labels=labels, keywords=keywords_of(call, self.card))


def _chunk(name: str, rows: int, vocab: int, card: Card) -> Any:
    """A head's rows, as the loop over chunks has them: fp32 logits, a bf16 gradient."""
    from fusedkd import backends, divergences
    from fusedkd.kernels import RowCall
    from fusedkd.spec import LossSpec

    problem = problem_of(Call(rows=rows, vocab=vocab, dtype="fp32"), card)
    student, teacher = (x.detach()[None] for x in (problem.student, problem.teacher))  # type: ignore[union-attr]
    spec = LossSpec(divergences.make(name), vocab, 2.0, 2.0, ce_weight=1.0)
    weights = torch.full((rows,), 1 / rows, device=card.device)
    grad = torch.empty(student.shape, dtype=torch.bfloat16, device=card.device)
    call = RowCall(student, teacher, problem.labels, weights, spec, grad, False)
    backend = backends.load("triton")
    return lambda: backend.rows(call)
