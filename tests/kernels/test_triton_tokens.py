"""The Triton kernels of single tokens, against the same verbs in fp64: tiles, pieces and edges, as
in ``test_triton_rows.py``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd import backends
from fusedkd.kernels import Part, reference
from fusedkd.kernels.tokens import Factors, TokenCall
from fusedkd.spec import IDENTITY, Transform

if reason := backends.load("triton").unavailable():
    pytest.skip(reason, allow_module_level=True)

from fusedkd.kernels.triton import config
from fusedkd.kernels.triton import device as machine

triton: Any = backends.load("triton")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LAUNCHES = (
    config.Launch(pieces=1, warps=1, unroll=1),
    config.Launch(pieces=1, warps=1, unroll=2),
    config.Launch(pieces=4, warps=1, unroll=1),
)
# logits, their gradient: a head's chunk is the third
DTYPES = ((BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP32), (FP64, FP64))
COLUMNS = (1, 257, 780)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if machine.INTERPRETED else "cuda")


def call_of(dtype: torch.dtype, columns: int, how: Transform, device: torch.device) -> TokenCall:
    """Five rows in two batches, of which the second has no neighbour; the last does not count; an
    id twice, one of another rank, one of nothing, one of probability 0."""
    offset = 100
    memory = 3 * torch.randn(2, 4, columns + 7)
    memory[0, 1, : columns // 2] = -math.inf
    memory[1, 2] = math.nan
    logits = memory.to(dtype).to(device)[:, :3, 3:]
    tokens = torch.randint(offset, offset + columns, (6, 3), device=device)
    tokens[0, 1], tokens[2, 0], tokens[3, 2] = tokens[0, 0], offset - 1, -1
    tokens[1, 0], tokens[4, 1] = offset, offset + columns
    counts = torch.tensor([True] * 5 + [False], device=device)
    return TokenCall(logits, tokens, counts, 1.7, how, Part(offset, columns), True)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_statistics_and_gradient(
    dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = LAUNCHES[DTYPES.index(dtypes) % len(LAUNCHES)]
    monkeypatch.setattr(config, "choose", lambda *_: launch)
    torch.manual_seed(0)
    for i, columns in enumerate(COLUMNS):
        how = Transform(0.7, 5.0) if i % 2 else IDENTITY
        call = call_of(dtypes[0], columns, how, device)
        exact = reference.token_statistics(call._replace(logits=call.logits.double()))
        known = triton.token_statistics(call)
        small = 1e-12 if dtypes[0] == FP64 else 1e-6
        torch.testing.assert_close(known, exact, rtol=small, atol=small)
        alone = triton.token_statistics(call._replace(entropy=False))
        assert torch.equal(alone[:, [0, 1, 3, 4, 5]], known[:, [0, 1, 3, 4, 5]])
        of_tokens = torch.randn(6, 3, dtype=FP64, device=device).masked_fill(call.tokens < 0, 0.0)
        for of_rows in (None, torch.randn(6, dtype=FP64, device=device)):
            factors = Factors(of_tokens, of_rows)
            want = _gradient(reference, call, exact, factors, FP64)
            got = _gradient(triton, call, exact, factors, dtypes[1])
            unit = torch.finfo(dtypes[1]).eps / 2 + small
            torch.testing.assert_close(got.double(), want, rtol=unit, atol=small)
            assert (got[..., columns:] == 0).all() and (got.view(6, -1)[5] == 0).all()
        if dtypes[0] == dtypes[1]:  # over the logits
            over = call._replace(logits=call.logits.clone())
            triton.token_gradient(over, exact, factors, over.logits)
            torch.testing.assert_close(over.logits, got, rtol=0, atol=0)


def _gradient(
    module: Any, call: TokenCall, known: Tensor, factors: Factors, dtype: torch.dtype
) -> Tensor:
    if module is reference:
        call = call._replace(logits=call.logits.double())
    out = torch.full(call.logits.shape, math.nan, dtype=dtype, device=call.logits.device)
    module.token_gradient(call, known, factors, out)
    return out
