"""One call of kd_loss: plain numbers, then tensors, then a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, kd_loss, kd_loss_and_metrics

from .card import Card

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
TAILS = ("bucket", "drop", "renormalize")
BENT: dict[str, Any] = {"logit_scale": 0.5, "softcap": 20.0}
STD = 2.5  # of logits, as in race/case.py


@dataclass(frozen=True)
class Call:
    form: str = "dense"  # "head"; one head: "mixed" the student's, "other" the teacher's; or a tail
    divergence: str = "forward_kl"
    dtype: str = "bf16"
    rows: int = 8
    vocab: int = 1000
    hidden: tuple[int, int] = (0, 0)
    temperature: float = 2.0
    ce: float = 1.0
    more: tuple[tuple[str, Any], ...] = ()  # further keywords
    mode: str = "train"  # "eval"; "metrics"; "frozen": the student's head has no gradient
    launch: tuple[tuple[str, Any], ...] = ()  # fields of the Launch, other than the table has them
    look: str = ""  # "masked", "ignored", "sliced", "close", "weights", "bent": the tensors'

    def but(self, **changes: Any) -> Call:
        return replace(self, **changes)

    @property
    def label(self) -> str:
        heads = f" H={self.hidden[0]}+{self.hidden[1]}" if any(self.hidden) else ""
        words = [self.divergence, self.form, self.dtype, f"{self.rows}x{self.vocab}{heads}"]
        words += [f"T={self.temperature:g}", "" if self.ce == 1 else f"ce={self.ce:g}", self.look]
        words += [f"{key}={value}" for key, value in self.more]
        joint = dict(self.launch).get("joint")
        words += ["joint"] if joint else [f"{key}={value}" for key, value in self.launch]
        words += ["" if self.mode == "train" else self.mode]
        return " ".join(filter(None, words))

    @property
    def bytes_an_entry(self) -> int:
        """Each tensor of the vocabulary's width moved once: the least."""
        tensors = (self.form not in TAILS) + 1 + (self.mode != "eval")
        return tensors * DTYPES[self.dtype].itemsize


class Problem(NamedTuple):
    """The arguments of a call, and what a gradient is wanted for, by the oracle's names."""

    student: Tensor | LMHead
    teacher: Tensor | LMHead | SparseTeacher
    labels: Tensor | None
    keywords: dict[str, Any]
    leaves: dict[str, Tensor]


def problem_of(call: Call, card: Card, seed: int = 0) -> Problem:
    """Random tensors; the teacher agrees with the student in part, as it would."""
    generator = torch.Generator(card.device).manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        empty = torch.empty(shape, dtype=DTYPES[call.dtype], device=card.device)
        return empty.normal_(0, std, generator=generator)

    def head(width: int, bent: bool = False) -> LMHead:
        hidden = normal(call.rows, width, std=1.0)
        weight = normal(call.vocab, width, std=STD / width**0.5)
        return (
            LMHead(hidden, weight, normal(call.vocab, std=1.0), **BENT)
            if bent
            else LMHead(hidden, weight)
        )

    close = call.look == "close"
    student = teacher = None
    if not call.hidden[0]:
        student = normal(call.rows, call.vocab, std=STD)
    if not call.hidden[1]:
        teacher = normal(call.rows, call.vocab, std=0.01 if close else STD / 2)
        if student is not None:
            teacher.add_(student, alpha=1.0 if close else 0.8)
    labels = torch.randint(call.vocab, (call.rows,), generator=generator, device=card.device)
    keywords = keywords_of(call, card)
    if call.look == "weights":
        keywords["token_weights"] = torch.arange(call.rows, device=card.device) % 3
    if call.look in LOOKS:
        student, teacher, labels = LOOKS[call.look](student, teacher, labels)
    sides = (
        head(call.hidden[0], call.look == "bent") if student is None else student,
        head(call.hidden[1])
        if teacher is None
        else _sparse(teacher, call.form)
        if call.form in TAILS
        else teacher,
    )
    leaves = (
        {"logits": sides[0]}
        if isinstance(sides[0], Tensor)
        else _leaves(sides[0], call.mode == "frozen")
    )
    for leaf in leaves.values():
        leaf.requires_grad_(call.mode != "eval")
    return Problem(*sides, labels if call.ce else None, keywords, leaves)


def _leaves(head: LMHead, frozen: bool) -> dict[str, Tensor]:
    leaves = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    wanted = ("hidden",) if frozen else tuple(leaves)
    return {name: x for name, x in leaves.items() if x is not None and name in wanted}


def _masked(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    some = torch.arange(student.shape[-1], device=student.device) % 5 == 3
    return (
        student.masked_fill_(some, -math.inf),
        teacher.masked_fill_(some, -math.inf),
        labels // 5 * 5,
    )


def _ignored(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    labels[1::3] = -100
    student[1::3] = math.nan
    return student, teacher, labels


def _sliced(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``logits[:, :-1]`` lies."""
    pairs = (
        x[: len(x) // 2 * 2].view(2, -1, *x.shape[1:])[:, :-1] for x in (student, teacher, labels)
    )
    return tuple(pairs)  # type: ignore[return-value]


LOOKS = {"masked": _masked, "ignored": _ignored, "sliced": _sliced}


def _sparse(teacher: Tensor, tail: str, count: int = 64) -> SparseTeacher:
    """The most probable of each row, by 512 rows: no fp32 copy of all."""
    count = min(count, teacher.shape[-1] // 2)
    rows = [x.float().log_softmax(-1).topk(count) for x in teacher.split(512)]
    log_probs, ids = (torch.cat([part[i] for part in rows]) for i in (0, 1))
    return SparseTeacher(ids, log_probs, tail)


def keywords_of(call: Call, card: Card) -> dict[str, Any]:
    keywords: dict[str, Any] = {
        "divergence": call.divergence,
        "temperature": call.temperature,
        "ce_weight": call.ce,
        **dict(call.more),
    }
    return {**keywords, "backend": card.backend} if card.backend else keywords


def step_of(call: Call, problem: Problem) -> Callable[[], tuple[Any, ...]]:
    """The loss, and its gradients where the call has any."""
    student, teacher, labels, keywords, leaves = problem

    def step() -> tuple[Any, ...]:
        with launched(call):
            return once()

    def once() -> tuple[Any, ...]:
        if call.mode == "eval":
            with torch.no_grad():
                return (kd_loss(student, teacher, labels, **keywords),)
        if call.mode == "metrics":
            loss, _ = kd_loss_and_metrics(student, teacher, labels, **keywords)
        else:
            loss = kd_loss(student, teacher, labels, **keywords)
        total = loss.sum() if loss.dim() else loss
        return loss.detach(), *torch.autograd.grad(total, list(leaves.values()))

    return step if call.launch else once


@contextlib.contextmanager
def launched(call: Call) -> Iterator[None]:
    """Dense and sparse rows go by the call's launch instead of the table's."""
    from fusedkd.kernels.triton import config

    chosen = config.choose
    try:
        config.choose = lambda *size: replace(chosen(*size), **dict(call.launch))
        yield
    finally:
        config.choose = chosen


def moved(problem: Problem, card: Card) -> Problem:
    """The same tensors on another device; of dense students."""
    student = problem.student.detach().to(card.device).requires_grad_()  # type: ignore[union-attr]
    teacher: Any = problem.teacher
    if isinstance(teacher, SparseTeacher):
        parts = (teacher.indices.to(card.device), teacher.log_probs.to(card.device))
        teacher = SparseTeacher(*parts, teacher.tail)
    else:
        teacher = teacher.to(card.device)
    labels = None if problem.labels is None else problem.labels.to(card.device)
    keywords = problem.keywords | {"backend": card.backend}
    return Problem(student, teacher, labels, keywords, {"logits": student})
