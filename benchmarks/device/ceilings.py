"""Step: what the memory, L2 and the vendor's products give: what the shares are shares of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import place
from .card import GB, Card, rate
from .journal import Item, Journal
from .plans import Sizes

PASSES = 10  # over what is read again

# Of rows x inner and inner x columns, as a head lays them out: (rows, inner, columns) out of a
# chunk's rows, the hidden width and the vocabulary.
PRODUCTS: dict[str, Callable[[int, int, int], tuple[int, int, int]]] = {
    "logits": lambda n, h, v: (n, h, v),
    "logits fp32": lambda n, h, v: (n, h, v),
    "hidden": lambda n, h, v: (n, v, h),
    "weight": lambda n, h, v: (v, n, h),
    "weight fp32 add": lambda n, h, v: (v, n, h),
}


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    middle = sizes.copies[len(sizes.copies) // 2]
    for gigabytes in sizes.copies:
        journal.item(f"copy {gigabytes:g} GB", card.copy, gigabytes, sizes.laps)
    journal.item("triad", _triad, card, middle, sizes)
    journal.item("read", _reread, card, middle * 1000, False, sizes, 0)
    for megabytes in sizes.reread:
        for turning in (False, True):
            name = f"again {megabytes:g} MB{' turning' if turning else ''}"
            journal.item(name, _reread, card, megabytes, turning, sizes, PASSES)
    journal.item("square", _product, card, "square", (sizes.square,) * 3, sizes)
    for rows in sizes.chunks:
        for kind, shape in PRODUCTS.items():
            hidden = 16 if sizes.tiny else 4096
            journal.item(
                f"{kind} {rows}", _product, card, kind, shape(rows, hidden, sizes.vocab), sizes
            )
        card.free()
    journal.item(
        "clocks", lambda: {"smi": place.smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")}
    )


def _triad(card: Card, gigabytes: float, sizes: Sizes) -> Item:
    """Two tensors read, one written, as a row kernel does."""
    a, b, out = (
        torch.zeros(int(gigabytes * GB / 8), dtype=torch.int64, device=card.device)
        for _ in range(3)
    )
    return rate(card.lap(lambda: torch.add(a, b, out=out), sizes.laps), 24 * a.numel())


@functools.cache
def _kernel() -> Any:
    """Every program reads its share of x ``passes`` times, past L1; ``TURN``: back and forth, as
    the sweeps of a row kernel do."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=("tiles", "passes"))
    def reread(x, out, tiles, passes, BLOCK: tl.constexpr, TURN: tl.constexpr):
        at = tl.arange(0, BLOCK)
        share = x + tl.program_id(0).to(tl.int64) * tiles * BLOCK
        total = tl.zeros([BLOCK], tl.float32)
        for i in range(passes):
            for k in range(tiles):
                tile = k
                if TURN:
                    tile = tl.where(i % 2 == 1, tiles - 1 - k, k)
                total += tl.load(share + tile * BLOCK + at, cache_modifier=".cg")
        tl.store(out + tl.program_id(0) * BLOCK + at, total)

    return reread


def _reread(card: Card, megabytes: float, turning: bool, sizes: Sizes, again: int) -> Item:
    """What reading once takes; with ``again`` what each further pass takes, from L2 if it fits."""
    block, grid = (256, 2) if sizes.tiny else (2048, 4 * card.processors)
    tiles = max(1, round(megabytes * 1e6 / 4 / block / grid))
    x = torch.ones(tiles * block * grid, device=card.device)
    out = torch.empty(block * grid, device=card.device)
    size = 4 * x.numel()

    def passes(count: int) -> Item:
        launch = _kernel()[(grid,)]
        return card.lap(
            lambda: launch(x, out, tiles, count, BLOCK=block, TURN=turning, num_warps=8), sizes.laps
        )

    once = passes(1)
    if not again:
        return rate(once, size)
    ms = max(passes(1 + again)["ms"] - once["ms"], 1e-6) / again
    return {**rate({"ms": ms}, size), "mb": size / 1e6, "first_gb_s": rate(once, size)["gb_s"]}


def _product(card: Card, kind: str, shape: tuple[int, int, int], sizes: Sizes) -> Item:
    rows, inner, columns = shape

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=card.device, dtype=torch.bfloat16)

    a = random(inner, rows).T if "weight" in kind else random(rows, inner)
    b = random(columns, inner).T if "logits" in kind else random(inner, columns)
    dtype = torch.float32 if "fp32" in kind else torch.bfloat16
    out = torch.zeros(rows, columns, device=card.device, dtype=dtype)
    from fusedkd import backends  # the product that a head makes, whatever torch offers for it

    mm_ = backends.load("triton").mm_
    lap = card.lap(lambda: mm_(out, a, b, accumulate="add" in kind), sizes.laps)
    return {**lap, "tflops": round(2e-9 * rows * inner * columns / lap["ms"], 1)}
