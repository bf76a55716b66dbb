"""Finding a model's output projection, and proving that there is no more to its logits.

``get_output_embeddings()`` of a transformers model is the last matrix product. What a model does
before it (a final norm, BERT's transform) stays inside the model's own forward; what it does after
it (a scale, a soft cap) is known from the config and *proved* by one tiny forward pass in which
the projection's output is replaced by a ramp: whatever comes out as logits is what the model does
to any logits. A model that fails the proof keeps its dense logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fusedkd import LMHead

_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)  # Granite divides by it, HyperCLOVA X multiplies: the proof decides
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


class NoPlainHead(Exception):
    """The model's logits are not ``softcap(scale * linear(hidden))``; the message says why."""


class NotTried(NoPlainHead):
    """What the model does to its logits is not known before it has seen a batch."""


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


def plain_head(model: Any, inputs: Mapping[str, Any] | None = None) -> PlainHead:
    """The model's output projection, once one tiny forward pass has shown that there is nothing
    more to it.

    Args:
        model: of transformers.
        inputs: a batch; None: made-up ids.

    Raises:
        NoPlainHead: there is none, or the model does something else with it.
        NotTried: the forward pass failed on made-up ids, as one of speech or images does.
    """
    find = getattr(model, "get_output_embeddings", None)
    linear = find() if find is not None else None
    if not isinstance(linear, nn.Linear):
        raise NoPlainHead(f"its output embedding is {type(linear).__name__}, not an nn.Linear")
    others = set(dict(linear.named_parameters())) - {"weight", "bias"}
    own = type(linear).forward is not nn.Linear.forward  # torchao's rounds its weight there
    if own or others or not is_plain(linear.weight):
        raise NoPlainHead(f"its {type(linear).__name__} is quantised or adapted")
    try:
        hidden, product_, ramp, logits = _probe(model, linear, inputs)
    except NoPlainHead:
        raise
    except Exception as error:  # any model may fail on made-up inputs, for reasons of its own
        raise (NotTried if inputs is None else NoPlainHead)(
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
        parts = (x.full_tensor() if isinstance(x, DTensor) else x for x in linear.parameters())
        return F.linear(hidden.to(dtype), *(x.to(dtype) for x in parts))


def is_plain(weight: Tensor) -> bool:
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


def _probe(
    model: Any, linear: nn.Linear, batch: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    device = linear.weight.device
    if batch is None:
        inputs = {name: value.to(device) for name, value in model.dummy_inputs.items()}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    else:
        inputs = _first_row(batch)
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


def _first_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Or all, where columns differ in their number of rows, as images and texts do."""
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim()}
    one = len({len(x) for x in tensors.values()}) == 1
    return {name: x[:1] if one and name in tensors else x for name, x in batch.items()}
