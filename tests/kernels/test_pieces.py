"""A row in pieces is the whole row: loss, metrics and gradient, whatever lies where."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from own_rules import of_everything
from torch import Tensor
from torch.nn import functional as F

from fusedkd import divergences
from fusedkd.distributions.sparse import SparseRows, canonical
from fusedkd.kernels import METRICS, Part, RowCall, Rows, Statistics, cpu, reference
from fusedkd.kernels.pieces import merge
from fusedkd.spec import LossSpec, Transform

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
            torch.equal(_bits(x), _bits(y))
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


def _bits(x: Tensor) -> Tensor:
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


BACKENDS = [pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("sizes", SPLITS, ids=len)
@pytest.mark.parametrize("name", divergences.names())
def test_dense(module: ModuleType, name: str, sizes: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        check(module, make(dtype, name), sizes)


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("sizes", SPLITS, ids=len)
@pytest.mark.parametrize("name", divergences.names())
def test_bucket(module: ModuleType, name: str, sizes: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        check(module, make(dtype, name, "bucket"), sizes)


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("tail", ["drop", "renormalize"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "total_variation", "skew_forward_kl"])
def test_other_tails(module: ModuleType, name: str, tail: str) -> None:
    for sizes, dtype in zip(SPLITS, DTYPES, strict=True):
        check(module, make(dtype, name, tail), sizes)


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("tail", ["generalized", "conditional"])
@pytest.mark.parametrize("name", divergences.names())
def test_supports(module: ModuleType, name: str, tail: str) -> None:
    for sizes, dtype in zip(SPLITS, DTYPES, strict=True):
        check(module, make(dtype, name, tail), sizes)


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("tail", ["", "bucket", "drop", "conditional"])
def test_row_rules(module: ModuleType, tail: str) -> None:
    rule = of_everything(slope=0.3)
    for sizes, dtype in zip(SPLITS, DTYPES, strict=True):
        for name in ("forward_kl", "jsd"):
            check(module, make(dtype, name, tail, row_rule=rule), sizes)


@pytest.mark.parametrize("module", BACKENDS)
def test_ids_are_all_there_is(module: ModuleType) -> None:
    """Nothing is outside, or in a piece nothing inside."""
    for tail in ("bucket", "generalized", "conditional"):
        call = make(torch.float32, "jsd", tail)
        s = call.student.clone()
        s[0, :, 50:], s[0, 3, :50] = -INF, s[0, 2, :50]
        log_probs = torch.randn(N, 50, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
        ids = torch.arange(50).expand(N, 50)
        rows = canonical(ids, log_probs, call.row_scale, call.spec, tail)
        call = call._replace(student=s, teacher=rows, labels=call.labels.clamp(max=49))
        for sizes in SPLITS[1:]:
            check(module, call, sizes)


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("tail", ["", "bucket", "generalized", "conditional"])
def test_options(module: ModuleType, tail: str) -> None:
    """Softcap and scale, smoothing, T = 1, cross-entropy or divergence alone, no labels."""
    bent = Transform(0.7, 20.0)
    for fields in (
        {"student_transform": bent, "teacher_transform": bent},
        {"temperature": 1.0},
        {"kd_weight": 0.0},
    ):
        for name in ("reverse_kl", "jsd"):
            check(module, make(torch.float32, name, tail, **fields), SPLITS[2])  # type: ignore[arg-type]
    call = make(torch.bfloat16, "mixed_kl", tail)
    call = call._replace(labels=None, spec=LossSpec(call.spec.divergence, V))
    check(module, call, SPLITS[3])
    call = make(torch.float32, "jsd", tail, label_smoothing=0.2)
    student = call.student.clone()
    student[0, [1, 3]] = student[0, [0, 2]]  # smoothing of a masked vocabulary is infinite
    check(module, call._replace(student=student), SPLITS[2])


@pytest.mark.parametrize("tail", ["", "bucket", "drop", "generalized", "conditional"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_one_piece_has_the_rows_bits(name: str, tail: str) -> None:
    call = make(torch.bfloat16, name, tail, label_smoothing=0.1)
    assert call.grad is not None
    whole = call._replace(grad=torch.empty_like(call.grad))
    want, got = cpu.rows(whole), in_pieces(cpu, call, (V,))
    assert want.metrics is not None and got.metrics is not None
    kept = [
        i for i, name in enumerate(METRICS) if name not in ("kd", "student_entropy") or not tail
    ]
    assert torch.equal(_bits(call.grad), _bits(whole.grad)) if not tail else True
    torch.testing.assert_close(got.loss, want.loss, rtol=0 if not tail else 1e-6, atol=0)
    assert torch.equal(_bits(got.metrics[:, kept]), _bits(want.metrics[:, kept]))


def test_merged_statistics_are_the_same_in_every_backend() -> None:
    draw = torch.Generator().manual_seed(2)
    pieces = [torch.randn(40, len(Statistics._fields), generator=draw).double() for _ in range(3)]
    pieces[1][0:9] = pieces[0][0:9]  # the first of several tops
    pieces[2][1, :] = NAN
    top = Statistics._fields.index("student_max")
    for row, value in ((2, INF), (3, -INF), (4, NAN)):
        pieces[1][row, top : top + 2] = value
    for piece in pieces:
        piece[5, : Statistics._fields.index("teacher_sum")] = -INF
    want, got = merge(pieces), cpu.merge(pieces)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13, equal_nan=True)


def test_tables_agree_with_the_header() -> None:
    """Names and order of what Python and C++ read as columns and structs."""
    header = (Path(cpu.__file__).parent / "kernel.h").read_text()

    def fields(struct: str) -> list[str]:
        body = re.search(rf"struct {struct} {{(.*?)}};", header, re.DOTALL)
        assert body is not None
        declared = re.findall(r"double ([^;]*);", re.sub(r"//.*", "", body[1]))
        return [name.strip() for line in declared for name in line.split(",")]

    assert fields("Metrics") == list(METRICS)
    assert fields("Statistics") == list(Statistics._fields)
    assert fields("Numbers") == [*cpu.Numbers._fields, "parameters[kParameters]"]


@pytest.mark.parametrize("name", divergences.names())
def test_no_worse_than_eager_fp32(name: str) -> None:
    """Root mean square error against fp64, ours at most eager's."""
    draw = torch.Generator().manual_seed(1)
    s, t = (torch.randn(1, 24, V, generator=draw) * 3 for _ in range(2))
    labels = torch.randint(0, V, (24,), generator=draw)
    spec = LossSpec(divergences.make(name), V, 2.0, 2.0, ce_weight=0.5)
    call = RowCall(s, t, labels, torch.ones(24), spec, torch.empty_like(s), False)
    assert call.grad is not None
    got, (want, gradient) = in_pieces(cpu, call, SPLITS[2]), truth(call)
    raw = s.clone().requires_grad_()
    kd = spec.divergence.value((t[0] / 2).log_softmax(-1), (raw[0] / 2).log_softmax(-1)).sum(-1)
    eager = spec.kd_scale * kd + 0.5 * F.cross_entropy(raw[0], labels, reduction="none")
    (usual,) = torch.autograd.grad(eager.sum(), raw)
    slack = 1.3 if cpu.instruction_set() == "base" else 1.0  # no fused multiply-add
    for ours, theirs, right in ((got.loss, eager, want.loss), (call.grad, usual, gradient)):
        error, budget = ((x.detach().double() - right).norm() for x in (ours, theirs))
        assert error <= slack * budget
