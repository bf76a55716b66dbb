"""Taking the input of a model's output projection instead of its output, and the loss from that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd.models.proof import NoPlainHead, NotTried, PlainHead, is_partitioned, plain_head

__all__ = [
    "NoPlainHead",
    "NotTried",
    "PlainHead",
    "is_partitioned",
    "loss_in_forward",
    "next_labels",
    "plain_head",
    "tap",
]


@contextmanager
def tap(head: PlainHead, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, a forward pass of the head's model hands its hidden states to ``receive`` and
    makes no logits.

    The projection sees no rows at all (``hidden[:0]``), so that the model's forward runs to its
    end on empty logits. ``receive`` is called from within the projection's own forward: whatever
    wraps the model (DDP, FSDP, ZeRO) has the weight gathered there, and ``prepend`` puts it ahead
    of a hook that would give the weight back.

    Raises:
        RuntimeError: the forward pass did not come by the projection.
    """
    waiting: list[Tensor] = []
    came = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        waiting.append(args[0])
        return (args[0][:0], *args[1:])

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        came.append(True)
        receive(waiting.pop())

    handles = (
        head.linear.register_forward_pre_hook(before),
        head.linear.register_forward_hook(after, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not came:
        raise RuntimeError(
            f"a forward pass did not come by {head.linear}, the model's output embedding: expected "
            "it to be called. Where only `model.forward` is compiled, its old hooks stay in it: "
            "compile the model (torch.compile(model), or torch_compile=True), which is noticed."
        )


def next_labels(labels: Tensor) -> Tensor:
    """Labels (B, L) aligned with a causal model's logits: position n gets label n + 1. Padded
    rather than cut, so that hidden states stay contiguous; the last position does not count."""
    return F.pad(labels, (0, 1), value=-100)[..., 1:]


def loss_in_forward(
    model: nn.Module,
    inner: nn.Module,
    head: PlainHead | None,
    inputs: dict[str, Any],
    compute: Callable[[Any], tuple[Tensor, Any]],
    logits: Callable[[Any], Tensor] = attrgetter("logits"),
) -> tuple[Tensor, Any, Any]:
    """Run ``model`` without logits, and ``compute`` on its head within the wrapped forward.

    The loss leaves the forward as ``outputs["loss"]``, so that what wraps ``inner`` in ``model``
    sees an ordinary model that returns an ordinary loss. Without a head ``compute`` gets the dense
    ``logits`` of the outputs, when the forward is over.

    Returns:
        The loss as ``model`` returned it, the second result of ``compute``, the outputs.

    Raises:
        RuntimeError: from :func:`tap`.
    """
    if head is None:
        outputs = model(**inputs)
        return *compute(logits(outputs)), outputs
    _register_with_zero(inner, head.linear)
    results: list[tuple[Tensor, Any]] = []

    def receive(hidden: Tensor) -> None:
        results.append(compute(head.of(hidden)))

    def deliver(module: nn.Module, args: Any, outputs: Any) -> Any:
        if results:
            outputs["loss"] = results[0][0]
        return outputs

    handle = inner.register_forward_hook(deliver, prepend=True)
    try:
        with tap(head, receive):
            outputs = model(**inputs)
    finally:
        handle.remove()
    return outputs["loss"], results[0][1], outputs


def _register_with_zero(model: nn.Module, linear: nn.Linear) -> None:
    """DeepSpeed's ZeRO-3 has a module's weights whole while its forward and backward run. The
    loss leaves by ``model``, not by its ``linear``, so it is there that they have to be."""
    for parameter in linear.parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(model, parameter)
