"""ALM against fp64 and autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedkd.alignment import alm_loss, pad_spans


def spans(*ranges: tuple[int, int]) -> Tensor:
    return torch.tensor(ranges, dtype=torch.int64).view(-1, 2)


def truth(s: Tensor, t: Tensor, a: Tensor, b: Tensor, heat: float, form: str) -> Tensor:
    """(M,) in fp64 from the definition, one span after the other."""
    rows = []
    for (i, j), (c, d) in zip(a.tolist(), b.tolist(), strict=True):
        logs = t[c:d].sum() / heat, s[i:j].sum() / heat
        both = [torch.stack([x.exp(), -x.expm1()]) for x in logs]
        if form == "tv":
            rows.append((both[0] - both[1]).abs().sum() / 2)
        else:
            rows.append((both[0] * (both[0] / both[1]).log()).sum())
    return torch.stack(rows)


def case(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """12 and 9 tokens of which some are in no span, and spans of 1 to 6 tokens."""
    torch.manual_seed(seed)
    student, teacher = (-3 * torch.rand(n, dtype=torch.float64).pow(4) for n in (12, 9))
    a = spans((1, 2), (2, 5), (5, 11), (11, 12))
    b = spans((0, 3), (3, 4), (4, 8), (8, 9))
    return student.to(dtype), teacher.to(dtype), a, b


@pytest.mark.parametrize("form", ["kl", "tv"])
@pytest.mark.parametrize("heat", [1.0, 0.7, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_fp64(dtype: torch.dtype, heat: float, form: str) -> None:
    for seed in range(20):
        student, teacher, a, b = case(dtype, seed)
        upstream = torch.randn(4, dtype=torch.float64)
        exact = student.double().requires_grad_()
        rows = truth(exact, teacher.double(), a, b, heat, form)
        (grad,) = torch.autograd.grad(rows, exact, upstream)

        ours = student.clone().requires_grad_()
        found = alm_loss(
            ours, teacher, a, b, threshold_temperature=heat, form=form, reduction="none"
        )
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (own,) = torch.autograd.grad(found, ours, upstream.to(found.dtype))

        plain = student.float().requires_grad_()  # what eager fp32 loses
        eager = truth(plain, teacher.float(), a, b, heat, form)
        (lost,) = torch.autograd.grad(eager, plain, upstream.float())
        unit = 2.0**-52 * 256 if dtype == torch.float64 else 2.0**-23
        scale = unit / 2.0**-23
        budget = 3 * scale * (eager.double() - rows).abs().nan_to_num(0.0).max() + 4 * unit * (
            1 + rows.abs().max()
        )
        assert (found - rows).abs().max() <= budget
        size = grad.abs().max() + upstream.abs().max()
        budget = 3 * scale * (lost.double() - grad).abs().nan_to_num(0.0).max() + 4 * unit * size
        rounding = torch.finfo(dtype).eps / 2 * grad.abs() if dtype == torch.bfloat16 else 0.0
        assert ((own.double() - grad).abs() <= budget + rounding).all()
        assert own[0] == 0  # in no span


def test_gradcheck() -> None:
    student, teacher, a, b = case(torch.float64)
    for form in ("kl", "tv"):
        assert torch.autograd.gradcheck(
            lambda x, form=form: alm_loss(x, teacher, a, b, form=form), student.requires_grad_()
        )


def test_one_token_a_span_is_the_divergence_of_two_coins() -> None:
    p, q = torch.tensor([0.3, 0.9, 1e-6]), torch.tensor([0.6, 0.2, 1e-3])
    each = spans((0, 1), (1, 2), (2, 3))
    found = alm_loss(q.log(), p.log(), each, each, reduction="sum")
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found, kl.sum())
    torch.testing.assert_close(alm_loss(q.log(), p.log(), each, each), kl.mean())
    torch.testing.assert_close(
        alm_loss(q.log(), p.log(), each, each, normalizer=torch.tensor(8)), kl.sum() / 8
    )
    tv = alm_loss(q.log(), p.log(), each, each, form="tv", reduction="none")
    torch.testing.assert_close(tv, (p - q).abs())


INF = math.inf


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        (0.0, 0.0, 0.0),  # both certain
        (-INF, -INF, 0.0),  # both say it cannot be
        (-INF, -1.0, -math.log1p(-math.exp(-1))),
        (0.0, -1.0, 1.0),
        (-1.0, -INF, INF),
        (-200.0, -INF, 0.0),  # e^-200 is 0 in fp32
        (-1e-9, -1e-9, 0.0),
        (-80.0, -80.0, 0.0),
    ],
)
def test_edges_of_probability(p: float, q: float, expected: float) -> None:
    one = spans((0, 1))
    student = torch.tensor([q], requires_grad=True)
    loss = alm_loss(student, torch.tensor([p]), one, one)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_student_is_no_infinite_loss(dtype: torch.dtype) -> None:
    """Log-probabilities round to 0 all the time; the teacher's need not do so, too."""
    one = spans((0, 2))
    student = torch.zeros(2, dtype=dtype, requires_grad=True)
    loss = alm_loss(student, torch.tensor([-0.5, -0.2], dtype=dtype), one, one)
    loss.backward()
    assert 0 < loss < 40 and student.grad is not None and student.grad.isfinite().all()


def test_is_stable_near_one() -> None:
    """1 - q of a span whose probability is nearly 1, where 1 - exp(x) has no digits left."""
    one = spans((0, 1))
    p, q = -1e-6, -3e-6
    found = alm_loss(torch.tensor([q]), torch.tensor([p]), one, one).item()
    exact = alm_loss(
        torch.tensor([q], dtype=torch.float64), torch.tensor([p], dtype=torch.float64), one, one
    ).item()
    by_hand = math.exp(p) * (p - q) + -math.expm1(p) * math.log(math.expm1(p) / math.expm1(q))
    assert exact == pytest.approx(by_hand, rel=1e-9)
    assert found == pytest.approx(exact, rel=1e-3, abs=1e-12)


def test_a_batch_is_its_sequences() -> None:
    torch.manual_seed(0)
    student, teacher = -torch.rand(2, 12), -torch.rand(2, 9)
    _, _, a, b = case(torch.float32)
    first, second = (a, b), (a[:2], b[:2])
    batch = [pad_spans([x, y]) for x, y in zip(first, second, strict=True)]
    rows = alm_loss(student, teacher, *batch, reduction="none")
    assert rows.shape == (2, 4) and (rows[1, 2:] == 0).all()
    for i, pair in enumerate((first, second)):
        alone = alm_loss(student[i], teacher[i], *pair, reduction="none")
        assert torch.equal(rows[i, : len(alone)], alone)
    assert alm_loss(student, teacher, *batch) == rows.sum() / 6


def test_what_is_in_no_span_has_no_effect() -> None:
    student, teacher, a, b = case(torch.float32)
    a, b = a[:2], b[:2]
    hidden = student.clone()
    hidden[0] = hidden[5:] = math.nan
    other = teacher.clone()
    other[4:] = math.nan
    clean, dirty = (x.clone().requires_grad_() for x in (student, hidden))
    found = [alm_loss(x, t, a, b) for x, t in ((clean, teacher), (dirty, other))]
    assert torch.equal(*found)
    for loss in found:
        loss.backward()
    assert torch.equal(clean.grad, dirty.grad)  # type: ignore[arg-type]


def test_nan_in_a_span_is_not_hidden() -> None:
    student, teacher, a, b = case(torch.float32)
    student[3] = math.nan
    assert alm_loss(student, teacher, a, b).isnan()


@pytest.mark.parametrize("shape", [(5,), (2, 5), (0,), (2, 0)])
def test_without_spans(shape: tuple[int, ...]) -> None:
    student = torch.zeros(shape, requires_grad=True)
    none = torch.full((*shape[:-1], 3, 2), -1)
    for empty in (none, none[..., :0, :]):
        loss = alm_loss(student, torch.zeros(shape), empty, empty)
        loss.backward()
        assert loss == 0 and (student.grad == 0).all()


def test_spans_as_long_as_the_sequence_and_more_than_one_of_them() -> None:
    for length in (1, 2, 3, 7, 8, 9):
        x = -torch.rand(length, dtype=torch.float64)
        all_of_it = spans((0, length), (0, length))
        assert alm_loss(x, x, all_of_it, all_of_it, reduction="none").tolist() == [0.0, 0.0]
        half = alm_loss(x, x / 2, all_of_it, all_of_it, form="tv", reduction="none")
        expected = ((x.sum() / 2).exp() - x.sum().exp()).expand(2)
        torch.testing.assert_close(half, expected)


def test_nobody_waits_for_the_device() -> None:
    """Stand-ins have no numbers to wait for: reading one is an error."""
    with FakeTensorMode():
        student = torch.zeros(2, 12, requires_grad=True)
        ranges = torch.zeros(2, 4, 2, dtype=torch.int64)
        loss = alm_loss(student, torch.zeros(2, 9), ranges, ranges, normalizer=torch.tensor(3.0))
        loss.backward()


def test_twice_is_bitwise_the_same() -> None:
    student, teacher, a, b = case(torch.float32)
    one, two = (alm_loss(student, teacher, a, b) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": "js"}, "form='js': expected one of kl, tv"),
        ({"reduction": "batchmean"}, "reduction='batchmean'"),
        ({"threshold_temperature": 0.0}, "threshold_temperature=0.0"),
        ({"normalizer": 2.0, "reduction": "none"}, "normalizer was given with reduction='none'"),
        ({"student_spans": spans((0, 13))}, "0 <= first < last <= 12"),
        ({"student_spans": spans((3, 3))}, r"student_spans.*the first that is not is span \[0\]"),
        ({"teacher_spans": spans((-1, -1))}, "expected -1 at the same places"),
        ({"student_spans": spans((0, 1), (1, 2))}, "as many on both sides"),
        ({"student_spans": torch.zeros(1, 2)}, "student_spans is torch.float32: expected int64"),
        ({"student_spans": torch.zeros(1, 1, 2).long()}, r"\(L,\) and \(M, 2\)"),
        ({"student_log_probs": torch.zeros(1, 1, 1)}, r"\(L,\) and \(M, 2\)"),
        ({"student_log_probs": torch.zeros(12).long()}, "student_log_probs is torch.int64"),
        ({"teacher_log_probs": torch.zeros(9, requires_grad=True)}, "teacher_log_probs.detach()"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], said: str) -> None:
    student, teacher, *_ = case(torch.float32)
    keywords: dict[str, Any] = {
        "student_log_probs": student,
        "teacher_log_probs": teacher,
        "student_spans": spans((0, 1)),
        "teacher_spans": spans((0, 1)),
    }
    with pytest.raises((TypeError, ValueError), match=said):
        alm_loss(**keywords | change)
