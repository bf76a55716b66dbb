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
from fusedkd.kernels import tokens as plain
from fusedkd.kernels.tokens import (
    FIELDS,
    Factors,
    TokenCall,
    Top,
    merged,
    merged_top,
    row_factors,
)
from fusedkd.spec import IDENTITY

from . import config, device, tokens
from .largest import top_kernel
from .launcher import Launcher

# Entries that may reach a row's threshold before it is raised; a power of two.
ROOM = 1024
# Beyond, plain torch: more entries than lanes have no threshold, and each id that has to be among
# the columns is compared with every entry.
MOST, MOST_NAMED = 256, 8


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
    unit: bool = False
    room: int = 0  # of what reaches a threshold (largest.py)


class Kind(NamedTuple):
    """What decides which kernel a call needs, besides its launch."""

    logits: torch.dtype
    grad: torch.dtype | None
    entropy: bool
    transformed: bool
    aligned: bool
    top: bool = False


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


def top(call: TokenCall, k: int) -> Top:
    device.check(call.logits)
    (n, named), launch = call.tokens.shape, _launch(call)
    lanes = config.options(launch, device.TARGET)["num_warps"] * config.WARP[device.TARGET]
    if call.logits.dtype == torch.float64 or k > min(lanes, MOST) or named > MOST_NAMED:
        return plain.top(call, k)
    pieces, empty = launch.pieces, call.logits.new_empty
    found = Top(
        empty((pieces, n, k), dtype=torch.float64),
        empty((pieces, n, k), dtype=torch.int64),
        empty((pieces, n, len(FIELDS) + named), dtype=torch.float64),
    )
    arguments = {
        **_arguments(call),
        **found._asdict(),
        "columns_found": empty((pieces, n, ROOM), dtype=torch.int32),
        "keys": empty((pieces, n, ROOM), dtype=torch.int64),
        "wanted": k,
    }
    _run(_kind(call._replace(entropy=False), None)._replace(top=True), launch, call, arguments)
    each = [Top(*fields) for fields in zip(*found, strict=True)]
    return each[0] if pieces == 1 else merged_top(each, call.tokens)


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
    if kind.top:
        kernel = top_kernel
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
        unroll=1 if kind.transformed or kind.top else launch.unroll,
        width=16 // items[lead],
        item=items[lead],
        aligned=kind.aligned,
        pieces=launch.pieces,
        stages=launch.stages,
        aligned_to=lead,
        metrics=kind.entropy,
        transformed_s=kind.transformed,
        room=ROOM if kind.top else 0,
    )
