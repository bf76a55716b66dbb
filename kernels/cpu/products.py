"""The matrix products of heads on a CPU, with fp32 results for half-precision operands."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["head_dtypes", "mm_"]

HALF = (torch.bfloat16, torch.float16)
# Without a matrix product that widens, operands are widened this much at a time.
WIDEN_BYTES = 64 << 20


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """See :mod:`fusedkd.kernels`. Half-precision heads have fp32 logits."""
    return (torch.float32 if dtype in HALF else dtype), dtype


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """See :mod:`fusedkd.kernels`.

    bf16 goes through the processor's own products (products.cpp, or torch where ``out`` is bf16
    too). Where it has none, blocks of the operands are widened and multiplied in fp32.
    """
    if a.dtype == torch.bfloat16 and _multiplies_bf16() and torch.backends.mkldnn.enabled:
        if out.dtype == torch.float32 and a.numel() and b.numel():
            torch.ops.fusedkd_cpu.matmul.default(out, a, b, accumulate)
            return
        if out.dtype == torch.bfloat16 and not accumulate:
            torch.mm(a, b, out=out)
            return
    if a.dtype not in HALF and a.dtype == out.dtype:
        out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
        return
    _mm_widened(out, a, b, accumulate)


@functools.cache
def _multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.fusedkd_cpu.matmul_supported()


def _mm_widened(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """In blocks of the longest dimension; each block's product is rounded to ``out`` once."""
    (m, k), n = a.shape, b.shape[1]
    dtype = torch.promote_types(out.dtype, torch.float32)
    longest = max(m, n, k)
    step = max(1, WIDEN_BYTES // (dtype.itemsize * max(1, sorted((m, n, k))[1])))
    if longest == k:
        total = out.to(dtype) if accumulate else out.new_zeros(m, n, dtype=dtype)
        for i in range(0, k, step):
            total = total.addmm(a[:, i : i + step].to(dtype), b[i : i + step].to(dtype))
        out.copy_(total)
        return
    wide = (b if longest == m else a).to(dtype)
    for i in range(0, longest, step):
        part = slice(i, i + step)
        if longest == m:
            target, product = out[part], a[part].to(dtype) @ wide
        else:
            target, product = out[:, part], wide @ b[:, part].to(dtype)
        target.copy_(target + product if accumulate else product)
