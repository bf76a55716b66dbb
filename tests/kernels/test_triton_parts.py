"""Rows of which only some columns lie here, by the Triton kernels: a row in parts is the whole row.

They run where triton does: on a GPU, or in its interpreter in the child process that
loss/test_interpreter.py starts. What every backend must do is test_pieces.py."""

from __future__ import annotations

import in_pieces
import pytest
import torch
from in_pieces import DTYPES, NAN, V, check, make, statistics
from own_divergences import OWN
from own_rules import of_everything

from fusedkd import backends, divergences
from fusedkd.distributions.sparse import TAILS
from fusedkd.kernels import RowCall, pieces
from fusedkd.kernels import triton as backend
from fusedkd.spec import LossSpec, Transform

if reason := backends.load("triton").unavailable():
    pytest.skip(f"triton: {reason}", allow_module_level=True)
from fusedkd.kernels.triton import device, part_ops
from fusedkd.kernels.triton.launches import Launch

if not device.INTERPRETED:
    pytest.skip("tensors on a GPU are test_triton_gpu.py's", allow_module_level=True)
BENT = Transform(0.7, 20.0)
FAST = {("forward_kl", torch.bfloat16), ("jsd", torch.float32), ("alpha", torch.float16)}
FEW = [3, 4, 5]  # a masked part, one that does not count, p far from q


def few(call: RowCall, rows: list[int] = FEW) -> RowCall:
    assert call.grad is not None
    some = call.of(torch.tensor(rows), None)  # type: ignore[arg-type]
    return some._replace(grad=torch.full_like(some.student, NAN))


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in FAST else pytest.mark.slow)
        for name in divergences.names()
        for dtype in DTYPES
    ],
)
def test_parts_are_the_row(name: str, dtype: torch.dtype) -> None:
    check(backend, few(make(dtype, name)), (2048, 0, V - 2048))


@pytest.mark.parametrize(
    "tail, name, dtype",
    [
        ("bucket", "jsd", torch.bfloat16),
        ("drop", "alpha_beta", torch.float32),  # of which what is no id has its own say
        ("renormalize", "forward_kl", torch.float16),
        ("generalized", "reverse_kl", torch.float32),
        ("conditional", "mixed_kl", torch.float32),
    ],
)
def test_parts_against_entries(tail: str, name: str, dtype: torch.dtype) -> None:
    """A masked part, a row that does not count, one with fewer ids."""
    sizes = (2048, 0, V - 2048) if tail == "bucket" else (2048, V - 2048)
    check(backend, few(make(dtype, name, tail), [3, 4, 8]), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", divergences.names())
def test_any_parts_against_entries(name: str) -> None:
    infinite = ("renormalize", "drop") if name in ("reverse_kl", "mixed_kl") else ()
    for i, tail in enumerate(TAILS):
        if tail not in infinite:
            check(backend, make(DTYPES[i % 4], name, tail), in_pieces.SPLITS[1 + i % 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", divergences.names())
def test_any_parts(name: str) -> None:
    for sizes, dtype in zip(in_pieces.SPLITS, DTYPES, strict=True):
        check(backend, make(dtype, name), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed_kl", "jsd"])
def test_options(name: str) -> None:
    """Softcap and scale, every class of temperatures, cross-entropy or divergence alone, no
    labels, smoothing."""
    sizes = (1, V - 1)
    for fields in (
        {"student_transform": BENT, "teacher_transform": BENT},
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"kd_weight": 0.0},
    ):
        check(backend, few(make(torch.float32, name, **fields), [1, 3, 4, 7]), sizes)  # type: ignore[arg-type]
    call = few(make(torch.float32, name))
    check(backend, call._replace(labels=None, spec=LossSpec(call.spec.divergence, V)), sizes)
    call = few(make(torch.float32, name, label_smoothing=0.2), [0, 4, 6, 7])  # none with masks
    check(backend, call, sizes)


@pytest.mark.parametrize(
    "name", ["mixed_kl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("jsd", "alpha"))]
)
def test_of_ones_own(name: str) -> None:
    """By the built-in kernel, with weights, or entry by entry."""
    call = few(make(torch.float32, name), [3, 4])
    spec = call.spec._replace(divergence=OWN[name](0.3))
    check(backend, call._replace(spec=spec), (2048, V - 2048))


@pytest.mark.parametrize("tail", ["", "bucket"])
def test_a_row_rule(tail: str) -> None:
    call = make(torch.float32, "reverse_kl", tail, row_rule=of_everything(slope=0.3))
    check(backend, few(call, [3, 4]), (2048, V - 2048))


@pytest.mark.parametrize("tail", ["", "bucket"])
def test_z_loss(tail: str) -> None:
    """Beside a cross-entropy, and without labels."""
    call = few(make(torch.float32, "jsd", tail, 1.3, z_loss_weight=0.2), [4, 5, 8])
    check(backend, call, (2048, V - 2048))
    spec = call.spec._replace(ce_weight=0.0, temperature=2.0)
    check(backend, call._replace(labels=None, spec=spec), (2048, V - 2048))


@pytest.mark.parametrize("name, tail", [("mixed_kl", ""), ("alpha_beta", "drop")])
def test_programs_share_a_part(monkeypatch: pytest.MonkeyPatch, name: str, tail: str) -> None:
    """Few rows: what they leave is merged as the ranks' is, and the label is one program's."""
    shared = Launch(pieces=2, warps=4, unroll=1)
    monkeypatch.setattr(part_ops.config, "choose", lambda *sizes: shared)
    call = few(make(torch.bfloat16, name, tail), [7 if tail else 3])
    if tail:
        call.student[..., 4136] = 60.0  # the second program has the top, and that is an id
    check(backend, call, (V,))


@pytest.mark.parametrize("count", [1, 3])
def test_merged_statistics_are_those_of_every_backend(count: int) -> None:
    found = statistics()[:count]
    merged, want = backend.merge(found), pieces.merge(found)
    torch.testing.assert_close(merged, want, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("tail", ["", "bucket"])
def test_the_gradient_may_go_over_the_logits(tail: str) -> None:
    call = few(make(torch.float32, "jsd", tail), [3])
    found = []
    for in_place in (False, True):
        student = call.student.clone()
        grad = student if in_place else torch.empty_like(student)
        part = part_ops.RowCall(*call)._replace(student=student, grad=grad)
        part = part.of(slice(0, 1), in_pieces.Part(0, V))
        merged = backend.observe(part)
        backend.finish(part, merged, backend.compare(part, merged))
        found.append(part.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)
