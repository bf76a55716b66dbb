"""The matrix products of heads on a CPU, with fp32 results for half-precision operands."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
# Without a matrix product that widens, operands are widened this much at a time: what stays in a
# cache between being written and being read. Against the fp32 product of operands that are wide
# already: 0.8 to 1.05x at 1 to 4 MiB, 1.2x at 16 and 64 MiB (128 and 512 tokens x 896 x 32,000, 2
# cores of Zen 3, 2026-11-24).
WIDEN_BYTES = 2 << 20


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Half-precision heads have fp32 logits. Their gradient is rounded
    to bf16 only where the processor multiplies bf16; elsewhere it would have to be widened again.
    """
    logits = torch.float32 if dtype in HALF else dtype
    return logits, (dtype if _multiplies(dtype) else logits)


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """bf16 goes through the processor's own products (products.cpp). Where it has none, blocks of
    the operands are widened and multiplied in fp32.
    """
    half = a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
    if half and _multiplies(a.dtype) and a.numel() and b.numel():
        torch.ops.fusedkd_cpu.matmul.default(out, a, b, accumulate)
    elif a.dtype == b.dtype == out.dtype:
        _multiply(out, a, b, accumulate)
    else:
        _mm_widened(out, a, b, accumulate)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` run on the processor's own instructions."""
    if dtype not in HALF:
        return True
    return dtype == torch.bfloat16 and bool(torch.backends.mkldnn.enabled) and _multiplies_bf16()


@functools.cache
def _multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.fusedkd_cpu.matmul_supported()


def _mm_widened(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """``out = a @ b (+ out)`` in out's type, in blocks of the longest dimension: of the rows of
    ``a``, of the columns of ``b``, or of what is summed over.
    """
    (m, k), n = a.shape, b.shape[1]
    dtype = out.dtype
    if m == max(m, n, k):
        wide = b.to(dtype)
        for rows in _blocks(m, k, dtype):
            _multiply(out[rows], _widened("a", a[rows], dtype), wide, accumulate)
    elif n == max(m, n, k):
        wide = a.to(dtype)
        for columns in _blocks(n, k, dtype):
            _multiply(out[:, columns], wide, _widened("b", b[:, columns], dtype), accumulate)
    else:
        if not accumulate:
            out.zero_()
        for part in _blocks(k, max(m, n), dtype):
            left, right = _widened("a", a[:, part], dtype), _widened("b", b[part], dtype)
            _multiply(out, left, right, True)


def _multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)


def _blocks(length: int, other: int, dtype: torch.dtype) -> list[slice]:
    step = max(16, WIDEN_BYTES // (dtype.itemsize * max(1, other)))
    return [slice(start, start + step) for start in range(0, length, step)]


_scratch = threading.local()


def _widened(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """``block`` in ``dtype``, in memory that the next block uses again: fresh pages cost more than
    the conversion."""
    if block.dtype == dtype:
        return block
    memory = getattr(_scratch, name, None)
    if memory is None or memory.dtype != dtype or memory.numel() < block.numel():
        size = max(block.numel(), WIDEN_BYTES // dtype.itemsize)
        with torch.inference_mode(False):  # usable outside it, whoever comes first
            memory = torch.empty(size, dtype=dtype, device=block.device)
        setattr(_scratch, name, memory)
    flat = memory[: block.numel()]
    by_columns = block.stride(0) == 1 and block.stride(1) != 1  # keep what is contiguous so
    out = flat.view(block.shape[::-1]).t() if by_columns else flat.view(block.shape)
    return out.copy_(block)
