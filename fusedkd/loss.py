"""The public functions: check the arguments, flatten them, weigh the rows. No mathematics here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedkd import autograd, backends, parallel
from fusedkd import divergences as _divergences
from fusedkd.checks import check_normalizer, check_whole
from fusedkd.divergences import Divergence
from fusedkd.logits import LMHead, SparseTeacher
from fusedkd.sides import (
    Side,
    autocast_dtype,
    check_pair,
    check_rows,
    check_temperature,
    side_of,
    teacher_of,
    true_vocabulary,
)
from fusedkd.spec import IDENTITY, METRIC_COLUMNS, OF_TEACHER, LossSpec, Transform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["KDLoss", "KDMetrics", "kd_loss", "kd_loss_and_metrics"]


class KDMetrics(NamedTuple):
    """What :func:`kd_loss_and_metrics` measures: 0-d tensors without a graph, means over counted
    tokens.

    ``kd`` is the raw divergence in nats at its temperatures, before ``kd_weight`` and T^2; ``ce``
    the raw cross-entropy at T = 1 (with ``label_smoothing``). The entropies are those of the two
    distributions the divergence compares, in nats. ``ce`` and the accuracies are NaN without
    labels, and without a teacher all that needs one is. With nothing counted all are 0.
    """

    kd: Tensor
    ce: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    top1_agreement: Tensor
    student_accuracy: Tensor
    teacher_accuracy: Tensor
    num_tokens: Tensor


def kd_loss(
    student: Tensor | LMHead,
    teacher: Tensor | LMHead | SparseTeacher | None,
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
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    num_counted: int | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Knowledge-distillation loss ``kd_weight * T^2 * D(p, q) + ce_weight * CE``, fused.

    p is the teacher's softmax, q the student's, over the vocabulary; D is ``divergence``. With
    forward KL this is the loss of Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), sec. 2. Either
    side may be logits or an :class:`LMHead`; with a head the logits never exist in full. The
    teacher may also be a :class:`SparseTeacher`, K entries per token.

    Args:
        student: logits (..., V), fp64, fp32, bf16 or fp16, or a head. Has the gradient.
        teacher: logits (..., V), a head or a SparseTeacher, same leading shape, without a gradient.
            None with ``kd_weight=0``: cross-entropy alone.
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
        vocab_size: the true vocabulary. Columns beyond it are padding on both sides: they have no
            probability, and their gradient is 0.
        inplace: dense student logits only: write their gradient into their own memory, which no
            other tensor of the call may share. The logits are then gone. Has no effect under
            torch.compile and torch.func, which plan memory themselves.
        chunk_bytes: heads only: bytes of logits and their gradient held at any time. Default
            1 GiB on a GPU, 512 MiB on a CPU.
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
    return _compute(False, **locals())[0]


DEFAULTS: dict[str, Any] = dict(kd_loss.__kwdefaults__ or {})  # one signature, stated once


def kd_loss_and_metrics(
    student: Tensor | LMHead,
    teacher: Tensor | LMHead | SparseTeacher | None,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, KDMetrics]:
    """:func:`kd_loss` with the same arguments, and :class:`KDMetrics` from the same sweeps.

    Returns:
        ``(loss, metrics)``; only the loss has a graph.
    """
    loss, metrics = _compute(
        True,
        student=student,
        teacher=teacher,
        labels=labels,
        **_with_defaults("kd_loss_and_metrics", kwargs),
    )
    assert metrics is not None
    return loss, metrics


def _with_defaults(function: str, keywords: dict[str, Any]) -> dict[str, Any]:
    if unknown := keywords.keys() - DEFAULTS.keys():
        raise TypeError(
            f"{function}() got an unexpected keyword argument {', '.join(sorted(unknown))}: "
            f"expected some of {', '.join(DEFAULTS)}."
        )
    return {**DEFAULTS, **keywords}


class KDLoss(nn.Module):
    """:func:`kd_loss` as a module: stores the keyword arguments, checked once here.

    >>> loss = KDLoss(divergence="jsd", temperature=2.0, ce_weight=0.5)
    >>> loss(student_logits, teacher_logits, labels)  # doctest: +SKIP
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        keywords = _with_defaults("KDLoss", kwargs)
        backends.check_name(keywords["backend"])
        vocab_size = keywords.pop("vocab_size")
        _spec(1 if vocab_size is None else vocab_size, IDENTITY, IDENTITY, **keywords)
        self.kwargs = kwargs

    def forward(
        self,
        student: Tensor | LMHead,
        teacher: Tensor | LMHead | SparseTeacher | None,
        labels: Tensor | None = None,
        **overrides: Any,
    ) -> Tensor:
        """The loss; ``overrides`` are per-call keywords such as ``normalizer``."""
        return kd_loss(student, teacher, labels, **{**self.kwargs, **overrides})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.kwargs.items())


# ----------------------------------------------------------------------------------------------


def _compute(
    want_metrics: bool,
    *,
    student: Tensor | LMHead,
    teacher: Tensor | LMHead | SparseTeacher | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    vocab_size: int | None,
    group: ProcessGroup | None,
    shards: parallel.Shards | None = None,
    **keywords: Any,
) -> tuple[Tensor, KDMetrics | None]:
    if shards is None and (group is not None or parallel.is_sharded(student, teacher)):
        given = {"labels": labels, "token_weights": token_weights, "normalizer": normalizer}
        sides = (student, teacher, group, vocab_size)
        return _compute_sharded(want_metrics, sides, **given, **keywords)
    s, t = side_of("student", student), teacher_of(teacher)
    check_pair(s, t)
    size = shards.vocab_size if shards else true_vocabulary(s, t, vocab_size)
    autocast = autocast_dtype(s, t)
    if labels is token_weights is keywords["num_counted"] is None:
        keywords["num_counted"] = s.leading.numel()
    spec = _spec(
        *(size, s.transform, t.transform),
        normalizer=normalizer,
        autocast=autocast,
        tail=t.tail,
        **keywords,
    )
    check_rows(s, t, labels, token_weights, spec)
    wide = torch.float64 in (s.tensor.dtype, t.dtype)
    accumulate = torch.float64 if wide else torch.float32
    check_temperature(spec, accumulate)
    weights = _row_weights(s, labels, token_weights, spec, accumulate)
    divisor = _divisor(normalizer, weights, spec)
    tensors = (t.tensor, _detached(t.weight), _detached(t.bias), t.indices)
    loss, sums = autograd.fused_loss(
        (s.tensor, s.weight, s.bias, *tensors),
        labels=None if labels is None else labels.reshape(-1),
        weights=weights,
        divisor=divisor,
        spec=spec,
        metrics=want_metrics,
    )
    if spec.reduction == "none":
        loss = loss.view(s.leading)
    return loss, None if sums is None else _metrics(sums, weights, t)


@torch._disable_dynamo  # collectives whose number depends on the data's sizes
def _compute_sharded(
    want_metrics: bool, sides: tuple[Any, Any, Any, Any], **keywords: Any
) -> tuple[Tensor, KDMetrics | None]:
    """The same for the part of the vocabulary that lies here."""
    student, teacher, _, vocab_size = sides
    side_of("student", student, 0), teacher_of(teacher, 0)  # for their errors; a rank may have none
    for name, value in (("vocab_size", vocab_size), ("chunk_bytes", keywords["chunk_bytes"])):
        if value is not None:
            check_whole(name, value, 1)
    backends.check_name(keywords["backend"])
    shards = parallel.shards(*sides, keywords["backend"], keywords["chunk_bytes"])
    here = {"student": shards.student, "teacher": shards.teacher, "shards": shards}
    run = {"backend": shards.backend, "chunk_bytes": shards.chunk_bytes}
    run["chunk_columns"] = shards.chunk_columns
    return _compute(want_metrics, vocab_size=None, group=None, **{**keywords, **here, **run})


def _spec(
    vocab_size: int,
    student_transform: Transform,
    teacher_transform: Transform,
    *,
    divergence: str | Divergence,
    temperature: float,
    teacher_temperature: float | None,
    normalizer: float | Tensor | None,
    token_weights: Tensor | None = None,  # of KDLoss: nothing to check before there are tokens
    group: ProcessGroup | None = None,
    **rest: Any,
) -> LossSpec:
    if normalizer is not None and str(rest["reduction"]) == "none":
        raise ValueError(
            "normalizer was given with reduction='none', which adds nothing up: expected None. "
            "Divide the result, or use reduction='sum'."
        )
    return LossSpec(
        divergence=_divergences.resolve(divergence),
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        vocab_size=vocab_size,
        **rest,
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
        return (labels.reshape(-1) != spec.ignore_index).to(dtype)
    weights = token_weights.detach().reshape(-1).to(dtype)
    if labels is None:
        return weights
    return weights.masked_fill(labels.reshape(-1) == spec.ignore_index, 0.0)


def _divisor(normalizer: float | Tensor | None, weights: Tensor, spec: LossSpec) -> Tensor | None:
    if normalizer is None:
        # in fp64, so that weights of 0 between others change nothing
        mean = spec.reduction == "mean"
        return weights.sum(dtype=torch.float64).to(weights.dtype) if mean else None
    check_normalizer(normalizer)
    if isinstance(normalizer, Tensor):
        return normalizer.detach().reshape(()).to(device=weights.device, dtype=weights.dtype)
    # new_full would have dynamo trace one graph a value
    return weights.new_ones(()) * float(normalizer)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _metrics(sums: Tensor, weights: Tensor, teacher: Side) -> KDMetrics:
    count = (weights != 0).sum()
    means = sums / count.clamp(min=1)
    named = dict(zip(METRIC_COLUMNS, means.unbind(), strict=True))
    # of a side that is NaN there is no favourite token, though the kernels name one
    student, other = 0.0 * named["student_entropy"], 0.0 * named["teacher_entropy"]
    named["top1_agreement"] = named["top1_agreement"] + student + other
    named["student_accuracy"] = named["student_accuracy"] + student
    named["teacher_accuracy"] = named["teacher_accuracy"] + other
    if teacher.tensor is None:
        named |= {name: named[name] * math.nan for name in OF_TEACHER}
    return KDMetrics(**named, num_tokens=count)
