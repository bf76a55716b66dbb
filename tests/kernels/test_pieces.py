"""A row in pieces is the whole row: loss, metrics and gradient, whatever lies where."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from in_pieces import DTYPES, INF, SPLITS, N, V, bits, check, in_pieces, make, statistics, truth
from own_rules import of_everything
from torch.nn import functional as F

from fusedkd import divergences
from fusedkd.distributions.sparse import canonical
from fusedkd.kernels import METRICS, RowCall, Statistics, cpu, reference
from fusedkd.kernels.pieces import merge
from fusedkd.row_rules import STATISTICS
from fusedkd.spec import LossSpec, Transform

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


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("tail", ["", "bucket", "drop", "generalized", "conditional"])
def test_z_loss(module: ModuleType, tail: str) -> None:
    """Beside a cross-entropy, alone, and without labels."""
    bent = Transform(0.7, 20.0)
    for sizes, dtype, heat in zip(SPLITS, DTYPES, (1.0, 2.0, 1.3, 2.0), strict=True):
        for name in ("forward_kl", "jsd"):
            call = make(dtype, name, tail, heat, z_loss_weight=0.2, student_transform=bent)
            check(module, call, sizes)
            alone = call.spec._replace(kd_weight=0.0, ce_weight=0.0)
            check(module, call._replace(spec=alone), sizes)
            spec = call.spec._replace(ce_weight=0.0)
            check(module, call._replace(labels=None, spec=spec), sizes)


@pytest.mark.parametrize("tail", ["", "bucket", "drop", "generalized", "conditional"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_one_piece_has_the_rowsbits(name: str, tail: str) -> None:
    call = make(torch.bfloat16, name, tail, label_smoothing=0.1)
    assert call.grad is not None
    whole = call._replace(grad=torch.empty_like(call.grad))
    want, got = cpu.rows(whole), in_pieces(cpu, call, (V,))
    assert want.metrics is not None and got.metrics is not None
    kept = [
        i for i, name in enumerate(METRICS) if name not in ("kd", "student_entropy") or not tail
    ]
    assert torch.equal(bits(call.grad), bits(whole.grad)) if not tail else True
    torch.testing.assert_close(got.loss, want.loss, rtol=0 if not tail else 1e-6, atol=0)
    assert torch.equal(bits(got.metrics[:, kept]), bits(want.metrics[:, kept]))


def test_merged_statistics_are_the_same_in_every_backend() -> None:
    pieces = statistics()
    torch.testing.assert_close(
        cpu.merge(pieces), merge(pieces), rtol=1e-13, atol=1e-13, equal_nan=True
    )


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
    own = "parameters[kParameters]"
    assert fields("Numbers") == [*cpu.Numbers._fields, f"rule_{own}", own]
    assert fields("RuleNumbers") == [*STATISTICS, own]


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
