"""Rows in pieces, as the ranks of a group have them, one after the other in one process; held to
the whole rows in fp64."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from fusedkd import divergences
from fusedkd.distributions.sparse import SparseRows, canonical
from fusedkd.kernels import Part, RowCall, Rows, Statistics, reference
from fusedkd.spec import LossSpec

INF, NAN = math.inf, math.nan
N, V = 12, 4219
SPLITS = [
    (V,),
    (2048, V - 2048),
    (0, 1, V - 1),
    (700, 0, 1500, 17, 1983, 19, 0),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def in_pieces(backend: ModuleType, call: RowCall, sizes: tuple[int, ...]) -> Rows:
    """As the ranks of a group do it, one after the other; the gradient goes where the call wants
    it."""
    calls, offset = [], 0
    for size in sizes:
        calls.append(_columns(call, offset, size))
        offset += size
    results, grads = _verbs(backend, calls)
    if call.grad is not None:
        live = [g[..., :size] for g, size in zip(grads, sizes, strict=True)]
        call.grad[..., : call.spec.vocab_size] = torch.cat(live, -1)
        assert all((g[..., size:] == 0).all() for g, size in zip(grads, sizes, strict=True))
    return results


def _columns(call: RowCall, offset: int, size: int) -> RowCall:
    """A piece with a column of padding; the gradient over NaN, so that what is left out shows."""

    def padded(x: Tensor) -> Tensor:
        piece = x[..., offset : offset + size]
        return torch.cat([piece, torch.full_like(x[..., :1], NAN)], -1)

    teacher = call.teacher
    if isinstance(teacher, Tensor):
        teacher = padded(teacher)
    grad = None if call.grad is None else torch.full_like(padded(call.grad), NAN)
    part = Part(offset, size)
    return call._replace(student=padded(call.student), teacher=teacher, grad=grad, part=part)


def _verbs(backend: ModuleType, calls: list[RowCall]) -> tuple[Rows, list[Tensor]]:
    merged = backend.merge([backend.observe(c) for c in calls])
    compared = [backend.compare(c, merged) for c in calls]
    if compared[0] is not None:
        sums = torch.stack([c.sums for c in compared]).sum(0)
        compared = [c._replace(sums=sums) for c in compared]
    done = [backend.finish(c, merged, x) for c, x in zip(calls, compared, strict=True)]
    results, again = done[0]
    for other, flags in done[1:]:
        same = [
            torch.equal(bits(x), bits(y))
            for x, y in zip(results, other, strict=True)
            if x is not None
        ]
        assert all(same), "the pieces disagree"
        assert (flags is None and again is None) or torch.equal(flags, again)
    grads = [c.grad for c in calls if c.grad is not None]
    if again is not None and again.any():
        rows = again.nonzero()[:, 0]
        exact = [c.of(rows, c.part._replace(exact=True)) for c in calls]  # type: ignore[union-attr]
        some, found = _verbs(backend, exact)
        results.put(rows, some)
        for grad, g in zip(grads, found, strict=True):
            grad[:, rows] = g
    return results, grads


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def make(
    dtype: torch.dtype, name: str, tail: str = "", temperature: float = 2.0, **fields: object
) -> RowCall:
    """Rows of all kinds: masked logits and a masked piece, one that does not count and is NaN, one
    whose p and q hardly meet, ties at the top."""
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(1, N, V, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    s[0, 1, 100:300] = t[0, 2, 200:400] = -INF
    s[0, 3, :2048] = -INF
    s[0, 4], t[0, 4] = NAN, NAN
    s[0, 5, 7], t[0, 5, 3000] = 60.0, 60.0
    s[0, 6, [9, 4000]] = 30.0
    t[0, 7] = s[0, 7] + 0.01 * t[0, 7]
    labels = torch.randint(0, V, (N,), generator=draw)
    labels[3] = 3000
    weights = torch.rand(N, generator=draw, dtype=torch.float64) + 0.5
    weights[4] = 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spec = LossSpec(
        divergences.make(name), V, temperature=temperature, teacher_temperature=1.5, ce_weight=0.3,
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    student, teacher = s.to(dtype), t.to(dtype)
    rows: Tensor | SparseRows = teacher
    weights = weights.to(wide)
    if tail:
        log_probs, ids = teacher[0].to(wide).log_softmax(-1).nan_to_num().topk(20)
        ids[8, 11:] = -1
        rows = canonical(ids, log_probs.clamp(max=0), weights, spec, tail)
    return RowCall(student, rows, labels, weights, spec, torch.empty_like(student), True)


def truth(call: RowCall) -> tuple[Rows, Tensor]:
    """The whole rows in fp64, differentiated by autograd."""
    double, weights = call.student.double(), call.row_scale.double()
    teacher = call.teacher.double() if isinstance(call.teacher, Tensor) else call.teacher
    grad = torch.empty_like(double)
    return reference.rows(
        call._replace(student=double, teacher=teacher, row_scale=weights, grad=grad)
    ), grad


def check(backend: ModuleType, call: RowCall, sizes: tuple[int, ...], eps: float = 5e-6) -> None:
    assert call.grad is not None
    want, gradient = truth(call)
    got = in_pieces(backend, call, sizes)
    wide = call.row_scale.dtype == torch.float64
    relative = 1e-11 if wide else eps
    rounding = 0.0 if wide else torch.finfo(call.student.dtype).eps / 2
    pairs = [(got.loss[:, None], want.loss[:, None], 0.0), (got.metrics, want.metrics, 0.0)]
    for x, y, own in [*pairs, (call.grad[0], gradient[0], rounding)]:
        assert x is not None and y is not None
        x = x.double()
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())
        size = y.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True).clamp(min=1e-3)
        tiny = 2.0**-25 if call.student.dtype == torch.float16 else 0.0
        slack = relative * size + own * y.abs() * 1.01 + tiny * (own > 0)
        off = ((x - y).abs() - slack).nan_to_num(0, 0, 0)
        assert off.max() <= 0, (off.max(), off.argmax(), x.flatten()[off.argmax()])


def statistics() -> list[Tensor]:
    """Of three pieces, random, with what is rare: ties, nothing, masks and no numbers."""
    names = Statistics._fields
    draw = torch.Generator().manual_seed(2)
    pieces = [torch.randn(40, len(names), generator=draw).double() for _ in range(3)]
    pieces[1][0:9] = pieces[0][0:9]  # the first of several tops
    pieces[2][1, :] = NAN
    top = names.index("student_max")
    for row, value in ((2, INF), (3, -INF), (4, NAN)):
        pieces[1][row, top : top + 2] = value
    for piece in pieces:
        piece[5, : names.index("teacher_sum")] = -INF
    return pieces
