"""The public functions: arguments in, a loss and its metrics out. No mathematics here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedkd import autograd, backends, parallel
from fusedkd.call import Arguments, Call
from fusedkd.checks import check_whole, with_defaults
from fusedkd.direct import direct_loss
from fusedkd.distributions import LMHead, SparseTeacher, student_side, teacher_side
from fusedkd.divergences import Divergence
from fusedkd.routed import Routed, routed_loss, together
from fusedkd.row_rules import RowRule
from fusedkd.spec import METRIC_COLUMNS, OF_TEACHER

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KDMetrics(NamedTuple):
    """What :func:`kd_loss_and_metrics` measures: 0-d tensors without a graph, means over counted
    tokens.

    ``kd`` is the raw divergence in nats at its temperatures, before ``kd_weight`` and T^2; ``ce``
    the raw cross-entropy at T = 1 (with ``label_smoothing``). The entropies are those of the two
    distributions the divergence compares, in nats. ``ce`` and the accuracies are NaN without
    labels, and without a teacher all that needs one is. With nothing counted all are 0.
    ``student_mass`` and ``teacher_mass`` are the probabilities of a :class:`SparseTeacher`'s ids,
    q's at its temperature and the teacher's as given; None with another teacher.
    """

    kd: Tensor
    ce: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    top1_agreement: Tensor
    student_accuracy: Tensor
    teacher_accuracy: Tensor
    num_tokens: Tensor
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None


def kd_loss(
    student: Tensor | LMHead,
    teacher: Tensor | LMHead | SparseTeacher | Routed | None,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    num_counted: int | None = None,
    row_rule: RowRule | str | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Knowledge-distillation loss ``kd_weight * T^2 * D(p, q) + ce_weight * CE + z_loss_weight *
    lse^2``, fused.

    p is the teacher's softmax, q the student's, over the vocabulary; D is ``divergence``. With
    forward KL this is the loss of Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), sec. 2. Either
    side may be logits or an :class:`LMHead`; with a head the logits never exist in full. The
    teacher may also be a :class:`SparseTeacher`, K entries per token, or several teachers,
    :class:`Routed`.

    Args:
        student: logits (..., V), fp64, fp32, bf16 or fp16, or a head. Has the gradient.
        teacher: logits (..., V), a head or a SparseTeacher, same leading shape, without a gradient.
            None with ``kd_weight=0``: cross-entropy and z-loss alone.
        labels: (...,) int64, aligned with the logits (nothing is shifted here).
        divergence: a name, such as ``"jsd"`` or ``"jsd(beta=0.3)"``, or an object of
            :mod:`fusedkd.divergences`.
        temperature: T of both sides, in the divergence only; cross-entropy is always at T = 1. At
            most 1000 (in fp64 1e6): beyond, the divergence is smaller than its rounding.
        teacher_temperature: the teacher's own, where it differs (of a SparseTeacher: that at which
            its ``log_probs`` were made).
        kd_weight: the weight of the divergence.
        ce_weight: the weight of the cross-entropy; above 0 it needs labels.
        scale_by_t2: multiply the divergence by ``temperature**2``, so that the size of its gradient
            does not depend on T (Hinton et al. 2015, end of sec. 2).
        ignore_index: tokens with this label do not count, in any term.
        label_smoothing: of the cross-entropy, as in ``torch.nn.functional.cross_entropy``.
        z_loss_weight: of the square of the logsumexp of the student's logits, at T = 1 and after
            scale and softcap, which keeps logits from drifting (PaLM, arXiv 2204.02311, sec. 5,
            has 1e-4). Of the tokens that count, with labels or without, and with any teacher.
        token_weights: (...,) finite and not negative, without a gradient; multiplies the token's
            whole loss; 0 drops the token.
        reduction: "mean" is the weighted mean over counted tokens, "sum" the weighted sum, "none"
            the weighted loss of each token. With a student head that is trained, "none" makes the
            gradients in the backward (the upstream gradient is only known then): two products more.
        normalizer: divide the weighted sum by this finite number or 0-d tensor, not negative,
            instead of by the sum of the weights. For gradient accumulation: the number of tokens in
            all micro-batches and on all devices.
        num_counted: how many tokens count, where the host knows. Only those go through a head's
            products: on a GPU they are packed without waiting for it, which else is asked for their
            number once (not while a CUDA graph is captured: then all rows are multiplied). Has no
            effect on logits.
        row_rule: a factor on each token's divergence and its gradient, a constant made of entropies
            and the like: :func:`fusedkd.row_rules.custom`. Has no effect on cross-entropy, z-loss
            and metrics, nor on what "mean" divides by.
        vocab_size: the true vocabulary. Columns beyond it are padding on both sides: they have no
            probability, and their gradient is 0.
        inplace: dense student logits only: write their gradient into their own memory, which no
            other tensor of the call may share. The logits are then gone. Has no effect under
            torch.compile and torch.func, which plan memory themselves.
        chunk_bytes: heads only: bytes of logits and their gradient held at any time, the latter
            perhaps until the backward; at least a token's. Default 512 MiB on a CPU, 2 GiB on a
            GPU, or 1/32 of its memory where that is less.
        group: vocabulary-parallel: each of its ranks has some columns of the logits (rows of the
            heads' weights), in the order of ranks, and all have the same tokens and labels. Loss,
            metrics and gradients are those of one process; the gradient of a head's hidden states
            is summed over the ranks. DTensors with ``Shard(-1)`` logits or ``Shard(0)`` weights
            need no ``group``; a weight that FSDP sharded to save memory has to be gathered first.
        backend: "triton", "cpu" or "reference" (plain torch in fp64); None goes by the device. An
            explicit choice that cannot run here raises.

    Returns:
        0-d fp32 (fp64 when either side is fp64), or of the leading shape for ``reduction="none"``.
        With nothing counted it is 0, with a graph and zero gradients.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected and the remedy. On
            a GPU a label out of range is a device-side assertion, as in torch: no synchronisation.
        RuntimeError: the backend cannot run here.
    """
    return _compute(
        Arguments(
            student=student,
            teacher=teacher,
            labels=labels,
            divergence=divergence,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            scale_by_t2=scale_by_t2,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss_weight=z_loss_weight,
            token_weights=token_weights,
            reduction=reduction,
            normalizer=normalizer,
            num_counted=num_counted,
            row_rule=row_rule,
            vocab_size=vocab_size,
            inplace=inplace,
            chunk_bytes=chunk_bytes,
            group=group,
            backend=backend,
        ),
        metrics=False,
    )[0]


DEFAULTS: dict[str, Any] = dict(kd_loss.__kwdefaults__ or {})  # one signature, stated once


def kd_loss_and_metrics(
    student: Tensor | LMHead,
    teacher: Tensor | LMHead | SparseTeacher | Routed | None,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, KDMetrics]:
    """:func:`kd_loss` with the same arguments, and :class:`KDMetrics` from the same sweeps.

    Returns:
        ``(loss, metrics)``; only the loss has a graph.
    """
    keywords = with_defaults("kd_loss_and_metrics", kwargs, DEFAULTS)
    loss, metrics = _compute(Arguments(student, teacher, labels, **keywords), metrics=True)
    assert metrics is not None
    return loss, metrics


class KDLoss(nn.Module):
    """:func:`kd_loss` as a module: stores the keyword arguments, checked once here.

    >>> loss = KDLoss(divergence="jsd", temperature=2.0, ce_weight=0.5)
    >>> loss(student_logits, teacher_logits, labels)  # doctest: +SKIP
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        keywords = with_defaults("KDLoss", kwargs, DEFAULTS)
        Arguments(torch.empty(0), None, None, **keywords).check()
        self.kwargs = kwargs

    def forward(
        self,
        student: Tensor | LMHead,
        teacher: Tensor | LMHead | SparseTeacher | Routed | None,
        labels: Tensor | None = None,
        **overrides: Any,
    ) -> Tensor:
        """The loss; ``overrides`` are per-call keywords such as ``normalizer``."""
        return kd_loss(student, teacher, labels, **{**self.kwargs, **overrides})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.kwargs.items())


# ----------------------------------------------------------------------------------------------


def losses_by_teacher(
    student: Tensor | LMHead, teacher: Routed, labels: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, dict[str, KDMetrics]]:
    """:func:`kd_loss` of several teachers, and the metrics of each one's rows."""
    keywords = with_defaults("losses_by_teacher", keywords, DEFAULTS)
    return routed_loss(Arguments(student, teacher, labels, **keywords), teacher, True, _compute)


def _compute(arguments: Arguments, metrics: bool) -> tuple[Tensor, KDMetrics | None]:
    if isinstance(arguments.teacher, Routed):
        total, parts = routed_loss(arguments, arguments.teacher, metrics, _compute)
        return total, together(list(parts.values())) if metrics else None
    if not metrics and (loss := direct_loss(arguments)) is not None:
        return loss, None
    student, teacher = arguments.student, arguments.teacher
    if arguments.group is not None or parallel.is_sharded(student, teacher):
        return _compute_sharded(arguments, metrics)
    return _run(Call.of(arguments, metrics))


@torch._disable_dynamo  # collectives whose number depends on the data's sizes
def _compute_sharded(arguments: Arguments, metrics: bool) -> tuple[Tensor, KDMetrics | None]:
    """The same for the part of the vocabulary that lies here."""
    teacher: Any = arguments.teacher
    # for their errors; a rank may have no columns
    student_side(arguments.student, 0), teacher_side(teacher, 0)
    vocab_size, chunk_bytes = arguments.vocab_size, arguments.chunk_bytes
    for name, value in (("vocab_size", vocab_size), ("chunk_bytes", chunk_bytes)):
        if value is not None:
            check_whole(name, value, 1)
    backends.check_name(arguments.backend)
    shards = parallel.shards(
        arguments.student,
        arguments.teacher,
        arguments.group,
        vocab_size,
        arguments.backend,
        chunk_bytes,
    )
    local = arguments._replace(
        student=shards.student,
        teacher=shards.teacher,
        vocab_size=None,
        group=None,
        backend=shards.backend,
        chunk_bytes=shards.chunk_bytes,
    )
    return _run(Call.of(local, metrics, shards))


def _run(call: Call) -> tuple[Tensor, KDMetrics | None]:
    loss, sums = autograd.fused_loss(call)
    if call.spec.reduction == "none":
        loss = loss.view(call.leading)
    if sums is None:
        return loss, None
    return loss, _metrics(sums, call)


def _metrics(sums: Tensor, call: Call) -> KDMetrics:
    counted = call.weights != 0
    count = counted.sum()
    means = sums / count.clamp(min=1)

    def mean(rows: Tensor) -> Tensor:
        rows = rows.reshape(-1).to(means.dtype).masked_fill(~counted, 0.0)
        # in fp64, so that rows of 0 between others change nothing
        return (rows.sum(dtype=torch.float64) / count.clamp(min=1)).to(means.dtype)

    named = dict(zip(METRIC_COLUMNS, means.unbind(), strict=True))
    # of a side that is NaN there is no favourite token, though the kernels name one
    student, other = 0.0 * named["student_entropy"], 0.0 * named["teacher_entropy"]
    named["top1_agreement"] = named["top1_agreement"] + student + other
    named["student_accuracy"] = named["student_accuracy"] + student
    named["teacher_accuracy"] = named["teacher_accuracy"] + other
    if call.teacher_entropy is not None:
        entropy = mean(call.teacher_entropy.detach())
        named["teacher_entropy"] = entropy + 0.0 * named["teacher_entropy"]
    teacher, ids, mass = call.inputs.teacher, call.inputs.teacher_indices, named.pop("student_mass")
    if teacher is None:
        named |= {name: named[name] * math.nan for name in OF_TEACHER}
    elif ids is not None:
        p = teacher.detach().to(means.dtype).exp().masked_fill(ids < 0, 0.0).sum(-1)
        return KDMetrics(**named, num_tokens=count, student_mass=mass, teacher_mass=mean(p))
    return KDMetrics(**named, num_tokens=count)
