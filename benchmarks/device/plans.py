"""Which calls a visit makes, at full size or in a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from fusedkd import divergences
from fusedkd.kernels.triton import launches

from .calls import Call
from .card import GIB


@dataclass(frozen=True)
class Sizes:
    tiny: bool = False
    rows: int = 8192  # of what is timed
    vocab: int = 151936
    others: tuple[int, ...] = (32768, 50257, 50304, 128256, 262144)  # vocabularies, as many entries
    few: tuple[int, int] = (32, 262144)  # rows that are split into pieces
    laps: int = 9
    copies: tuple[float, ...] = (1, 4, 8)  # GB
    reread: tuple[float, ...] = (10, 20, 30, 40, 50, 60, 80, 100)  # MB, around L2
    square: int = 8192
    chunks: tuple[int, ...] = (256, 512, 704, 1024, 2048, 4096)  # rows of a product
    heads: tuple[tuple[int, int, int], ...] = ((8192, 4096, 4096), (16384, 2048, 4096))  # N, H, H
    budgets: tuple[float | None, ...] = (None, 0.25, 0.5, 1, 2, 4, 8)  # chunk_bytes, GiB
    raced: int = 4096  # rows against peers
    smoke: int = 140  # rows that are judged: more than SMs
    even: int = 50304
    odd: int = 50257
    small: tuple[int, ...] = (1, 2, 7, 5000, 32000)
    pieces: tuple[int, int] = (3, 151936)
    width: tuple[int, int] = (256, 128)  # of heads that are judged
    beyond: tuple[int, int] = (14336, 151936)  # over 2^31 entries
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32", "fp64")
    calls: int = 300  # of which the host's cost is a mean
    rounds: int = 3  # of so many calls
    watched: int = 2048  # rows under ncu


# Beside the table's: its lines were written without a GPU.
LAUNCHES = tuple((("warps", warps), ("unroll", unroll)) for warps in (8, 16) for unroll in (1, 2))
JOINT = tuple(vars(launches.JOINT).items())  # programs that wait for one another: may hang

FULL = Sizes()
TINY = Sizes(
    tiny=True, rows=2, vocab=600, others=(301,), few=(1, 1100), laps=2, copies=(0.001,),
    reread=(0.1,), square=64, chunks=(8,), heads=((6, 16, 8),), budgets=(None, 2e-5), raced=2,
    smoke=3, even=304, odd=301, small=(1, 7), pieces=(2, 32771), width=(16, 8), beyond=(5, 40),
    dtypes=("bf16", "fp32"), calls=1, rounds=1, watched=4,
)  # fmt: skip


def sizes(device: str) -> Sizes:
    return TINY if device == "cpu" else FULL


def judged(z: Sizes) -> list[Call]:
    """Every divergence in every form and dtype; then what is special, of two of them."""
    base = Call(rows=z.smoke, vocab=z.even, ce=0.5)
    odd, head = base.but(vocab=z.odd), base.but(form="head", hidden=z.width)
    few = base.but(rows=z.pieces[0], vocab=z.pieces[1])
    if z.tiny:
        return _of_a_dry_run(base, odd, head)
    calls = []
    for name in divergences.names():
        calls += [base.but(divergence=name, dtype=dtype) for dtype in z.dtypes]
        forms = [odd, head, few, base.but(form="bucket"), odd.but(look="masked", temperature=1.0)]
        forms += [base.but(dtype="fp32", look="close", ce=0.0), odd.but(temperature=0.7)]
        calls += [form.but(divergence=name) for form in forms]
    for name in ("forward_kl", "jsd", "total_variation"):
        calls += [base.but(divergence=name, form="drop"), odd.but(divergence=name, temperature=1.0)]
    calls += [odd.but(divergence=name, form="renormalize") for name in ("forward_kl", "jsd")]
    calls += [base.but(divergence="jsd", launch=launch) for launch in (*LAUNCHES, JOINT)]
    calls += [few.but(divergence=name, launch=JOINT) for name in ("forward_kl", "alpha")]
    calls += [base.but(vocab=v, divergence=d) for v in z.small for d in ("reverse_kl", "jsd")]
    for name in ("mixed_kl", "jsd"):
        calls += [call.but(divergence=name) for call in _special(base, odd, head)]
    return list(dict.fromkeys(calls))


def _special(base: Call, odd: Call, head: Call) -> list[Call]:
    """Tensors and keywords, one at a time."""
    keywords = {
        "inplace": True, "reduction": "sum", "kd_weight": 0.0, "label_smoothing": 0.1,
        "teacher_temperature": 0.7, "scale_by_t2": False, "vocab_size": odd.vocab - 37,
    }  # fmt: skip
    calls = [odd.but(look=look) for look in ("ignored", "sliced", "weights")]
    calls += [odd.but(more=((key, value),)) for key, value in keywords.items()]
    calls[-1] = calls[-1].but(ce=0.0)  # labels would lie beyond the vocabulary
    each = (("reduction", "none"),)
    calls += [odd.but(more=each), odd.but(mode="metrics"), odd.but(ce=0.0)]
    calls += [odd.but(form="bucket", look="ignored"), head.but(vocab=odd.vocab, more=each)]
    calls += [chunked(head.but(vocab=odd.vocab)), head.but(look="bent"), head.but(mode="frozen")]
    calls += [head.but(dtype="fp32"), head.but(form="mixed", hidden=(head.hidden[0], 0))]
    return [*calls, base.but(form="other", hidden=(0, head.hidden[1]))]


def _of_a_dry_run(base: Call, odd: Call, head: Call) -> list[Call]:
    """A taste of each, for the interpreter takes a second for a call."""
    calls = [odd.but(divergence=name) for name in ("reverse_kl", "jsd", "total_variation")]
    calls += [odd.but(divergence="alpha", dtype="fp32")]
    calls += [base.but(form="bucket"), base.but(form="drop"), chunked(head), head.but(look="bent")]
    calls += [odd.but(look=look) for look in ("masked", "ignored")]
    calls += [odd.but(launch=LAUNCHES[1]), odd.but(launch=JOINT)]
    return [*calls, odd.but(look="sliced", rows=4)]


def chunked(call: Call) -> Call:
    """With a budget that makes three chunks or more of a head's rows."""
    return call.but(more=(("chunk_bytes", call.vocab * 10 * max(2, call.rows // 3)),))


def timed(z: Sizes) -> list[Call]:
    base = Call(rows=z.rows, vocab=z.vocab)
    calls = [base.but(divergence=name) for name in divergences.names()]
    for name in ("forward_kl", "jsd"):
        one = base.but(divergence=name)
        calls += [one.but(temperature=1.0), one.but(temperature=0.7), one.but(ce=0.0)]
        calls += [one.but(mode="metrics"), one.but(mode="eval"), one.but(form="bucket")]
        calls += [one.but(dtype="fp32", rows=max(1, z.rows // 2)), one.but(form="drop")]
        calls += [one.but(vocab=v, rows=max(1, z.rows * z.vocab // v)) for v in z.others]
        calls += [one.but(rows=z.few[0], vocab=z.few[1]), *(one.but(launch=x) for x in LAUNCHES)]
    calls += [base.but(divergence=name, launch=JOINT) for name in divergences.names()]
    return calls[:: 9 if z.tiny else 1]


def through_heads(z: Sizes) -> list[Call]:
    calls = []
    for rows, *hidden in z.heads:
        base = Call("head", rows=rows, vocab=z.vocab, hidden=(hidden[0], hidden[1]))
        for name in ("forward_kl", "jsd"):
            for gib in z.budgets:
                more = () if gib is None else (("chunk_bytes", int(gib * GIB)),)
                calls.append(base.but(divergence=name, more=more))
        calls += [base.but(mode="frozen"), base.but(mode="eval")]
    return calls


def of_the_host(z: Sizes) -> dict[str, Call]:
    small = Call(rows=8, vocab=1000)
    if z.tiny:
        return {
            "dense": small.but(vocab=z.vocab),
            "bucket": small.but(vocab=z.vocab, form="bucket"),
        }
    return {
        "dense": small,
        "jsd": small.but(divergence="jsd"),
        "bucket": small.but(form="bucket"),
        # how many rows count is known: without it the host asks the GPU, once a call
        "head": small.but(form="head", hidden=(64, 64), more=(("num_counted", 8),)),
        "many rows": small.but(divergence="jsd", rows=2 * z.smoke, vocab=z.odd),
        "pieces": small.but(divergence="jsd", rows=z.pieces[0], vocab=z.pieces[1]),
    }


def careful() -> list[Call]:
    """Of compute-sanitizer, which takes 10 to 100 times as long: in place, in pieces, scattered."""
    return [
        Call(rows=6, vocab=2085, more=(("inplace", True),)),
        Call(rows=2, vocab=33001, divergence="jsd"),
        Call(rows=3, vocab=2085, form="bucket", divergence="jsd"),
    ]
