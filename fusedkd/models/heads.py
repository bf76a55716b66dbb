"""Finding a model's output projection, and taking its input instead of its output.

``get_output_embeddings()`` of a transformers model is the last matrix product. What a model does
before it (a final norm, BERT's transform) stays inside the model's own forward; what it does after
it (a scale, a soft cap) is known from the config and *proved* by one tiny forward pass in which
the projection's output is replaced by a ramp: whatever comes out as logits is what the model does
to any logits. A model that fails the proof keeps its dense logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fusedkd import LMHead

__all__ = [
    "NoPlainHead",
    "PlainHead",
    "is_partitioned",
    "loss_in_forward",
    "next_labels",
    "plain_head",
    "tap",
]

_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)  # Granite divides by it, HyperCLOVA X multiplies: the proof decides
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


class NoPlainHead(Exception):
    """The model's logits are not ``softcap(scale * linear(hidden))``; the message says why."""


@dataclass(frozen=True, eq=False)
class PlainHead:
    """A model's output projection, and what the model does to its result."""

    linear: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    def of(self, hidden: Tensor) -> LMHead:
        """The distribution over the vocabulary that the model gives for ``hidden`` (..., H).

        A sharded weight is gathered here, once. Within a forward that FSDP or ZeRO wraps it is
        whole already.

        Raises:
            RuntimeError: ZeRO-3 has a trained weight in parts, so that no gradient would reach it.
        """
        weight, bias = map(_whole, (self.linear.weight, self.linear.bias))
        return LMHead(hidden, weight, bias, self.logit_scale, self.softcap)


def _whole(parameter: Tensor | None) -> Any:
    """The parameter, gathered if it is sharded: a DTensor, or what ZeRO-3 has left of it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if parameter is None or not is_partitioned(parameter):
        return parameter
    if torch.is_grad_enabled() and parameter.requires_grad:
        raise RuntimeError(
            "ZeRO-3 has the head's weight in parts, outside of its model's forward: expected the "
            "loss to be computed within it, as fusedkd.models.heads.loss_in_forward does."
        )
    with _gathered([parameter]):
        return parameter.detach().clone()


def _gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """While open, what ZeRO-3 has in parts is whole."""
    parts = [x for x in parameters if is_partitioned(x)]
    if not parts:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts)  # type: ignore[no-any-return]


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has the parameter in parts on several processes now."""
    return parameter.numel() != getattr(parameter, "ds_numel", parameter.numel())


def plain_head(model: Any) -> PlainHead:
    """The model's output projection, once one tiny forward pass has shown that there is nothing
    more to it.

    Raises:
        NoPlainHead: there is none, or the model does something else with it.
    """
    find = getattr(model, "get_output_embeddings", None)
    linear = find() if find is not None else None
    if not isinstance(linear, nn.Linear):
        raise NoPlainHead(f"its output embedding is {type(linear).__name__}, not an nn.Linear")
    others = set(dict(linear.named_parameters())) - {"weight", "bias"}
    if others or not _is_plain(linear.weight):
        raise NoPlainHead(f"its {type(linear).__name__} is quantised or adapted")
    try:
        hidden, product_, ramp, logits = _probe(model, linear)
    except NoPlainHead:
        raise
    except Exception as error:  # any model may fail on made-up inputs, for reasons of its own
        raise NoPlainHead(
            f"a trial forward pass failed ({type(error).__name__}: {error})"
        ) from error
    if not torch.allclose(
        _multiplied(linear, hidden, product_.dtype), product_, rtol=1e-2, atol=1e-3
    ):
        raise NoPlainHead("its output embedding does more than multiply by its weight")
    for scale, softcap in _candidates(model):
        expected = ramp * scale
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        if logits.shape == ramp.shape and torch.allclose(
            expected, logits.float(), rtol=1e-4, atol=1e-4
        ):
            return PlainHead(linear, scale, softcap)
    raise NoPlainHead("it changes its logits in a way that its config does not name")


def _multiplied(linear: nn.Linear, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What the projection alone makes of hidden states, in the dtype that it multiplied in: under
    autocast neither its input's nor its weight's."""
    with torch.autocast(hidden.device.type, enabled=False), _gathered(linear.parameters()):
        weight, bias = (x if x is None else x.to(dtype) for x in (linear.weight, linear.bias))
        return F.linear(hidden.to(dtype), weight, bias)


def _is_plain(weight: Tensor) -> bool:
    """Whether its memory holds the numbers, which kernels read. Quantised weights are integers, or
    (torchao's) claim a floating-point type and answer each operation themselves."""
    answers = type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return weight.is_floating_point() and (isinstance(weight, DTensor) or not answers)


def _candidates(model: Any) -> Iterator[tuple[float, float | None]]:
    """The (scale, softcap) that the config may mean, likeliest first."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {
        name: float(value)
        for name in (*_FACTORS, *_DIVISORS, *_SOFTCAPS)
        if isinstance(value := getattr(config, name, None), (int, float)) and value
    }
    scales = [1.0]
    for name in _FACTORS:
        scales = [scale * numbers.get(name, 1.0) for scale in scales]
    for name in _DIVISORS:
        value = numbers.get(name, 1.0)
        scales = [
            scale * factor for factor in dict.fromkeys((1 / value, value)) for scale in scales
        ]
    caps: list[float | None] = [numbers[name] for name in _SOFTCAPS if name in numbers]
    yield from product(dict.fromkeys([*scales, 1.0]), [*caps, None])


def _probe(model: Any, linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the model once with its logits replaced by a ramp: (hidden, the product, the ramp, what
    became of it)."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # In fp32 whatever the model's dtype, and far into any soft cap, so that the comparison can
        # be strict.
        ramp = torch.linspace(-90.0, 90.0, output.numel(), device=output.device).view_as(output)
        seen.append((args[0], output, ramp))
        return ramp

    if not isinstance(model, PreTrainedModel) and not hasattr(model, "dummy_inputs"):
        raise NoPlainHead("it is not a transformers model")
    inputs = {name: value.to(linear.weight.device) for name, value in model.dummy_inputs.items()}
    training = [module for module in model.modules() if module.training]
    handle = linear.register_forward_hook(replace)
    try:
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
    finally:
        handle.remove()
        for module in training:
            module.training = True
    if len(seen) != 1:
        raise NoPlainHead(f"its forward pass uses the output embedding {len(seen)} times")
    return *seen[0], logits


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
