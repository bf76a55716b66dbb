"""Row rules: a factor on each token's divergence, made of what is known of its row between the
sweeps. Entropy gates, token clips, weights for head and tail.

    loss = row_scale * (kd_scale * rule * D(p, q) + ce_weight * CE)

The factor is a constant: no gradient flows through the statistics that it is made of, which are

    divergence          D(p, q), without weights and T^2, at least 0
    teacher_entropy     of p, in nats
    student_entropy     of q
    label_log_prob      log q of the label
    teacher_top1        the largest entry of p
    student_top1        the largest entry of q

with p and q at the temperatures that the divergence compares them at. With a SparseTeacher
``teacher_entropy`` and ``teacher_top1`` are of its K probabilities, with the tail "bucket" also the
entropy of what remains; the student's are of its whole vocabulary.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedkd.formulas import Formula, called, defaults_of, imported
from fusedkd.tape import Tape
from fusedkd.trace import Recorder, place_of
from fusedkd.values import split_call

__all__ = ["RowRule", "custom"]

# Of a row, in the order of kernels/cpu's RuleNumbers; and where a rule is tried, from one end of
# what each may be to the other (an entropy is at most log V).
STATISTICS = {
    "divergence": (0.0, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e6, math.inf),
    "teacher_entropy": (0.0, 1e-6, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0),
    "student_entropy": (0.0, 1e-6, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0),
    "label_log_prob": (-math.inf, -1e4, -100.0, -30.0, -10.0, -3.0, -1.0, -0.1, -1e-6, 0.0),
    "teacher_top1": (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1.0),
    "student_top1": (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1.0),
}
_NUMBERS = {name: number for number, name in enumerate(STATISTICS)}


@dataclass(frozen=True)
class RowRule:
    """A rule and its parameters, as :func:`fusedkd.kd_loss` takes it: :func:`custom` makes them.

    Two are equal when name, recorded operations and parameters are.
    """

    name: str
    params: tuple[float, ...]
    key: str = field(repr=False)  # of the operations, for :func:`by_key`
    tape: Tape = field(compare=False, repr=False)
    statistics: tuple[str, ...] = field(compare=False, repr=False)  # those that it is made of

    def __reduce__(self) -> tuple[Any, ...]:
        return recorded, (self.name, self.params, self.tape)

    def factor(self, known: Mapping[str, Tensor]) -> Tensor:
        """(N,) of statistics (N,) by their names; NaN where the divergence is."""
        like = known["divergence"]
        numbers: list[Tensor | float] = [like] * len(STATISTICS)
        for name in self.statistics:
            ends = STATISTICS[name][0], STATISTICS[name][-1]
            most = None if name.endswith("entropy") else ends[1]
            numbers[_NUMBERS[name]] = known[name].to(like.dtype).clamp(ends[0], most)
        factor = self.tape(like, like, numbers + list(self.params))[0]
        return torch.where(like.isnan(), like, factor)


_TAPES: dict[str, tuple[str, int, Tape]] = {}  # with the number of parameters


def recorded(name: str, params: tuple[float, ...], tape: Tape) -> RowRule:
    """The rule that ``tape`` computes with these parameters."""
    key = f"{name}#{tape.key}"
    _TAPES[key] = name, len(params), tape
    used = {int(node.number) for node in tape.nodes if node.op == "parameter"}
    return RowRule(name, params, key, tape, tuple(x for x, i in _NUMBERS.items() if i in used))


def by_key(key: str, numbers: list[float]) -> RowRule:
    """One that this process has, by its key; its parameters are the last numbers."""
    name, count, tape = _TAPES[key]
    return recorded(name, tuple(numbers[len(numbers) - count :]), tape)


def recorded_tape(key: str) -> Tape:
    """Of one that this process has, by its key."""
    return _TAPES[key][2]


class Custom(Formula):
    """A rule of one's own: call it with its parameters for a :class:`RowRule`."""

    kind = "row rule"

    def __init__(self, formula: Callable[..., Tensor]) -> None:
        self.inputs, defaults = _signature(formula)
        super().__init__(formula, defaults, _traced(formula, self.inputs, defaults))

    def check(self, values: tuple[float, ...]) -> None:
        _check(self.__name__, self.tape, self.inputs, values)

    def __call__(self, *positional: float, **named: float) -> RowRule:
        """The rule with these parameters; the others have their defaults.

        Raises:
            TypeError: a parameter that it does not have.
            ValueError: one that is no finite number, or with which it is no factor somewhere.
        """
        return recorded(self.__name__, self.values(positional, named), self.tape)


def _signature(formula: Callable[..., Tensor]) -> tuple[dict[str, int], dict[str, float]]:
    """Its statistics, each with its number, and its parameters with their defaults."""
    where = f"row_rules.custom: {formula.__name__}{inspect.signature(formula)}"
    parameters = list(inspect.signature(formula).parameters.values())
    inputs = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in inputs if name not in STATISTICS]
    if unknown or not inputs or len(inputs) + len(rest) < len(parameters):
        what = f"{unknown[0]} is no statistic of a row: " if unknown else ""
        raise TypeError(
            f"{where}: {what}expected some of {', '.join(STATISTICS)}; behind * parameters, "
            "parameter=default."
        )
    return {name: _NUMBERS[name] for name in inputs}, defaults_of(formula, where, rest)


def _traced(
    formula: Callable[..., Tensor], inputs: dict[str, int], parameters: dict[str, float]
) -> Tape:
    """What ``formula(*inputs, **parameters)`` computes of a row, as a function of the parameters of
    a tape: those of such numbers are the inputs, and the formula's own come behind ``STATISTICS``.

    Raises:
        ValueError: as :func:`fusedkd.trace.trace`.
    """
    recorder = Recorder(formula, ", ".join(inputs), "row")
    first = len(STATISTICS)
    numbers = recorder.numbers(parameters, range(first, first + len(parameters)))
    tensors = torch.full((len(inputs), 3), 0.5).unbind()
    for tensor, number in zip(tensors, inputs.values(), strict=True):
        recorder.know(tensor, recorder.builder.node("parameter", number=number))
    tape = recorder.builder.constant_tape(recorder.run(tensors, numbers))
    if not any(node.op == "parameter" and node.number < first for node in tape.nodes):
        raise ValueError(f"{place_of(formula)}: the result does not depend on {recorder.inputs}.")
    return tape


def _check(name: str, tape: Tape, inputs: dict[str, int], parameters: Sequence[float]) -> None:
    """Whether the tape is a factor wherever its inputs may lie.

    Raises:
        ValueError: NaN, infinite or less than 0 somewhere; names the point and the remedy.
    """
    for dtype in (torch.float64, torch.float32):
        axes = [torch.tensor(STATISTICS[x], dtype=dtype) for x in inputs]
        points = [x.flatten() for x in torch.meshgrid(*axes, indexing="ij")]
        numbers: list[Tensor | float] = [points[0]] * len(STATISTICS) + list(parameters)
        for point, number in zip(points, inputs.values(), strict=True):
            numbers[number] = point
        factors = tape(points[0], points[0], numbers)[0]
        wrong = ~(factors >= 0) | factors.isinf()
        if wrong.any():
            at = int(wrong.nonzero()[0])
            said = ", ".join(f"{x} = {p[at].item():g}" for x, p in zip(inputs, points, strict=True))
            raise ValueError(
                f"{name}: the factor is {factors[at].item():g} at {said} (in {dtype}): expected a "
                "finite number of at least 0. Guard it: torch.clamp(..., min=0.0, max=...), or "
                "torch.where(divergence > 0, ..., 1.0)."
            )


def custom(formula: Callable[..., Tensor]) -> Custom:
    """A decorator: a factor on each row's divergence and on its gradient, as a constant.

    >>> @row_rules.custom
    ... def entropy_gate(teacher_entropy, *, threshold=2.0):
    ...     return teacher_entropy < threshold
    >>> loss = kd_loss(student, teacher, row_rule=entropy_gate(threshold=1.5))

    ``formula(statistic, ..., *, parameter=default, ...)`` asks for a row's statistics by the names
    of its arguments (see this module's docstring) and returns the factor: a number of at least 0,
    or True and False for 1 and 0. It is recorded once, as the elementwise torch operations that it
    makes on one number for each row, and computed between the sweeps; parameters are numbers at run
    time. With a factor of 0 the divergence is left out of the row, even where it is infinite;
    cross-entropy and metrics are what they are without a rule, and so is what "mean" divides by.

    Raises:
        TypeError: a signature of another kind, a statistic that there is not.
        ValueError: an operation that is not known or not elementwise, or control flow on values, in
            which line; a factor that is NaN, infinite or less than 0 somewhere, with the point.
    """
    if not callable(formula) or not hasattr(formula, "__code__"):
        raise TypeError(f"row_rules.custom({formula!r}): expected a Python function.")
    return Custom(formula)


def resolve(rule: RowRule | str | None) -> RowRule | None:
    """What a caller gives as ``row_rule``, as an object.

    Raises:
        TypeError: none.
        ValueError: a text that is no ``"my_module:entropy_gate(threshold=1.5)"``, or a module that
            has no such rule. **The module is imported.**
    """
    if rule is None or isinstance(rule, RowRule):
        return rule
    if not isinstance(rule, str):
        hint = " (called, not the function itself)" if isinstance(rule, Custom) else ""
        raise TypeError(
            f"row_rule={rule!r}: expected what a function that @row_rules.custom made returns"
            f"{hint}, a text such as 'my_module:entropy_gate(threshold=1.5)', or None."
        )
    module, _, text = rule.strip().partition(":")
    example = "'my_module:entropy_gate(threshold=1.5)'"
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module) or not text:
        raise ValueError(f"row_rule={rule!r}: expected a module and a rule of it, as in {example}.")
    call = split_call("row_rule", text, example)
    factory = imported("row_rule", rule, module, call[0], Custom, "@row_rules.custom")
    made: RowRule = called("row_rule", rule, call, factory)
    return made
