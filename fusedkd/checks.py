"""Single arguments, checked: what is wrong with one is said once, with its name and the remedy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedkd.modes import is_watched, stand_in

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float32).max
LARGEST_WEIGHT = 1e18  # with T^2 still a number in fp32, and as an int in 64 bits
# Rounding of the normalisers is 1e-8 of them at best, and the divergence of two distributions is
# about half the variance of their logits' gap, over T^2. With a variance of 1, fp32 loses 2 to 7 %
# of forward KL at T = 1000 and 400 % at 10,000, where the formula in eager torch loses 90 % and
# 7,000 (8 x 2,000, 2026-11-28).
LARGEST_TEMPERATURE = {torch.float32: 1e3, torch.float64: 1e6}
SMALLEST_TEMPERATURE = 1e-30  # its inverse is a number, also in fp32


def check_tensor(name: str, value: object) -> Tensor:
    """``value``, if it is a dense tensor whose memory holds its numbers.

    Raises:
        TypeError: something else, naming what, and the remedy.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a Tensor.")
    dense = value.layout is torch.strided and not value.is_nested
    if dense and type(value) is Tensor and not value.is_meta:
        return value  # nearly always
    if not dense:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        remedy = "to_padded_tensor(...)" if value.is_nested else "to_dense()"
        raise TypeError(
            f"{name} is a {kind} tensor: expected a dense one; convert it: {name}.{remedy}."
        )
    if value.is_meta and not is_watched():
        raise TypeError(
            f"{name} is on the device meta, where tensors have no numbers: expected one with "
            "memory; to estimate memory, use torch's FakeTensorMode."
        )
    answers = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if answers and not type(value).__module__.startswith("torch."):
        raise TypeError(
            f"{name} is a {type(value).__name__}, whose memory does not hold its numbers (a "
            f"quantised tensor?): expected a plain tensor; convert it, e.g. {name}.dequantize()."
        )
    return value


def check_logits(name: str, value: object) -> None:
    """Raise unless it is a tensor of numbers that the kernels read."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}; "
            f"convert it, e.g. {name}.float()."
        )


def check_device(name: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    """Raise unless the two are on one device."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other} on {reference.device}: expected one device. "
            f"Move it: {name}.to({other}.device)."
        )


def check_normalizer(normalizer: float | Tensor) -> None:
    """Raise unless it is one number that a sum can be divided by."""
    if isinstance(normalizer, Tensor):
        _check_tensor_of_one(normalizer)
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer is {normalizer!r}: expected a number, a 0-d tensor or None.")
    elif not is_finite(normalizer) or not 0 <= normalizer <= LARGEST:
        raise ValueError(
            f"normalizer={normalizer!r}: expected a finite number of at least 0, such as the "
            "number of tokens that count."
        )


def check_divides(normalizer: float | Tensor | None, reduction: str) -> None:
    """Raise unless there is a sum that ``normalizer`` can divide."""
    if normalizer is not None and str(reduction) == "none":
        raise ValueError(
            "normalizer was given with reduction='none', which adds nothing up: expected None. "
            "Divide the result, or use reduction='sum'."
        )


def with_defaults(
    function: str, keywords: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """All keywords of a call; of no others than the function has.

    Raises:
        TypeError: one that it has not.
    """
    if unknown := keywords.keys() - defaults.keys():
        raise TypeError(
            f"{function}() got an unexpected keyword argument {', '.join(sorted(unknown))}: "
            f"expected some of {', '.join(defaults)}."
        )
    return {**defaults, **keywords}


def _check_tensor_of_one(normalizer: Tensor) -> None:
    check_tensor("normalizer", normalizer)
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: expected one number.")
    if normalizer.dtype == torch.bool:
        raise TypeError("normalizer is torch.bool: expected a number, not whether there is one.")
    check_constant("normalizer", normalizer, "a real number")


def check_constant(name: str, tensor: Tensor, expected: str) -> None:
    """Raise unless all numbers are finite and not negative, and none has a gradient. On a GPU the
    numbers are a device-side assertion: no synchronisation."""
    if tensor.is_complex() or tensor.is_quantized:
        raise TypeError(f"{name} is {tensor.dtype}: expected {expected}.")
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but it is a constant here, and would get none: expected "
            f"{name}.detach()."
        )
    if tensor.dtype == torch.bool or not tensor.numel():
        return
    least, most = torch.aminmax(tensor.detach())
    if tensor.device.type != "cpu" or stand_in(tensor):
        torch._assert_async(
            (least >= 0) & (most <= LARGEST), f"{name}: expected finite numbers, not negative"
        )
    elif not (least >= 0 and most <= LARGEST):  # also with a NaN, which is both then
        raise ValueError(
            f"{name} holds numbers from {least.item():g} to {most.item():g}: expected finite "
            "numbers of at least 0."
        )


def check_temperature(name: str, value: object) -> None:
    """Raise unless logits can be divided by it."""
    if not is_finite(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(
            f"{name}={value!r}: expected a Python number above 0 (1.0 changes nothing)."
        )


def check_weight(name: str, value: object) -> None:
    """Raise unless a term can be multiplied by it."""
    if not is_finite(value) or not 0 <= value <= LARGEST_WEIGHT:  # type: ignore[operator]
        raise ValueError(
            f"{name}={value!r}: expected a Python number from 0, which drops the term, to "
            f"{LARGEST_WEIGHT:g}."
        )


def check_heat(name: str, value: float, accumulate: torch.dtype) -> None:
    """Raise where the divergence at this temperature would be rounding, and nothing else."""
    if value < SMALLEST_TEMPERATURE:
        raise ValueError(f"{name}={value:g}: expected at least {SMALLEST_TEMPERATURE:g}.")
    if value > (most := LARGEST_TEMPERATURE[accumulate]):
        raise ValueError(
            f"{name}={value:g}: expected at most {most:g} for "
            f"{str(accumulate).removeprefix('torch.')}, beyond which the divergence is smaller "
            "than its rounding. Its limit is half the mean squared difference of centred "
            "logits, divided by T^2: train on that, or give fp64 tensors."
        )


def check_whole(name: str, value: object, least: int, hint: str = "") -> None:
    """Raise unless ``value`` is a whole number from ``least`` up that 64 bits hold."""
    hint = f" ({hint})" if hint else ""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}={value!r}: expected an int{hint}.")
    if not least <= value < 2**63:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}{hint}.")


def is_finite(value: object) -> bool:
    """Whether ``value`` is a finite number, an int one of 64 bits; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < (2**63 if isinstance(value, int) else math.inf)
