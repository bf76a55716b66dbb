"""A training step, put together of the models' bodies and the loss between them."""

from __future__ import annotations

from functools import cache, cached_property
from typing import NamedTuple

from fusedkd.plan.bodies import Body
from fusedkd.plan.losses import Cost, Setting, Sides, Way
from fusedkd.plan.watch import Line

MOST = 4096  # sequences: larger batches are not looked for
# Tokens from which on others' losses grow evenly: whole chunks of theirs (1,024 and 4,096). Their
# many operations on a million tokens would take minutes to follow.
SAMPLE = 8192

cost_of = cache(Way.cost)


class Peak(NamedTuple):
    """The most bytes that a step has at a time, and what they are then."""

    phase: str  # "teacher's forward", "forward", "loss", "backward" or "optimizer"
    weights: int  # the student's
    state: int  # its optimizer's
    teacher: int  # its weights, and hidden states
    gradients: int  # of weights, as far as they are there
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(self[1:])


class Step:
    """AdamW on ``batch`` sequences, in one piece, on one device. All gradients are let go of after
    it.

    Args:
        student, teacher: of the same length of sequences.
    """

    def __init__(self, student: Body, teacher: Body, setting: Setting) -> None:
        self.student, self.teacher, self.setting = student, teacher, setting
        self.sides = Sides(
            min(student.vocab_size, teacher.vocab_size),
            *(student.hidden_size, teacher.hidden_size, student.dtype),
            *(student.softcap, teacher.softcap, student.head.bias is not None),
        )
        self.training = cache(student.training)
        self.loss = cache(self._loss)

    @cached_property
    def answering(self) -> Line:
        return self.teacher.answering()

    def _loss(self, way: Way, batch: int) -> Cost:
        tokens = batch * self.student.length
        if not way.peer or tokens <= 2 * SAMPLE:
            return way.cost(tokens, self.sides, self.setting)
        one, two = (cost_of(way, n * SAMPLE, self.sides, self.setting) for n in (1, 2))
        more = tokens / SAMPLE - 1
        peak = round(one.peak + more * (two.peak - one.peak))
        return Cost(peak, two.kept, one.table * (1 + more))

    def peak(self, way: Way, batch: int, checkpointing: bool = False) -> Peak:
        """Of one step."""
        student, teacher = self.student, self.teacher
        forward, backward = (line.at(batch) for line in self.training(checkpointing))
        cost = self.loss(way, batch)
        saved = int(forward[-1, 0])
        weights = {"whole": teacher.weights, "head": teacher.head_bytes, "nothing": 0}[way.teacher]
        states = batch * student.length * teacher.hidden_size * teacher.dtype.itemsize
        states = 0 if way.teacher == "nothing" else states
        held = weights + states
        fixed = student.weights, student.state
        # at the backward's end all that lives are gradients; before, they come one by one
        late = int(backward[:, 0].argmax())
        most = int(backward[late, 0])
        made = min(student.gradients - cost.kept, max(0, most - saved))
        phases = [
            Peak("forward", *fixed, held, 0, int(forward[:, 0].max()), 0),
            Peak("loss", *fixed, held, cost.kept, saved, cost.peak - cost.kept),
            Peak("backward", *fixed, weights, cost.kept + made, most - made, 0),
            Peak("optimizer", *fixed, weights, student.gradients, 0, 0),
        ]
        if way.teacher == "whole":
            most = int(self.answering.at(batch)[:, 0].max())
            phases.append(Peak("teacher's forward", *fixed, weights, 0, most, 0))
        return max(phases, key=lambda peak: peak.total)

    def largest(self, way: Way, memory: int, checkpointing: bool = False) -> int:
        """The most sequences of which a step fits; 0: none."""
        low, high = 0, 1
        while self.peak(way, high, checkpointing).total <= memory:
            if high == MOST:
                return MOST
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.peak(way, middle, checkpointing).total <= memory
            low, high = (middle, high) if fits else (low, middle)
        return low
