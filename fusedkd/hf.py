"""Distillation of transformers models in a loop of one's own: one call for each micro-batch.

    from fusedkd import hf

    meter = hf.Meter()
    for step in steps:                              # a list of micro-batches each
        count = hf.normalizer(model, step)          # their labels, over all processes
        for batch in step:
            loss, metrics = hf.distill(model, teacher, batch, divergence="jsd", normalizer=count)
            loss.backward()
            meter.add(metrics)
        optimizer.step(), optimizer.zero_grad()
    print(meter.means())                            # of all tokens, of all processes

``model`` is what the loop trains, as it is wrapped: in DDP, FSDP, a DeepSpeed engine or whatever
``accelerate`` makes. The loss is computed within its forward, so that gradients are synchronised
and the head's weight is whole there; from the model's head, without logits, where
:mod:`fusedkd.models.proof` shows that it has a plain one (a scale, a soft cap), else from logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedkd import LMHead, SparseTeacher, divergences
from fusedkd.cache.reader import TeacherCache
from fusedkd.models.kinds import bare, refuse_shared, router_loss, true_vocabulary
from fusedkd.synchronised import ddp_wrappers, in_ddp, several_processes
from fusedkd.teachers import CachedTeacher, LiveTeacher, ServedTeacher
from fusedkd.train.base import HeadLoss
from fusedkd.train.meter import Mean, Measured, Meter
from fusedkd.train.tasks import Task, task_between

__all__ = ["Mean", "Measured", "Meter", "distill", "normalizer"]

Answer = Tensor | LMHead | SparseTeacher
Teacher = nn.Module | TeacherCache | ServedTeacher | Callable[[dict[str, Any]], Answer] | Answer

_NOT_HERE = {
    "ignore_index": "for transformers' labels have -100",
    "reduction": "for the loss is a mean; with normalizer=1 it is the sum",
}


def distill(
    model: nn.Module,
    teacher: Teacher,
    batch: Mapping[str, Any],
    *,
    labels: Tensor | None = None,
    task: str | None = None,
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, Measured]:
    """The distillation loss of one batch and its metrics.

    Args:
        model: the student, a transformers model, as it is wrapped; not the module inside DDP.
        teacher: a model, which is switched to ``eval()`` and run without gradients; a
            :class:`fusedkd.cache.TeacherCache` or a :class:`fusedkd.teachers.ServedTeacher`, in
            which every sequence is looked up, or asked for, now (for the data loader's workers to
            do it: :class:`fusedkd.teachers.CachedTeacher`); a function
            from the batch without its labels to logits, :class:`fusedkd.LMHead` or
            :class:`fusedkd.SparseTeacher`; or one of these.
        batch: what both models' forwards read, and ``labels``, -100 where none counts, as
            transformers has them: a causal model's are shifted here, ``shift_labels`` are not.
        labels: instead of the batch's, such as ``batch["input_ids"]``.
        task: what the model does, if its class does not say (``fusedkd.train.tasks.TASKS``).
        normalizer: what the sum over tokens is divided by. For gradient accumulation that of
            :func:`normalizer`; losses of micro-batches are then added up. None: the labels of this
            batch; where a model that trains is wrapped for several processes, of all of theirs,
            which then have to call this equally often.
        vocab_size: how many columns are real, where the two models do not say.
        **keywords: of :func:`fusedkd.kd_loss`.

    Returns:
        The loss, to which a mixture of experts adds its routers'; its mean over the processes is
        that of all their tokens. And metrics for :class:`Meter`, by the names of
        :class:`fusedkd.KDMetrics`, such as ``metrics["kd"].item()``.

    Raises:
        ValueError: no labels, a head that is not known, vocabularies or classes that differ, models
            that share parameters, or ``model`` is inside of DDP and its gradients would not be
            synchronised.
        TypeError: a keyword that is not one of ``kd_loss``'s, or means nothing here.
        CacheError: the cache does not have a sequence, or not for this loss.
    """
    if unfit := keywords.keys() & _NOT_HERE.keys():
        name = unfit.pop()
        raise TypeError(f"{name}={keywords[name]!r}: expected none, {_NOT_HERE[name]}.")
    student, known = bare(model), _known(model, teacher, task)
    given = dict(batch)
    if labels is not None:
        given.pop("shift_labels", None)
        given["labels"] = labels
    if isinstance(teacher, TeacherCache | ServedTeacher):
        teacher, given = _looked_up(teacher, given, keywords, known.task)
    answer = _answers(teacher, known.task)
    aligned = known.task.labels(dict(given))
    count = _count(aligned, keywords.get("token_weights"))
    if normalizer is None:
        normalizer = _per_process(count) if _is_wrapped(model) and _trains(model) else count
    loss, metrics, outputs = known(
        *(model, teacher, answer, given),
        metrics=True,
        normalizer=normalizer,
        vocab_size=_vocabulary(student, teacher, vocab_size, known.task),
        **keywords,
    )
    routers = router_loss(student, outputs)
    if isinstance(routers, Tensor):
        # each token has its part in the step, so that micro-batches add up to one mean
        share = count / torch.as_tensor(normalizer, device=count.device).clamp(min=1e-9)
        loss = loss + routers.to(loss.device) * share.to(loss.device)
    return loss, metrics


def normalizer(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], task: str | None = None
) -> Tensor:
    """How many labels count in the micro-batches of one optimizer step, over all processes of the
    default group, for each of them: gradients are averaged over processes. All have to call it.

    Returns:
        0-d fp32, for ``distill(..., normalizer=)``. With it, add the losses of micro-batches up.
    """
    found = task_between(bare(model), None, task)
    counts = [_count(found.labels(dict(batch)), None) for batch in batches]
    return _per_process(torch.stack(counts).sum())


def _count(labels: Tensor, weights: Tensor | None) -> Tensor:
    """The weight of the labels that count; every one of those that are numbers."""
    counts = torch.ones_like(labels) if labels.is_floating_point() else labels != -100
    return (counts if weights is None else counts * weights).sum(dtype=torch.float32)


def _per_process(count: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return count
    count = count.clone()
    dist.all_reduce(count)
    return count / dist.get_world_size()


def _is_wrapped(model: nn.Module) -> bool:
    """For several processes: in what holds it, by its parameters (FSDP2), or with what calls this
    (DDP around a whole training step, as Lightning's)."""
    inside = getattr(model, "_orig_mod", model) is not bare(model)
    return inside or in_ddp() or any(isinstance(x, DTensor) for x in model.parameters())


def _trains(model: nn.Module) -> bool:
    """Evaluation need not be in step with other processes."""
    return model.training and torch.is_grad_enabled()


class _Kept:
    """Kept with a model, of which a copy or a file has nothing of it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Known(_Kept, HeadLoss):
    """What was found out about a student at its first call."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__(task)
        self.teachers: WeakSet[nn.Module] = WeakSet()
        _refuse_inside_of_ddp(model)

    def meet(self, student: nn.Module, teacher: Any, name: str | None) -> None:
        """Raises ValueError unless the two can be one's teacher."""
        if isinstance(teacher, nn.Module) and teacher not in self.teachers:
            refuse_shared(student, teacher)
            task_between(student, teacher, name)
            self.teachers.add(teacher)


def _known(model: nn.Module, teacher: Any, name: str | None) -> _Known:
    """Kept with the model, for it costs a trial forward pass."""
    student = bare(model)
    known = student.__dict__.get("_fusedkd")
    if known is None or name not in (None, known.task.name):
        task = task_between(student, teacher, name)
        known = student.__dict__["_fusedkd"] = _Known(model, task)
    known.meet(student, teacher, name)
    return known


def _refuse_inside_of_ddp(model: nn.Module) -> None:
    """Gradients are averaged only where DDP's own forward was called. Looked for once a model."""
    if _is_wrapped(model) or not several_processes():
        return
    if any(inner is model for wrapper in ddp_wrappers() for inner in wrapper.modules()):
        raise ValueError(
            f"model is the {type(model).__name__} inside of a DistributedDataParallel, which would "
            "not synchronise its gradients: expected the DistributedDataParallel itself."
        )


def _answers(teacher: Any, task: Task) -> Callable[[dict[str, Any]], Any]:
    if isinstance(teacher, nn.Module):
        teacher.eval()
        live = teacher.__dict__.get("_fusedkd_answers")
        if live is None or live.task is not task:
            live = _Live(teacher, task)
            teacher.__dict__["_fusedkd_answers"] = live
        return live
    return torch.no_grad()(teacher) if callable(teacher) else lambda inputs: teacher


class _Live(_Kept, LiveTeacher):
    """A teacher as it runs."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__(model, logits=task.logits, head=task.over_tokens)
        self.task = task


def _looked_up(
    cache: TeacherCache | ServedTeacher,
    batch: dict[str, Any],
    keywords: Mapping[str, Any],
    task: Task,
) -> tuple[CachedTeacher, dict[str, Any]]:
    if task.no_cache:
        raise ValueError(task.no_cache)
    divergence = divergences.resolve(keywords.get("divergence", "forward_kl"))
    heat = keywords.get("teacher_temperature") or keywords.get("temperature", 1.0)
    side = CachedTeacher(cache, divergence, heat, "bucket")
    return side, side.answered(batch)


def _vocabulary(student: Any, teacher: Any, given: int | None, task: Task) -> int | None:
    if not task.over_tokens:
        return None
    if isinstance(teacher, CachedTeacher):
        return teacher.vocabulary(student, given)
    return true_vocabulary(student, teacher, given, None)
