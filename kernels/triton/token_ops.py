"""The launcher of tokens.py. Contract: :mod:`fusedkd.kernels.tokens`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fusedkd import debug
from fusedkd.kernels.tokens import FIELDS, Factors, TokenCall, merged, row_factors
from fusedkd.spec import IDENTITY

from . import config, device, tokens
from .launcher import Launcher


@dataclass(frozen=True, repr=False)
class TokenPlan(config.Tiling):
    """What the kernels know at compile time; the names are those of config.Plan."""

    pieces: int
    stages: int
    aligned_to: str
    metrics: bool  # the entropy's moment, or its gradient
    transformed_s: bool
    transformed_t: bool = False
    teacher: bool = False
    ce: bool = False


class Kind(NamedTuple):
    """What decides which kernel a call needs, besides its launch."""

    logits: torch.dtype
    grad: torch.dtype | None
    entropy: bool
    transformed: bool
    aligned: bool


def token_statistics(call: TokenCall) -> Tensor:
    device.check(call.logits)
    n, k = call.tokens.shape
    launch = _launch(call)
    shape = (launch.pieces, n, len(FIELDS) + k)
    found = call.logits.new_empty(shape, dtype=torch.float64)
    arguments = {**_arguments(call), "statistics": found}
    _run(_kind(call, None), launch, call, arguments)
    return found[0] if launch.pieces == 1 else merged(found.unbind())


def token_gradient(call: TokenCall, statistics: Tensor, factors: Factors, out: Tensor) -> None:
    device.check(call.logits)
    constant, linear = row_factors(call, factors)
    cap = call.how.softcap
    arguments = {
        **_arguments(call),
        "grad": out,
        "statistics": statistics.contiguous(),
        "factors": factors.tokens.contiguous(),
        "constant": constant,
        "linear": None if linear is None else linear.contiguous(),
        "g_b": out.stride(0),
        "g_t": out.stride(1),
        "padded": out.shape[-1],
        "temperature": float(call.temperature),
        "per_cap": call.temperature / cap if cap else 0.0,
    }
    call = call._replace(entropy=linear is not None)
    _run(_kind(call, out), _launch(call), call, arguments)


def _launch(call: TokenCall) -> config.Launch:
    processors = device.processors(call.logits.device)
    return config.choose(len(call.counts), call.part.columns, processors)


def _run(kind: Kind, launch: config.Launch, call: TokenCall, arguments: dict[str, Any]) -> None:
    n = len(call.counts)
    if n == 0:
        return
    if debug.ENABLED:
        debug.note(f"{n:,} rows by {launch}")
    with device.guard(call.logits):
        _launcher(kind, launch)((n, launch.pieces), arguments)


def _arguments(call: TokenCall) -> dict[str, Any]:
    """What both kernels are told."""
    (z_b, z_t, _), part = call.logits.stride(), call.part
    return {
        "logits": call.logits,
        "tokens": call.tokens,
        "counts": call.counts.view(torch.uint8),
        "length": call.logits.shape[1],
        "z_b": z_b,
        "z_t": z_t,
        "columns": part.columns,
        "offset": part.offset,
        "k": call.tokens.shape[1],
        "inverse_t": 1.0 / call.temperature,
        "scale": float(call.how.scale),
        "cap": float(call.how.softcap),
    }


def _kind(call: TokenCall, grad: Tensor | None) -> Kind:
    every: Sequence[Tensor] = [call.logits] if grad is None else [call.logits, grad]
    return Kind(
        call.logits.dtype,
        None if grad is None else grad.dtype,
        call.entropy,
        call.how != IDENTITY,
        config.aligned(every),
    )


@functools.cache
def _launcher(kind: Kind, launch: config.Launch) -> Launcher:
    kernel = tokens.statistics_kernel if kind.grad is None else tokens.gradient_kernel
    made = {"plan": plan(kind, launch, device.TARGET)}
    return Launcher(kernel, made, config.options(launch, device.TARGET))


def plan(kind: Kind, launch: config.Launch, target: str) -> TokenPlan:
    """The compile-time half of a launch on "cuda" or "hip"."""
    items = {"student": kind.logits.itemsize}
    if kind.grad is not None:
        items["grad"] = kind.grad.itemsize
    lead = min(items, key=items.__getitem__)
    return TokenPlan(
        acc=tl.float64 if kind.logits == torch.float64 else tl.float32,
        lanes=config.options(launch, target)["num_warps"] * config.WARP[target],
        unroll=1 if kind.transformed else launch.unroll,
        width=16 // items[lead],
        item=items[lead],
        aligned=kind.aligned,
        pieces=launch.pieces,
        stages=launch.stages,
        aligned_to=lead,
        metrics=kind.entropy,
        transformed_s=kind.transformed,
    )
