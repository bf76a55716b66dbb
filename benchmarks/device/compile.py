"""Step: sixteen processes fill one cache with the kernels of the later steps; registers and spills
of each; and in further ones the model of the dense rows (roofline.py) under this Triton."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusedkd import divergences

from .journal import Item, Journal, items_of
from .orders import Orders, end, start

PROCESSES = 16
WARM_PEERS = ("compile", "liger-triton")  # torch.compile needs the very shapes


def run(journal: Journal, orders: Orders) -> None:
    count = 1 if orders.device == "cpu" else min(PROCESSES, os.cpu_count() or 1)
    whats = [(f"{i}/{count}", "warm") for i in range(count)]
    # compiled for a target that is no device, which the interpreter's process cannot
    counters = max(1, count // 4)
    whats += [(f"{i}/{counters}", "counted") for i in range(counters)]
    parts = [orders.but(what=what, part=part) for part, what in whats]
    for part in parts:
        part.journal.unlink(missing_ok=True)
    interpreted = os.environ.get("TRITON_INTERPRET", "0")
    children = [
        start(part.command, None, TRITON_INTERPRET=interpreted if part.what == "warm" else "0")
        for part in parts
    ]
    journal.item("processes", _wait, children, orders)
    for part in parts:
        for item in items_of(part.journal):
            journal.write(item)
    journal.item("kernels", _kernels, Path(os.environ["TRITON_CACHE_DIR"]))


def _wait(children: list[subprocess.Popen[str]], orders: Orders) -> Item:
    while any(child.poll() is None for child in children) and orders.left > 0:
        time.sleep(0.1)
    late = [child for child in children if child.poll() is None]
    for child in late:
        end(child.pid)
    codes = sorted({child.wait() for child in children if child not in late} - {0})
    item: Item = {"processes": len(children), "late": len(late)}
    return {**item, "wrong": f"processes ended with {codes}"} if codes else item


def _kernels(cache: Path) -> Item:
    """Of every kernel in the cache, by the cuobjdump that comes with Triton."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def usage(cubin: Path) -> Item:
        command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        spilled = sizes.get("STACK", 0) + sizes.get("LOCAL", 0)
        return {"kernel": cubin.stem, "registers": sizes.get("REG", 0), "spilled": spilled}

    with ThreadPoolExecutor(PROCESSES) as pool:
        kernels = list(pool.map(usage, sorted(cache.glob("*/*.cubin"))))
    worst = sorted(kernels, key=lambda k: (k["spilled"], k["registers"]))[-12:]
    spilled = sum(k["spilled"] > 0 for k in kernels if not k["kernel"].startswith(("_", "triton_")))
    return {"count": len(kernels), "spilled": spilled, "worst": worst}


# --------------------------------------------------------------------------------------------------
# in the processes


def warm(orders: Orders, card: Any) -> None:
    """A share of the calls that follow, with few rows of the same vocabulary: a launch may depend
    on the vocabulary and on whether rows are fewer than SMs, not on how many they are."""
    from . import peers, plans
    from .calls import Call, problem_of, step_of

    z = plans.sizes(orders.device)
    lists = [plans.judged(z), plans.timed(z), plans.through_heads(z), plans.careful()]
    lists.append([*plans.of_the_host(z).values()])
    most = 4 if z.tiny else 2 * card.processors + 8

    def light(call: Call) -> Call:
        few = call.but(rows=min(call.rows, most))
        if max(call.hidden) <= 512:
            return few
        narrow = (min(64, call.hidden[0]), min(64, call.hidden[1]))
        return few.but(hidden=narrow, more=())  # sixteen heads of full width do not fit

    calls = list(dict.fromkeys(light(call) for some in lists for call in some))

    def one(call: Call) -> None:
        step_of(call, problem_of(call, card))()
        card.wait()
        card.free()

    work: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]
    work = [(call.label, one, (call,)) for call in (calls[::12] if z.tiny else calls)]
    if not z.tiny:  # their compilers are slow too, so they come first
        races = [(name, case) for name, case in peers.races(card, z) if name in WARM_PEERS]
        work = [(f"{n} {c.label}", peers.step, (n, c, card)) for n, c in races] + work
    part, count = map(int, orders.part.split("/"))
    journal = Journal(orders.journal, orders.deadline, card.free)
    for name, function, arguments in work[part::count]:
        journal.item(name, function, *arguments)


def counted(orders: Orders, card: Any) -> None:
    """What the model says of the dense kernels that are timed."""
    part, count = map(int, orders.part.split("/"))
    kernels = [(name, joint) for name in divergences.names() for joint in (False, True)]
    kernels = kernels[: 1 if orders.device == "cpu" else None]
    journal = Journal(orders.journal, orders.deadline)
    for name, joint in kernels[part::count]:
        journal.item(f"counted {name}{' joint' * joint}", _count, name, joint)


def _count(name: str, joint: bool) -> Item:
    from .. import counted

    counts = counted.counts(name, joint=joint)
    return counts._asdict() | {"sweeps": [sweep._asdict() for sweep in counts.sweeps]}
