"""The arguments of a call, checked here and nowhere else, as what the rest works on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import backends, divergences, row_rules
from fusedkd.checks import (
    check_constant,
    check_device,
    check_divides,
    check_heat,
    check_normalizer,
    check_tensor,
)
from fusedkd.distributions import LMHead, SparseTeacher, student_side, teacher_side
from fusedkd.distributions.side import Side, autocast_dtype, check_pair, true_vocabulary
from fusedkd.divergences import Divergence
from fusedkd.inputs import Inputs, Plan, Wanted
from fusedkd.modes import stand_in
from fusedkd.row_rules import RowRule
from fusedkd.spec import IDENTITY, LossSpec, Transform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fusedkd.parallel import Shards
    from fusedkd.routed import Routed

NO_GRADIENT = Wanted(False, False, False, False)


class Arguments(NamedTuple):
    """What :func:`fusedkd.kd_loss` was given, by its names."""

    student: Tensor | LMHead
    teacher: Tensor | LMHead | SparseTeacher | Routed | None
    labels: Tensor | None
    divergence: str | Divergence
    temperature: float
    teacher_temperature: float | None
    kd_weight: float
    ce_weight: float
    scale_by_t2: bool
    ignore_index: int
    label_smoothing: float
    z_loss_weight: float
    token_weights: Tensor | None
    reduction: str
    normalizer: float | Tensor | None
    num_counted: int | None
    row_rule: RowRule | str | None
    vocab_size: int | None
    inplace: bool
    chunk_bytes: int | None
    group: ProcessGroup | None
    backend: Any

    def spec(self, vocab_size: int, student: Transform, teacher: Transform) -> LossSpec:
        """The hyper-parameters, checked."""
        check_divides(self.normalizer, self.reduction)
        heat = self.teacher_temperature
        spec = LossSpec(
            divergence=divergences.resolve(self.divergence),
            vocab_size=vocab_size,
            temperature=self.temperature,
            teacher_temperature=self.temperature if heat is None else heat,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            scale_by_t2=self.scale_by_t2,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss_weight=self.z_loss_weight,
            reduction=self.reduction,
            student_transform=student,
            teacher_transform=teacher,
            row_rule=row_rules.resolve(self.row_rule),
        )
        return _checked(spec)

    def plan(self, wanted: Wanted) -> Plan:
        """How it is computed, checked as far as the tensors have no say in it."""
        backends.check_name(self.backend)
        return Plan(
            wanted,
            backend=self.backend,
            inplace=self.inplace,
            chunk_bytes=self.chunk_bytes,
            num_counted=self.num_counted,
        ).checked()

    def check(self) -> None:
        """Raise where something is wrong that no tensor has a say in."""
        self.spec(1 if self.vocab_size is None else self.vocab_size, IDENTITY, IDENTITY)
        self.plan(NO_GRADIENT)


class Call(NamedTuple):
    """A checked call."""

    inputs: Inputs
    spec: LossSpec
    plan: Plan
    weights: Tensor  # (N,) in the accumulation type, 0 where the token does not count
    leading: torch.Size  # of the tokens
    teacher_entropy: Tensor | None  # (...,) where the teacher brings it
    traced: bool  # the tensors may be stand-ins without memory

    @classmethod
    def of(cls, given: Arguments, metrics: bool, shards: Shards | None = None) -> Call:
        """Check all there is to check.

        Args:
            given: of whole tensors; or, with ``shards``, of the columns that lie here.
            metrics: whether they are wanted.

        Raises:
            ValueError, TypeError: naming the argument, what came, what was expected, the remedy.
        """
        s = student_side(given.student)
        t = teacher_side(given.teacher)  # type: ignore[arg-type]  # Routed is calls of its own
        check_pair(s, t)
        size = shards.vocab_size if shards else true_vocabulary(s, t, given.vocab_size)
        spec = given.spec(size, s.transform, t.transform)
        check_tokens(s, t, given.labels, given.token_weights, spec)
        wide = torch.float64 in (s.tensor.dtype, t.dtype)
        accumulate = torch.float64 if wide else torch.float32
        check_heat("temperature", spec.temperature, accumulate)
        check_heat("teacher_temperature", spec.teacher_temperature, accumulate)
        traced = stand_in(s.tensor, s.weight, s.bias, t.tensor, t.weight, t.bias, t.indices)
        plan = _plan(given, s, t, metrics, traced, shards)
        labels = None if given.labels is None else given.labels.reshape(-1)
        weights = _row_weights(s, labels, given.token_weights, spec, accumulate)
        row_scale = row_scale_of(weights, given.normalizer, spec, plan)
        weight, bias = _detached(t.weight), _detached(t.bias)
        teacher = (t.tensor, weight, bias, t.indices)
        inputs = Inputs(s.tensor, s.weight, s.bias, *teacher, s.ids, t.ids, labels, row_scale)
        return cls(inputs, spec, plan, weights, s.leading, t.entropy, traced)


def _plan(
    given: Arguments, s: Side, t: Side, metrics: bool, traced: bool, shards: Shards | None
) -> Plan:
    grad = torch.is_grad_enabled()
    hidden, weight, bias = (
        grad and x is not None and x.requires_grad for x in (s.tensor, s.weight, s.bias)
    )
    plan = given.plan(Wanted(hidden, weight, bias, metrics))
    if t.tail is not None or traced or shards is not None:
        plan = plan._replace(
            tail=t.tail,
            inplace=plan.inplace and not traced,
            chunk_columns=None if shards is None else shards.chunk_columns,
        )
    if plan.num_counted is None and given.labels is given.token_weights is None:
        plan = plan._replace(num_counted=s.leading.numel())
    autocast = autocast_dtype(s, t)
    return plan if autocast is None else plan._replace(autocast=autocast)


def check_tokens(
    s: Side, t: Side, labels: Tensor | None, token_weights: Tensor | None, spec: LossSpec
) -> None:
    """Raise unless what comes one per token fits the student, and what the loss needs is there."""
    if t.tensor is None and spec.kd_weight:
        raise ValueError(
            f"teacher is None, but kd_weight={spec.kd_weight:g}: expected logits, LMHead(hidden, "
            "weight) or SparseTeacher(indices, log_probs); or kd_weight=0, for cross-entropy alone."
        )
    if labels is None and spec.ce_weight > 0:
        raise ValueError(f"ce_weight={spec.ce_weight:g} needs labels, but labels is None.")
    if spec.row_rule is not None:
        _check_rule(spec.row_rule, t, labels)
    for name, tensor in (("labels", labels), ("token_weights", token_weights)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.shape != s.leading:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(s.leading)}, one entry "
                "per token of the student."
            )
        check_device(name, tensor, "student", s.tensor)
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}: expected torch.int64; use labels.long().")
    if token_weights is not None:
        check_constant("token_weights", token_weights, "real numbers or bool")


def _check_rule(rule: RowRule, t: Side, labels: Tensor | None) -> None:
    if t.tensor is None:
        raise ValueError(
            f"row_rule={rule!r}, but teacher is None: a rule is a factor on the divergence from "
            "one. Expected a teacher, or row_rule=None."
        )
    if labels is None and "label_log_prob" in rule.statistics:
        raise ValueError(
            f"row_rule={rule!r} asks for label_log_prob, but labels is None: expected labels, or a "
            "rule of other statistics."
        )


def _row_weights(
    s: Side,
    labels: Tensor | None,
    token_weights: Tensor | None,
    spec: LossSpec,
    dtype: torch.dtype,
) -> Tensor:
    """(N,) weight of each token, exactly 0 where it does not count."""
    if token_weights is None:
        if labels is None:
            return s.tensor.new_ones(s.leading.numel(), dtype=dtype)
        return (labels != spec.ignore_index).to(dtype)
    weights = token_weights.detach().reshape(-1).to(dtype)
    if labels is None:
        return weights
    return weights.masked_fill(labels == spec.ignore_index, 0.0)


def row_scale_of(
    weights: Tensor, normalizer: float | Tensor | None, spec: LossSpec, plan: Plan
) -> Tensor:
    """(N,) weights over what their weighted sum is divided by."""
    if normalizer is None:
        if spec.reduction != "mean":
            return weights
        # in fp64, so that weights of 0 between others change nothing; 0 over 0 is 0
        total = weights.sum(dtype=torch.float64)
        row_scale = weights / (total + (total == 0))
    else:
        row_scale = (weights / divisor(weights, normalizer)).masked_fill(weights == 0, 0.0)
    if plan.num_counted is not None:  # what underflows is no less counted
        tiny = torch.finfo(weights.dtype).tiny
        row_scale = row_scale.masked_fill((row_scale == 0) & (weights != 0), tiny)
    return row_scale


def divisor(weights: Tensor, normalizer: float | Tensor) -> Tensor:
    """``normalizer`` as a number beside the weights."""
    check_normalizer(normalizer)
    if isinstance(normalizer, Tensor):
        return normalizer.detach().reshape(()).to(device=weights.device, dtype=weights.dtype)
    # new_full would have dynamo trace one graph a value
    return weights.new_ones(()) * float(normalizer)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _checked(spec: LossSpec) -> LossSpec:
    if torch.compiler.is_compiling():  # dynamo has no use for a memory, and warns of it
        return spec.checked()
    try:
        _remembered(*spec)
    except TypeError:  # something that cannot be remembered, or a mistake, which is said here
        return spec.checked()
    return spec  # not the remembered one: divergences made by hand are equal by name


@functools.lru_cache(maxsize=64, typed=True)  # of each field: True is no 1
def _remembered(*fields: Any) -> None:
    """A training repeats its hyper-parameters, and checking them takes 9 us of a small call (2026-
    11-28, AMD Zen 5)."""
    LossSpec(*fields).checked()
