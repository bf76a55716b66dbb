"""Teachers of K entries: edges, errors and laws. The random calls are in test_kd_loss.py."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, divergences, kd_loss, kd_loss_and_metrics
from fusedkd.distributions.sparse import PADDING, canonical
from fusedkd.spec import LossSpec

INF = math.inf
NAMES = divergences.names()
TAILS = ("bucket", "renormalize", "drop", "generalized", "conditional")
SPARED = ("bucket", "generalized", "conditional")  # no divergence is infinite where no id is
FINITE = [n for n in NAMES if n not in ("reverse_kl", "mixed_kl")]  # where p = 0 < q
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _on_the_backends_device(request: pytest.FixtureRequest):
    if "backend" not in request.fixturenames:
        yield
        return
    with torch.device(request.getfixturevalue("device")):
        yield


def top(n=4, v=37, k=5, tail="bucket", seed=0, spread=3.0, dtype=torch.float32, noise=1.0):
    """Student logits, the teacher's logits, its top k, labels."""
    generator = torch.Generator("cpu").manual_seed(seed)
    options = {"generator": generator, "device": "cpu"}
    device = torch.get_default_device()
    teacher = torch.randn(n, v, **options) * spread
    student = (teacher + noise * torch.randn(n, v, **options)).to(device, dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), **options).to(device)
    values, ids = teacher.log_softmax(-1).topk(k)
    return (
        student,
        teacher.to(device),
        SparseTeacher(ids.to(device), values.to(device), tail),
        labels,
    )


def both(student: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    loss = kd_loss(student, *args, **kwargs)
    return loss.detach(), *torch.autograd.grad(loss.sum(), student)


# ----------------------------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_all_entries_are_the_dense_teacher(backend, name, tail):
    if tail not in SPARED and name not in FINITE:
        pytest.skip("refused, see test_infinite_divergences_are_refused")
    student, teacher, sparse, labels = top(k=37, tail=tail)
    options = {"divergence": name, "ce_weight": 0.5, "label_smoothing": 0.1, "backend": backend}
    torch.testing.assert_close(
        both(student, sparse, labels, **options),
        both(student, teacher, labels, **options),
        rtol=2e-5,
        atol=2e-6,
    )
    found = kd_loss_and_metrics(student, sparse, labels, **options)[1]
    dense = kd_loss_and_metrics(student, teacher, labels, **options)[1]
    torch.testing.assert_close(found[:8], dense[:8], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found[8:], (found.kd.new_ones(()),) * 2)
    assert dense[8:] == (None, None)


@pytest.mark.parametrize("name", NAMES)
def test_bucket_approaches_the_dense_teacher(backend, name):
    student, teacher, _, _ = top(n=3, v=64, spread=2.0)
    exact = both(student, teacher, divergence=name, backend=backend)[1]
    lp, errors = teacher.log_softmax(-1), []
    for k in (2, 16, 60):
        values, ids = lp.topk(k)
        found = both(student, SparseTeacher(ids, values), divergence=name, backend=backend)[1]
        errors.append((found - exact).norm() / exact.norm())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


def test_drop_is_a_weighted_cross_entropy(backend):
    student, _, sparse, _ = top(tail="drop")
    exact = student.detach().double().requires_grad_()
    lq = exact.log_softmax(-1).gather(-1, sparse.indices)
    want = -(sparse.log_probs.double().exp() * lq).sum(-1).mean()
    (grad,) = torch.autograd.grad(want, exact)
    loss, got = both(student, sparse, backend=backend)
    entropy = kd_loss_and_metrics(student, sparse, backend=backend)[1].teacher_entropy
    torch.testing.assert_close(loss + entropy, want.float().detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, grad.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
def test_order_and_padding_do_not_matter(backend, tail):
    student, _, sparse, labels = top(tail=tail)
    order = torch.tensor([3, 0, 5, 2, 6, 4, 1])
    nothing = torch.full((4, 2), math.nan)
    ids = torch.cat([sparse.indices, torch.full((4, 2), -1)], -1)[:, order].int()
    padded = SparseTeacher(ids, torch.cat([sparse.log_probs, nothing], -1)[:, order], tail)
    options = {"divergence": "jsd", "ce_weight": 0.5, "backend": backend}
    want = both(student, sparse, labels, **options)
    got = both(student, padded, labels, **options)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("k", [1, 7, 128, 300])
def test_blocks_of_entries(backend, k):
    """Around what a kernel takes at once; the last id is the vocabulary's last."""
    student, teacher, _, labels = top(n=2, v=1031, k=k, spread=1.0)
    lp = teacher.log_softmax(-1)
    ids = torch.arange(1031).flip(0)[:k].expand(2, k)
    sparse = SparseTeacher(ids, lp.gather(-1, ids))
    exact = student.detach().double().requires_grad_()
    want = both(exact, SparseTeacher(ids, sparse.log_probs), labels, ce_weight=0.5,
                backend="reference")  # fmt: skip
    got = both(student, sparse, labels, ce_weight=0.5, backend=backend)
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("v", [50257, 70001])
def test_long_rows(backend, v):
    """Rows of many tiles, and in Triton of several programs; ids at both ends of each."""
    if backend == "triton" and INTERPRETED and v > 60000:
        pytest.skip("slow in the interpreter")
    student, teacher, _, labels = top(n=3, v=v, spread=2.0, dtype=torch.bfloat16)
    ids = torch.cat([torch.arange(0, v, 2048), torch.arange(2047, v, 2048), torch.tensor([v - 1])])
    ids = torch.unique(ids).expand(3, -1)
    sparse = SparseTeacher(ids, teacher.log_softmax(-1).gather(-1, ids))
    labels[0] = ids[0, 3]
    for tail, name in (("bucket", "forward_kl"), ("drop", "jsd"), ("generalized", "reverse_kl"),
                       ("conditional", "forward_kl")):  # fmt: skip
        sparse = SparseTeacher(ids, sparse.log_probs, tail)
        options = {"divergence": name, "temperature": 2.0, "ce_weight": 0.5}
        want = both(student, sparse, labels, backend="reference", **options)
        got = both(student, sparse, labels, backend=backend, **options)
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(got[1], want[1], rtol=1e-2, atol=1e-8)
        inplace = both(student * 1, sparse, labels, backend=backend, **options)
        assert torch.equal(inplace[1], got[1])


# ----------------------------------------------------------------------------------------------
# the tail


@pytest.mark.parametrize("gap", [20.0, 90.0, 400.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_small_tail_keeps_its_digits(backend, name, gap):
    """The student's mass outside the ids is e^-gap: as total minus ids nothing would be left."""
    student, _, sparse, _ = top(n=3, v=3001, k=8, spread=1.0)
    logits = student.detach() - gap
    logits.scatter_add_(1, sparse.indices, torch.full((3, 8), gap))
    sparse = SparseTeacher(sparse.indices, (sparse.log_probs.exp() * 2).log())
    exact = logits.double().requires_grad_()
    want = both(exact, sparse, divergence=name, backend="reference")
    got = both(logits.requires_grad_(), sparse, divergence=name, backend=backend)
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=1e-6, atol=1e-6)
    # An id's gradient is a difference of terms near 1, the tail's is none.
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-5, atol=1e-7)
    error = (got[1].double() - want[1]).scatter(1, sparse.indices, 0.0).abs()
    assert (error <= 2e-5 * want[1].abs() + 1e-37).all()


@pytest.mark.parametrize("excess", [0.0, 1e-7, 4e-4])
@pytest.mark.parametrize("name", NAMES)
def test_no_mass_left_for_the_tail(backend, name, excess):
    """Entries that sum to 1, or to more in a rounding: finite, and near the limit."""
    student, _, sparse, _ = top()
    lp = sparse.log_probs.log_softmax(-1) + excess
    loss, grad = both(student, SparseTeacher(sparse.indices, lp), divergence=name, backend=backend)
    assert loss.isfinite() and grad.isfinite().all()
    near = SparseTeacher(sparse.indices, lp - 1e-3 - excess)
    near_loss, near_grad = both(student, near, divergence=name, backend=backend)
    if name in FINITE and name != "alpha_beta":  # p^0.2 is far from its limit at any p
        torch.testing.assert_close(loss, near_loss, rtol=0.05, atol=0.02)
        torch.testing.assert_close(grad, near_grad, rtol=0.05, atol=0.02)


def test_one_hot_teacher(backend):
    student, _, _sparse, labels = top(k=1)
    one = SparseTeacher(labels[:, None], torch.zeros(4, 1))
    ce = torch.nn.functional.cross_entropy(student, labels)
    loss, grad = both(student, one, backend=backend)
    torch.testing.assert_close(loss, ce.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(ce, student)[0], rtol=1e-5, atol=1e-6)
    options = {"divergence": "reverse_kl", "reduction": "none", "backend": backend}
    loss, grad = both(student, one, **options)  # the teacher really has nothing there
    assert (loss == INF).all() and grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_student_masked_outside_the_ids(backend, name):
    student, _, sparse, _ = top()
    masked = torch.full_like(student, -INF).scatter(
        1, sparse.indices, student.detach().gather(1, sparse.indices)
    )
    masked.requires_grad_()
    whole = SparseTeacher(sparse.indices, sparse.log_probs.log_softmax(-1))
    loss, grad = both(masked, whole, divergence=name, backend=backend)
    small = both(
        student.detach().gather(1, sparse.indices).requires_grad_(),
        whole.log_probs,
        divergence=name,
        backend=backend,
    )
    torch.testing.assert_close(loss, small[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad.gather(1, sparse.indices), small[1], rtol=1e-5, atol=1e-6)
    assert (grad[masked.detach() == -INF] == 0).all()
    half = SparseTeacher(sparse.indices, whole.log_probs - 1.0)  # that the mathematics means
    loss, grad = both(masked, half, divergence=name, backend=backend)
    assert grad.isfinite().all() and (name != "forward_kl" or loss == INF)


@pytest.mark.parametrize("tail", TAILS)
def test_masked_student_entries(backend, tail):
    student, _, sparse, _ = top(tail=tail)
    lp = sparse.log_probs.clone()
    logits = student.detach().clone()
    logits[:, sparse.indices[0, 0]] = -INF
    lp[sparse.indices == sparse.indices[0, 0]] = -INF
    logits[:, 36] = logits[:, 0] = -INF
    lp[(sparse.indices == 36) | (sparse.indices == 0)] = -INF
    sparse = SparseTeacher(sparse.indices, lp, tail)
    loss, grad = both(logits.requires_grad_(), sparse, divergence="jsd", backend=backend)
    want = both(logits, sparse, divergence="jsd", backend="reference")
    torch.testing.assert_close((loss, grad), want, rtol=1e-5, atol=1e-7)
    assert loss.isfinite() and (grad[logits == -INF] == 0).all()


def test_infinite_where_an_id_is_masked(backend):
    student, _, sparse, _ = top()
    logits = student.detach().clone()
    logits[0, sparse.indices[0, 1]] = -INF
    options = {"reduction": "none", "backend": backend}
    loss, grad = both(logits.requires_grad_(), sparse, **options)
    assert loss[0] == INF and loss[1:].isfinite().all() and grad.isfinite().all()


# ----------------------------------------------------------------------------------------------
# measures on the ids, and what is given that it is one of them


def support(seed: int, noise: float, dtype: torch.dtype = torch.float32):
    """Random ids, not the teacher's top, and a student that is near by as much as ``noise``."""
    make = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()
    t = torch.randn(8, 41, generator=make, device="cpu", dtype=torch.float64) * 3
    s = t + noise * torch.randn(8, 41, generator=make, device="cpu", dtype=torch.float64)
    ids = torch.rand(8, 41, generator=make, device="cpu").argsort(-1)[:, : 1 + seed % 12]
    ids[1::3, 1:] = -1
    lp = t.log_softmax(-1).gather(-1, ids.clamp(min=0))
    return s.to(device, dtype).requires_grad_(), ids.to(device), lp.to(device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", ["generalized", "conditional"])
def test_a_support_is_never_negative(backend, name, tail):
    """And 0 where q = p; however near they are, where a sum of terms +-p would round below."""
    for seed in range(1 if INTERPRETED else 25):
        for noise in (0.0, 0.1) if INTERPRETED else (0.0, 1e-9, 1e-4, 0.1, 3.0):
            for dtype in (torch.float32, torch.float64):
                s, ids, lp = support(seed, noise, dtype)
                loss, grad = both(s, SparseTeacher(ids, lp, tail), divergence=name,
                                  reduction="none", backend=backend)  # fmt: skip
                assert loss.min() >= (0 if tail == "generalized" else -1e-12), (seed, noise)
                if noise <= 1e-9:
                    tiny = 1e-14 if dtype == torch.float64 else 1e-6
                    tiny = 1e-7 if name == "total_variation" and noise else tiny
                    assert loss.max() < max(tiny, noise**2)
                    if name != "total_variation":
                        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_measures_have_their_minimum_at_the_teacher(name):
    """Along any direction in q on the ids; a divergence that takes more than the ids has it
    elsewhere, and plain reverse KL on them even below 0."""
    for seed in range(10):
        s, ids, lp = support(seed, 0.0, torch.float64)
        make = torch.Generator("cpu").manual_seed(seed)
        way = torch.randn(s.shape, generator=make, dtype=torch.float64)
        at = [
            kd_loss(s + step * way, SparseTeacher(ids, lp, "generalized"), divergence=name,
                    reduction="none")
            for step in (-0.3, -0.1, 0.0, 0.1, 0.3)
        ]  # fmt: skip
        assert (at[0] >= at[1]).all() and (at[1] >= at[2]).all()
        assert (at[2] <= at[3]).all() and (at[3] <= at[4]).all() and at[2].max() < 1e-15


def test_generalized_by_hand(backend):
    student, _, sparse, _ = top(tail="generalized")
    exact = student.detach().double().requires_grad_()
    lp, lq = sparse.log_probs.double(), exact.log_softmax(-1).gather(-1, sparse.indices)
    p, q = lp.exp(), lq.exp()
    for name, want in (
        ("forward_kl", p * (lp - lq) - p + q),
        ("reverse_kl", q * (lq - lp) - q + p),
        ("total_variation", (p - q).abs() / 2),
    ):
        loss, grad = both(student, sparse, divergence=name, backend=backend)
        (slope,) = torch.autograd.grad(want.sum(-1).mean(), exact, retain_graph=True)
        torch.testing.assert_close(loss.double(), want.sum(-1).mean().detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_conditional_is_the_dense_loss_of_the_ids(backend, name):
    """No gradient outside, and none for how much the ids have together."""
    student, _, sparse, labels = top(tail="conditional", noise=2.0)
    options = {"divergence": name, "temperature": 1.7, "backend": backend}
    loss, grad = both(student, sparse, **options)
    few = student.detach().gather(1, sparse.indices).requires_grad_()
    dense = both(few, sparse.log_probs, teacher_temperature=1.0, **options)
    torch.testing.assert_close(loss, dense[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.gather(1, sparse.indices), dense[1], rtol=1e-4, atol=1e-6)
    assert (grad.scatter(1, sparse.indices, 0.0) == 0).all()
    ce = both(student, sparse, labels, ce_weight=0.5, **options)[1]
    hard = both(student, None, labels, kd_weight=0.0, ce_weight=0.5, backend=backend)[1]
    torch.testing.assert_close(ce - grad, hard, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gap", [30.0, 90.0, 400.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_ids_that_the_student_hardly_has(backend, name, gap):
    """e^-gap of its mass: of all minus what is outside nothing would be left."""
    student, _, sparse, _ = top(n=3, v=3001, k=8, spread=1.0, tail="conditional")
    logits = student.detach().scatter_add(1, sparse.indices, torch.full((3, 8), -gap))
    loss, grad = both(logits.requires_grad_(), sparse, divergence=name, backend=backend)
    exact = logits.detach().double().requires_grad_()
    want = both(exact, sparse, divergence=name, backend="reference")
    torch.testing.assert_close(loss.double(), want[0].double(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), want[1], rtol=2e-5, atol=1e-7)
    mass = kd_loss_and_metrics(logits, sparse, backend=backend)[1].student_mass
    share = exact.softmax(-1).gather(1, sparse.indices).sum(-1).mean()
    torch.testing.assert_close(mass.double(), share, rtol=1e-4, atol=1e-38)


def test_all_ids_masked(backend):
    """The student has no distribution given those, but a measure of 0."""
    student, _, sparse, _ = top()
    logits = student.detach().scatter(1, sparse.indices[:1].expand(4, 5), -INF).requires_grad_()
    ids = sparse.indices[:1].expand(4, 5)
    loss, grad = both(logits, SparseTeacher(ids, sparse.log_probs, "conditional"), backend=backend)
    assert loss.isnan() and (grad == 0).all()
    measures = SparseTeacher(ids, sparse.log_probs, "generalized")
    loss, grad = both(logits, measures, divergence="total_variation", backend=backend)
    torch.testing.assert_close(loss, sparse.log_probs.exp().sum(-1).mean() / 2)
    assert (grad == 0).all()


def test_masses(backend):
    """Means over the tokens that count, of what is on the ids, whatever the tail makes of it."""
    student, _, sparse, labels = top(k=6)
    ids = sparse.indices.clone()
    ids[0, 3:], labels[1] = -1, -100
    q = torch.where(ids < 0, 0.0, (student / 2).softmax(-1).gather(1, ids.clamp(min=0))).sum(-1)
    p = torch.where(ids < 0, 0.0, sparse.log_probs.exp()).sum(-1)
    kept = torch.tensor([0, 2, 3])
    for tail in TAILS:
        teacher = SparseTeacher(ids, sparse.log_probs, tail)
        found = kd_loss_and_metrics(student, teacher, labels, temperature=2.0, backend=backend)[1]
        torch.testing.assert_close(found.student_mass, q[kept].mean().detach())
        torch.testing.assert_close(found.teacher_mass, p[kept].mean())
    assert (
        kd_loss_and_metrics(student, None, labels, kd_weight=0, ce_weight=1)[1][8:] == (None,) * 2
    )


def test_a_divergence_of_ones_own_between_measures():
    """The term that makes it one is found, or it is refused."""
    student, _, sparse, _ = top(tail="generalized")
    options = {"backend": "reference"}

    def own(value):
        return divergences.Divergence("own", (float(id(value)),), value=value)

    mine = own(lambda lp, lq: 2 * lp.exp() * (lp - lq))
    twice = 2 * kd_loss(student, sparse, divergence="forward_kl", **options)
    torch.testing.assert_close(kd_loss(student, sparse, divergence=mine, **options), twice)
    squared = own(lambda lp, lq: (lp.exp() - lq.exp()).square())
    assert kd_loss(student, sparse, divergence=squared, **options) > 0
    for value in (lambda lp, lq: -lp.exp() * lq, lambda lp, lq: (lp.exp() - lq.exp()).tanh()):
        with pytest.raises(ValueError, match=r"'own' is none between measures.*'bucket'"):
            kd_loss(student, sparse, divergence=own(value), **options)


# ----------------------------------------------------------------------------------------------
# rows without entries, NaN, keywords


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("tail", ["bucket", "drop", "generalized"])
def test_rows_without_entries(backend, tail, k):
    student, _, _, labels = top()
    nothing = SparseTeacher(torch.full((4, k), -1), torch.full((4, k), math.nan), tail)
    loss, metrics = kd_loss_and_metrics(student, nothing, labels, backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6
    assert metrics.teacher_entropy == metrics.top1_agreement == metrics.teacher_accuracy == 0
    assert metrics.student_mass == metrics.teacher_mass == 0
    want = kd_loss_and_metrics(student, student.detach(), labels, backend=backend)[1]
    torch.testing.assert_close(metrics.student_entropy, want.student_entropy)
    assert metrics.student_accuracy == want.student_accuracy


@pytest.mark.parametrize("where", ["log_probs", "id", "outside"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_nan_is_hidden_only_where_it_does_not_count(backend, name, where):
    for tail in ("bucket", "drop", "generalized", "conditional"):
        student, _, sparse, labels = top(tail=tail)
        ids, lp, logits = sparse.indices, sparse.log_probs.clone(), student.detach().clone()
        if where == "log_probs":
            lp[0, 1] = math.nan
        elif where == "id":
            logits[0, ids[0, 1]] = math.nan
        else:
            logits[0, next(i for i in range(37) if i not in ids[0].tolist())] = math.nan
        labels[0] = -100
        options = {"divergence": name, "ce_weight": 0.5, "backend": backend}
        args = logits.requires_grad_(), SparseTeacher(ids, lp, tail)
        loss, grad = both(*args, labels, **options)
        clean, want = both(student, sparse, labels, **options)
        assert torch.equal(loss, clean) and torch.equal(grad, want)
        loss, grad = both(*args, divergence=name, backend=backend)
        assert loss.isnan() and grad[0].isnan().any() and grad[1:].isfinite().all()


@pytest.mark.parametrize("tail", ["renormalize", "generalized", "conditional"])
def test_what_does_not_count_is_not_looked_at(backend, tail):
    student, _, sparse, labels = top(tail=tail)
    ids, lp = sparse.indices.clone(), sparse.log_probs.clone()
    ids[0], lp[1], ids[2] = 99, 5.0, -1
    options = {"token_weights": torch.tensor([0.0, 0.0, 0.0, 1.0]), "backend": backend}
    loss, grad = both(student, SparseTeacher(ids, lp, tail), labels, **options)
    want, d = both(student, sparse, labels, **options)
    assert torch.equal(loss, want) and torch.equal(grad, d)


def test_second_backward_and_inplace(backend):
    student, _, sparse, labels = top()
    (want,) = torch.autograd.grad(kd_loss(student, sparse, labels, ce_weight=0.5, backend=backend),
                                  student)  # fmt: skip
    for inplace in (False, True):
        options = {"ce_weight": 0.5, "inplace": inplace, "backend": backend}
        loss = kd_loss(student * 1, sparse, labels, **options)
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        (again,) = torch.autograd.grad(loss, student)
        assert torch.equal(first, want) and torch.equal(again, want)
    loss = kd_loss(student, sparse, backend=backend)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "close"),
    [
        # the last bits of a row may depend on where it lies, and gradients of 300 are added up
        (torch.float32, {"rtol": 1e-4, "atol": 1e-5}),
        (torch.float64, {"rtol": 1e-10, "atol": 1e-11}),
    ],
)
def test_heads_in_chunks(backend, dtype, close):
    _, _, sparse, labels = top(n=50, v=53)
    options = {"device": "cpu", "generator": torch.Generator("cpu").manual_seed(1), "dtype": dtype}
    device = torch.get_default_device()
    hidden, weight = (torch.randn(n, 8, **options).to(device).requires_grad_() for n in (50, 53))
    results = []
    for form in (
        lambda **k: kd_loss(hidden @ weight.T, sparse, labels, **k),
        lambda **k: kd_loss(LMHead(hidden, weight), sparse, labels, **k),
        lambda **k: kd_loss(LMHead(hidden, weight), sparse, labels, chunk_bytes=2000, **k),
    ):
        loss = form(ce_weight=0.5, reduction="none", backend=backend)
        results.append((loss, *torch.autograd.grad(loss.square().sum(), (hidden, weight))))
    torch.testing.assert_close(results[1], results[0], **close)
    torch.testing.assert_close(results[2], results[1], **close)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace Triton's interpreter")
def test_compiles_whole(backend):
    student, _, sparse, labels = top()

    def losses(student, ids, lp, labels):
        teacher = SparseTeacher(ids, lp, "drop")
        loss, metrics = kd_loss_and_metrics(
            student, teacher, labels, divergence="jsd", ce_weight=0.5, backend=backend
        )
        return loss + 0 * metrics.kd

    arguments = student, sparse.indices, sparse.log_probs, labels
    want = torch.autograd.grad(losses(*arguments), student)
    got = torch.autograd.grad(torch.compile(losses, fullgraph=True)(*arguments), student)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(backend, name, tail):
    if backend == "triton":
        pytest.skip("thousands of calls are too slow in the interpreter")
    if tail not in SPARED and name not in FINITE:
        pytest.skip("refused, see test_infinite_divergences_are_refused")
    student, _, sparse, labels = top(n=2, v=6, k=2, tail=tail, dtype=torch.float64, spread=1.0)
    torch.autograd.gradcheck(
        lambda s: kd_loss(
            *(s, sparse, labels),
            divergence=name,
            temperature=1.7,
            ce_weight=0.5,
            label_smoothing=0.1,
            backend=backend,
        ),
        student,
    )


def test_autocast_keeps_dense_logits_and_casts_heads():
    _, _, sparse, _ = top()
    hidden, weight = torch.randn(4, 8), torch.randn(37, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = kd_loss(LMHead(hidden, weight), sparse)
    exact = kd_loss(LMHead(hidden, weight), sparse)
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)


# ----------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("tail", ["renormalize", "drop"])
@pytest.mark.parametrize("name", NAMES)
def test_infinite_divergences_are_refused(name, tail):
    student, _, sparse, _ = top(tail=tail)
    if name in FINITE:
        assert kd_loss(student, sparse, divergence=name).isfinite()
        return
    with pytest.raises(ValueError, match=rf"{name}.*tail='{tail}'.*tail='bucket'.*forward_kl"):
        kd_loss(student, sparse, divergence=name)


@pytest.mark.parametrize("parameters", [(-0.5,), (2.0,)])
def test_parameters_decide_what_is_refused(parameters):
    student, _, sparse, _ = top(tail="drop")
    divergence = divergences.alpha(*parameters)
    if parameters[0] > 0:
        assert kd_loss(student, sparse, divergence=divergence).isfinite()
    else:
        with pytest.raises(ValueError, match=r"alpha.*infinite"):
            kd_loss(student, sparse, divergence=divergence)


def wrong(**changes: object):
    def call() -> None:
        student, _, sparse, labels = top()
        fields = {"indices": sparse.indices, "log_probs": sparse.log_probs, **changes}
        kd_loss(student, SparseTeacher(**fields), labels)  # type: ignore[arg-type]

    return call


IDS, LP = (lambda s: (s.indices, s.log_probs))(top()[2])
TWICE = IDS.clone()
TWICE[2, 3] = TWICE[2, 0]
WRONG = [
    (wrong(indices=IDS + 30), ValueError, r"teacher\.indices holds \d+: expected 0 to 36"),
    (wrong(indices=-IDS - 2), ValueError, r"teacher\.indices holds -\d+: expected 0 to 36.*-1"),
    (wrong(indices=IDS + (1 << 40)), ValueError, r"teacher\.indices holds 1099\d+: expected"),
    (wrong(indices=TWICE), ValueError, rf"holds {int(TWICE[2, 0])} twice in one token.*logaddexp"),
    (wrong(log_probs=LP + 1), ValueError, r"sum to 2\..*at most 1.*log_softmax"),
    (wrong(log_probs=LP.abs()), ValueError, r"sum to .*not logits"),
    (wrong(indices=IDS.float()), TypeError, r"teacher\.indices is torch\.float32.*indices\.long"),
    (wrong(indices=IDS.tolist()), TypeError, r"teacher\.indices is a list"),
    (wrong(log_probs=LP.long()), TypeError, r"teacher\.log_probs is torch\.int64.*float"),
    (
        wrong(log_probs=LP[:, :3]),
        ValueError,
        r"indices has shape \(4, 5\).*\(4, 3\).*\(\.\.\., K\)",
    ),
    (wrong(indices=IDS[:3], log_probs=LP[:3]), ValueError, r"student .*\(4,\), teacher \(3,\)"),
    (wrong(log_probs=LP.clone().requires_grad_()), ValueError, r"log_probs require grad.*detach"),
    (wrong(tail="rest"), ValueError, r"teacher\.tail='rest'.*'bucket', 'renormalize', 'drop'"),
    (wrong(indices=IDS * 0 - 1, tail="renormalize"), ValueError, r"token 0.*'renormalize'"),
    (wrong(log_probs=LP - INF, tail="renormalize"), ValueError, r"token 0.*token_weights 0"),
    (wrong(indices=IDS * 0 - 1, tail="conditional"), ValueError, r"token 0.*'conditional'.*'gener"),
    (wrong(indices=TWICE, tail="generalized"), ValueError, r"twice in one token"),
    (wrong(log_probs=LP + 1, tail="conditional"), ValueError, r"sum to 2\."),
]


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_to_do(case):
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


def test_the_vocabulary_bounds_the_ids():
    student, _, sparse, _ = top()
    ids = torch.arange(5).expand(4, 5).clone()
    ids[1, 2] = 36
    with pytest.raises(ValueError, match=r"holds 36: expected 0 to 35"):
        kd_loss(student, SparseTeacher(ids, sparse.log_probs), vocab_size=36)
    loss = kd_loss(student, SparseTeacher(ids, sparse.log_probs), vocab_size=37)
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_excess(dtype):
    """Whole softmaxes in half precision sum to a little more or less than 1."""
    for seed in range(20):
        logits = torch.randn(8, 200, generator=torch.Generator().manual_seed(seed)) * 2
        lp, ids = logits.log_softmax(-1).to(dtype), torch.arange(200).expand(8, 200)
        assert kd_loss(logits, SparseTeacher(ids, lp)).isfinite()


def test_canonical_form():
    spec = LossSpec(divergences.forward_kl(), 10)
    ids = torch.tensor([[7, -1, 2], [4, 4, 99]])
    lp = torch.tensor([[0.25, math.nan, 0.5], [1.0, 1.0, 1.0]]).log()
    rows = canonical(ids, lp, torch.tensor([1.0, 0.0]), spec, "bucket")
    assert rows.indices.tolist() == [[2, 7, PADDING], [PADDING] * 3]
    assert rows.log_probs.dtype == torch.float64
    torch.testing.assert_close(rows.log_probs[0].exp().float(), torch.tensor([0.5, 0.25, 0, 0.25]))
    assert rows.indices.dtype == torch.int32 and rows.part(slice(1)).indices.shape == (1, 3)


def test_the_entropy_that_a_teacher_brings(backend: str, device: torch.device) -> None:
    """Is the metric, over the tokens that count; the loss knows nothing of it."""
    logits = torch.randn(2, 3, 11, device=device)
    log_probs, ids = logits.log_softmax(-1).topk(2)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]], device=device)
    entropy = torch.tensor([[1.0, math.nan, 2.0], [3.0, 4.0, math.inf]], device=device)
    plain, whole = (
        kd_loss_and_metrics(
            logits, SparseTeacher(ids, log_probs, "bucket", x), labels, backend=backend
        )
        for x in (None, entropy)
    )
    assert whole[0] == plain[0] and whole[1].teacher_entropy == 2.5
    assert whole[1]._replace(teacher_entropy=plain[1].teacher_entropy) == plain[1]
    with pytest.raises(ValueError, match=r"teacher.entropy has shape \(2, 3, 1\).*\(2, 3\)"):
        kd_loss(logits, SparseTeacher(ids, log_probs, "bucket", entropy[..., None]), labels)


def test_fp64_where_the_teacher_has_no_say(backend: str, device: torch.device) -> None:
    """Its dtype is still the loss's, and the precision with it."""
    student = torch.randn(3, 40).half().to(device).requires_grad_()
    ids, labels = torch.tensor([[1, 2]] * 3, device=device), torch.tensor([5, 6, 7], device=device)
    teacher = SparseTeacher(ids, torch.full((3, 2), -1.0, dtype=torch.float64, device=device))
    loss = kd_loss(student, teacher, labels, kd_weight=0.0, ce_weight=0.7, backend=backend)
    want = 0.7 * torch.nn.functional.cross_entropy(student.detach().double(), labels)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-13, atol=0)
