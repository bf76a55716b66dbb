"""A loss that is no number stops a run: where it came from, and what may be done.

Nothing waits for the device. A GPU's verdict on a batch is copied to the host behind its loss, and
looked at once it has arrived: a step or two later, and in any case before something is logged or
saved.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedkd import LMHead
from fusedkd.errors import NotFinite
from fusedkd.train.checkpoints import newest

logger = logging.getLogger(__name__)

_SHOWN = 5  # rows


@torch.no_grad()
def finite_rows(side: Any, counted: Tensor | None) -> Tensor | None:
    """(B,) whether a side's answers to what is ``counted`` (B, ...) are numbers; None: they lie in
    a cache, where they were checked. Logits may be -inf."""
    if not isinstance(side, Tensor | LMHead):
        return None
    if isinstance(side, LMHead):
        # one pass without a copy; 1 / 1000 of the products with the head at V = 100,000
        ok = torch.linalg.vector_norm(side.hidden.detach(), torch.inf, dim=-1).isfinite()
    else:
        ok = side.detach().amax(-1).isfinite() if side.numel() else side.new_ones((1,)).bool()
    if counted is not None and counted.shape == ok.shape:
        ok = ok | ~counted
    return ok.flatten(1).all(1) if ok.dim() > 1 else ok


@dataclass
class _Seen:
    """One micro-batch. ``verdict`` holds whether the loss is finite, then each side's rows."""

    step: int
    training: bool
    verdict: Tensor
    sides: dict[str, int]  # rows of each
    ids: Tensor | None
    arrived: Any = None  # an event

    def has_arrived(self) -> bool:
        return self.arrived is None or bool(self.arrived.query())


class Finite:
    """The verdicts that are still to be looked at."""

    def __init__(self) -> None:
        self._waiting: deque[_Seen] = deque()

    def see(
        self,
        trainer: Any,
        training: bool,
        loss: Tensor,
        rows: Callable[[], dict[str, Tensor | None]],
        inputs: dict[str, Any],
    ) -> None:
        """Take in one micro-batch; ``rows`` reads both sides' answers, which a CPU is spared where
        the loss is finite.

        Raises:
            NotFinite: an earlier one was not, or, on a CPU, this one.
        """
        if loss.device.type == "cpu" and loss.isfinite():
            return
        found = {name: ok.to(loss.device) for name, ok in rows().items() if ok is not None}
        verdict = torch.cat([loss.isfinite().reshape(1), *found.values()])
        arrived = None
        if loss.is_cuda:
            verdict = verdict.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        sides = {name: len(ok) for name, ok in found.items()}
        step = trainer.state.global_step + 1
        ids = inputs.get("input_ids")
        self._waiting.append(_Seen(step, training, verdict, sides, ids, arrived))
        self.check(trainer, wait=loss.device.type == "cpu")

    def check(self, trainer: Any, wait: bool) -> None:
        """Look at what has arrived, or with ``wait`` at all.

        Raises:
            NotFinite: a loss is not a number, of training, or before there is any to be lost.
        """
        while self._waiting and (wait or self._waiting[0].has_arrived()):
            seen = self._waiting.popleft()
            if seen.arrived is not None:
                seen.arrived.synchronize()
            if seen.verdict[0]:
                continue
            said = _explain(trainer, seen)
            if seen.training or trainer.state.global_step == 0:
                self._waiting.clear()
                raise NotFinite(said)
            logger.error(said)


def check_weights(trainer: Any) -> None:
    """
    Raises:
        NotFinite: a weight that is trained is NaN or infinite.
    """
    if (name := _broken(trainer.model, trained=True)) is not None:
        raise NotFinite(
            f"step {trainer.state.global_step}: the student's {name} is not finite, so it is not "
            f"saved.{_remedy_student(trainer)}"
            f"{_kept(trainer, trainer.state.global_step)}"
        )


@torch.no_grad()
def _broken(model: nn.Module, trained: bool = False) -> str | None:
    """The first weight that is not finite, by name."""
    names, largest = [], []
    for name, weight in _local(model, trained):
        names.append(name)
        largest.append(torch.linalg.vector_norm(weight.float(), torch.inf).cpu())
    bad = ~torch.stack(largest).isfinite() if largest else torch.zeros(0, dtype=torch.bool)
    return names[int(bad.int().argmax())] if bad.any() else None


def _local(model: nn.Module, trained: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        weight: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if weight.is_floating_point() and weight.numel() and (weight.requires_grad or not trained):
            yield name, weight


def _explain(trainer: Any, seen: _Seen) -> str:
    """Which step, rows and side, and why, in one paragraph."""
    parts = dict(zip(seen.sides, seen.verdict[1:].split(list(seen.sides.values())), strict=True))
    bad = {side: (~ok).nonzero()[:, 0].tolist() for side, ok in parts.items() if not ok.all()}
    where = f"step {seen.step}" if seen.training else f"evaluation at step {seen.step - 1}"
    process = trainer.args.process_index
    where += f", process {process}" if trainer.args.world_size > 1 else ""
    head = f"{where}: the loss is not a finite number."
    # what a broken student reads into a batch says nothing about the teacher
    named = [name for name in ("teacher", "student") if name in bad]
    side = named[0] if named else _by_weights(trainer)
    if side is None:
        return f"{head} {_of_the_loss(trainer)}{_kept(trainer, seen.step)}"
    rows = bad.get(side, [])
    if rows:
        head += f" The {side}'s answers are NaN or infinite in {_rows(rows, seen.sides[side])}"
        head += f"{_text(trainer, seen.ids, rows[0])}."
    if side == "teacher":
        return f"{head}{_remedy_teacher(trainer)}{_kept(trainer, seen.step)}"
    return f"{head}{_remedy_student(trainer)}{_kept(trainer, seen.step - 1)}"


def _by_weights(trainer: Any) -> str | None:
    """The side whose head, say, is broken, though what comes before it is finite."""
    for side, model in (("teacher", trainer.teacher), ("student", trainer.model)):
        if isinstance(model, nn.Module) and _broken(model) is not None:
            return side
    return None


def _rows(rows: list[int], total: int) -> str:
    if len(rows) == total:
        return f"all {total} rows of the batch" if total > 1 else "the only row of the batch"
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    return f"row{'s' if len(rows) > 1 else ''} {shown} of {total}"


def _text(trainer: Any, ids: Tensor | None, row: int) -> str:
    """How a row begins, to find it by."""
    decode = getattr(trainer.processing_class, "decode", None)
    if decode is None or ids is None or ids.dim() != 2 or row >= len(ids):
        return ""
    text = decode(ids[row, :24].tolist(), skip_special_tokens=True)
    return f"; row {row} begins {text[:60]!r}" if text.strip() else ""


def _dtype(model: Any) -> Any:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _remedy_teacher(trainer: Any) -> str:
    if not isinstance(trainer.teacher, nn.Module):
        return " The cache holds what is no number: verify it with fusedkd cache verify."
    half = _dtype(trainer.teacher) == torch.float16
    wider = "pass --teacher_dtype bfloat16 or float32"
    if (name := _broken(trainer.teacher)) is not None:
        first = f"{wider}; if that is not enough, the" if half else "the"
        return f" Its weight {name} is not finite: {first} checkpoint is damaged, take another."
    if half:
        return f" Likely float16 overflowed, whose largest number is 65,504: {wider}."
    return (
        " Its weights are finite: look at those rows (no real token, longer than its positions, "
        "tokens that it never saw), or pass --teacher_dtype float32."
    )


def _remedy_student(trainer: Any) -> str:
    if trainer.state.global_step == 0:
        if (name := _broken(trainer.model)) is not None:
            return f" Its weight {name} is not finite as loaded: take another checkpoint."
        return " Nothing was trained yet: look at those rows, or pass --student_dtype float32."
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    norm = f" (gradient norm {float(norms[-1]):.3g} when it was last logged)" if norms else ""
    half = _dtype(trainer.model) == torch.float16 or trainer.args.fp16
    fewer = ", bf16 instead of fp16" if half else ""
    rate = trainer.args.learning_rate
    return (
        f" The training diverged{norm}: try a --learning_rate below {rate:g}, --warmup_steps, a "
        f"smaller --max_grad_norm{fewer}."
    )


def _of_the_loss(trainer: Any) -> str:
    args = trainer.args
    terms = f", {', '.join(args.terms)}" if args.terms else ""
    return (
        f"Both models' answers are finite, so it is the loss: {args.divergence} at temperature "
        f"{args.temperature:g}{terms}. A student that gives a token no probability at all makes it "
        "infinite: try --divergence jsd."
    )


def _kept(trainer: Any, before: int) -> str:
    """Which checkpoint may be gone on from: of fewer steps than ``before``."""
    found = newest(Path(trainer.args.output_dir), before)
    return " No earlier checkpoint was saved." if found is None else f" {found} is from before."
