"""Which cases are measured, and the bars that the project has set itself for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusedkd import divergences

from .case import DTYPES, Case, native_dtype
from .provider import EMPTY, FLOOR, OURS
from .results import GroupResult
from .runner import Bar, Group

VOCABULARIES = (32000, 50257, 128256, 151936, 262144)


def at_most(label: str, case: Case, against: str, limit: float) -> Bar:
    """fusedkd's time over another's."""
    return Bar(label, lambda m: _ratio(m.time(case, OURS), m.time(case, against)), limit)


def faster(case: Case, **limits: float) -> tuple[Bar, ...]:
    """How many times as fast as peers."""
    return tuple(
        Bar(
            f"faster than {'torch.compile' if peer == 'compile' else peer}",
            lambda m, peer=peer: _ratio(m.time(case, peer), m.time(case, OURS)),  # type: ignore[misc]
            *(limit, False),
        )
        for peer, limit in limits.items()
    )


def _relative(label: str, case: Case, other: Case, limit: float, at_most: bool = True) -> Bar:
    """fusedkd's time on one case over its time on another."""
    return Bar(label, lambda m: _ratio(m.time(case, OURS), m.time(other, OURS)), limit, at_most)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def quick(device: str) -> list[Group]:
    """Two minutes on two cores: one dense race, one JSD, one head, the cost of a small call."""
    case = Case(n=128, device=device)
    jsd = case.but(divergence="jsd")
    head = Case(form="head", n=128, vocab=32000, device=device, dtype=native_dtype(device))
    return [
        Group(
            "Dense, forward KL + CE",
            (case,),
            (OURS, "eager", "compile", "gkd", FLOOR),
            (*faster(case, compile=8, eager=32), _floor(case, device)),
            memory=True,
        ),
        Group("Dense, JSD + CE", (jsd,), (OURS, "eager", FLOOR), faster(jsd, eager=25)),
        Group("LMHead, forward KL + CE", (head,), (OURS, "eager", FLOOR), (_floor(head, device),)),
        _small_call(device),
    ]


def headline(device: str) -> list[Group]:
    """Everything the project promises, each with its bar."""
    return [
        *_dense(device),
        *_heads(device),
        *_counted(device),
        _odd_vocabulary(device),
        *_growth(device),
        _small_call(device),
        _divergences(device),
        *([_threads()] if device == "cpu" else []),
        *_memory(device),
    ]


# ----------------------------------------------------------------------------------------------
# time


def _floor(case: Case, device: str) -> Bar:
    """Dense: bytes moved; head: the bare products. Looser where a middle pass is needed."""
    middle = case.divergence not in ("forward_kl", "reverse_kl", "mixed_kl")
    if case.form == "head":
        limit = 1.15 if device == "cuda" else (1.35 if middle else 1.25)
        return at_most("of the bare products", case, FLOOR, limit)
    limit = (1 / 0.75 if middle else 1 / 0.9) if device == "cuda" else 1.6
    return at_most("of moving the bytes", case, FLOOR, limit)


def _dense(device: str) -> list[Group]:
    gpu = device == "cuda"
    base = Case(n=4096 if gpu else 512, device=device)
    warm, jsd = base.but(temperature=1.7), base.but(divergence="jsd")
    fp32 = base.but(dtype="fp32", n=base.n // 2)
    # what is raced, against whom, and on a CPU how many times as fast; on a GPU the floor alone
    races: list[tuple[str, Case, tuple[str, ...], dict[str, float]]] = [
        ("bf16, forward KL + CE, T = 2", base, ("torchtune", "gkd"), {"compile": 8, "eager": 32}),
        ("bf16, forward KL + CE, T = 1.7", warm, (), {"compile": 8, "eager": 32}),
        ("bf16, JSD + CE", jsd, ("gkd",), {"compile": 10, "eager": 25}),
        ("fp32, forward KL + CE", fp32, (), {"compile": 4}),
    ]
    groups = []
    for title, case, peers, limits in races:
        bars = () if gpu else faster(case, **limits)
        if gpu or case in (base, warm):
            bars += (_floor(case, device),)
        names = (OURS, "eager", "compile", *peers, FLOOR)
        groups.append(Group(f"Dense {title}", (case,), names, bars))
    return groups


def _heads(device: str) -> list[Group]:
    """In bf16 against the bare products; peers in the dtype that this machine multiplies."""
    gpu = device == "cuda"
    base = Case(form="head", n=4096 if gpu else 512, device=device)
    native = base.but(dtype=native_dtype(device))
    kl = ("eager", "compile", "liger")
    groups = [
        (f"LMHead {native.dtype}, forward KL + CE", native, kl),
        (
            f"LMHead {native.dtype}, JSD",
            native.but(divergence="jsd", ce_weight=0.0, n=base.n if gpu else 128),
            (*kl, "liger-triton", "trl"),
        ),
        ("LMHead bf16, forward KL + CE", base, ()),
        ("LMHead bf16, JSD", base.but(divergence="jsd", ce_weight=0.0), ()),
        ("LMHead bf16, evaluation", base.but(mode="eval"), ()),
        ("LMHead bf16, frozen student head", base.but(frozen=True), ()),
        ("LMHead bf16, many tokens", base.but(n=16384 if gpu else 4096), ()),
    ]
    if native == base:  # the same race twice
        del groups[2:4]
    return [
        Group(title, (case,), (OURS, *peers, FLOOR), (_floor(case, device),))
        for title, case, peers in groups
    ]


def _counted(device: str) -> list[Group]:
    """Instruction tuning: labels on a share of the tokens. Against a call with those alone."""
    gpu = device == "cuda"
    base = Case(form="head", n=4096 if gpu else 512, device=device, dtype=native_dtype(device))
    shares = [base.but(counted=share) for share in (0.1, 0.25, 0.5)]
    alone = {case: case.but(n=case.n_counted, counted=1.0) for case in shares}
    bars = [
        _relative(f"{case.counted:.0%} of the rows, against those alone", case, alone[case], 1.1)
        for case in shares
    ]
    quarter = base.but(counted=0.25, ce_weight=0.0)
    frozen = base.but(frozen=True)
    per_row = frozen.but(reduction="none")
    return [
        Group("LMHead, rows that count", (*shares, *alone.values()), (OURS, FLOOR), tuple(bars)),
        Group(
            "LMHead, a quarter of the rows counts",
            (quarter,),
            (OURS, "liger", "trl", FLOOR),
            () if gpu else faster(quarter, liger=8, trl=15),
        ),
        Group(
            "LMHead, frozen student head, a loss per row",
            (frozen, per_row),
            (OURS,),
            (_relative("reduction='none' against 'mean'", per_row, frozen, 1.15),),
        ),
    ]


def _odd_vocabulary(device: str) -> Group:
    n = 8192 if device == "cuda" else 1024
    odd, even = (Case(n=n, vocab=v, device=device) for v in (50257, 50304))

    def per_element(m: GroupResult) -> float | None:
        ratio = _ratio(m.time(odd, OURS), m.time(even, OURS))
        return ratio * even.vocab / odd.vocab if ratio else None

    limit = 1 / 0.8 if device == "cuda" else 1.1
    bar = Bar("time per element, 50,257 over 50,304", per_element, limit)
    return Group("An odd vocabulary", (odd, even), (OURS, FLOOR), (bar,))


def _growth(device: str) -> list[Group]:
    base = Case(n=1024 if device == "cuda" else 128, device=device)
    by_v = tuple(base.but(vocab=v) for v in VOCABULARIES)
    by_n = tuple(base.but(n=base.n * k) for k in (1, 2, 4, 8))
    return [
        Group(
            "Growth with the vocabulary",
            by_v,
            (OURS, "eager", "gkd", FLOOR),
            (Bar("slope of log time in log V", lambda m: _slope(m, by_v, "vocab"), 1.1, unit=""),),
        ),
        Group(
            "Growth with the tokens",
            by_n,
            (OURS, FLOOR),
            (Bar("slope of log time in log N", lambda m: _slope(m, by_n, "n"), 1.1, unit=""),),
        ),
    ]


def _slope(m: GroupResult, cases: Sequence[Case], axis: str) -> float | None:
    """Least squares through (log axis, log time)."""
    times = [(getattr(case, axis), m.time(case, OURS)) for case in cases]
    points = [(math.log(x), math.log(t)) for x, t in times if t]
    if len(points) < 2:
        return None
    mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def _small_call(device: str) -> Group:
    """On a GPU what the host spends on it, which is what a step waits for."""
    gpu = device == "cuda"
    small = Case(n=8, vocab=1000, device=device, threads=None if gpu else 1)

    def host(m: GroupResult) -> float | None:
        row = m.row(small, OURS)
        return None if row is None or row.host_ms is None else row.host_ms * 1e3

    bar = at_most("of an empty autograd function", small, EMPTY, 5)
    bar = Bar("of the host's time", host, 100, unit=" us") if gpu else bar
    return Group("A small call", (small,), (OURS, "eager", EMPTY), (bar,))


def _divergences(device: str) -> Group:
    base = Case(n=2048 if device == "cuda" else 256, device=device)
    cases = tuple(base.but(divergence=name) for name in divergences.names())

    bars = tuple(
        _relative(f"{case.divergence} relative to forward_kl", case, base, 2.5)
        for case in cases
        if case != base
    )
    return Group("Every divergence", cases, (OURS,), bars)


def _threads() -> Group:
    one, two = (Case(threads=n) for n in (1, 2))
    bar = _relative("2 threads against 1", one, two, 1.8, at_most=False)
    return Group("Threads", (one, two), (OURS, FLOOR), (bar,))


# ----------------------------------------------------------------------------------------------
# memory

SLACK = 16 << 20  # rows of statistics, thread stacks, and what the allocators keep


def _memory(device: str) -> list[Group]:
    sizes = (512, 1024, 2048, 4096)
    dense = tuple(Case(n=n, device=device) for n in (512, 4096))
    native = native_dtype(device)
    heads = tuple(Case(form="head", n=n, device=device, dtype=native) for n in sizes)
    inplace = tuple(case.but(inplace=True) for case in dense)
    peers = (OURS, "eager", "gkd", "liger")
    groups = [
        ("dense", dense, (OURS,), _dense_bar),
        ("dense, in place", inplace, (OURS,), _dense_bar),
        ("LMHead", heads, peers, _head_bar),
    ]
    return [
        Group(f"Memory: {title}", cases, names, tuple(map(bar, cases)), False, True)
        for title, cases, names, bar in groups
    ]


def _dense_bar(case: Case) -> Bar:
    gradient = 0 if case.inplace else case.n * case.vocab * 2
    return _memory_bar(case, gradient, "nothing" if case.inplace else "one gradient")


def _head_bar(case: Case) -> Bar:
    """The budget, the gradients of weight and rows, and what each is summed in (fp32; the same for
    fp32)."""
    from fusedkd.cut import CHUNK_BYTES  # at most: a small GPU's default is less

    budget = case.chunk_bytes or CHUNK_BYTES[case.device]
    gradients, item = (case.vocab + case.n) * case.hidden_student, DTYPES[case.dtype].itemsize
    allowed = budget + gradients * (item % 4 + 4)
    return _memory_bar(case, allowed, "chunk_bytes, dW and dh, each with its fp32 sum")


def _memory_bar(case: Case, allowed: int, what: str) -> Bar:
    def value(m: GroupResult) -> float | None:
        peak = m.peak(case, OURS)
        return None if peak is None else peak / 2**20

    return Bar(f"N = {case.n:,}: {what}", value, (allowed + SLACK) / 2**20, unit=" MiB")
