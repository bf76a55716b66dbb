"""Calls in one operation: the same numbers as the general way's, and only where nothing is out of
the ordinary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fusedkd import LMHead, SparseTeacher, backends, debug, divergences, kd_loss, loss
from fusedkd.call import Arguments
from fusedkd.direct import direct_loss
from fusedkd.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the extension is not built")
N, V = 6, 301


def arguments(student: Any, teacher: Any, labels: Tensor | None, **keywords: Any) -> Arguments:
    return Arguments(student, teacher, labels, **{**loss.DEFAULTS, **keywords})


def sides(*dtypes: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(V, (2, N // 2))
    labels[1, 0] = -100
    student, teacher = (torch.randn(2, N // 2, V).to(dtype) for dtype in dtypes)
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("student_dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("teacher_dtype", (torch.float64, torch.float32, torch.float16))
@pytest.mark.parametrize(
    "keywords",
    (
        *({"divergence": name, "temperature": 2.0} for name in divergences.names()),
        {"reduction": "sum", "teacher_temperature": 0.7, "backend": "cpu", "kd_weight": 0.3},
        {"ignore_index": 7, "label_smoothing": 0.1, "scale_by_t2": False},
        {"labels": None, "ce_weight": 0.0},
        {"nothing counts": True},
    ),
    ids=str,
)
def test_the_numbers_are_the_general_ways(
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    keywords: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher, labels = sides(student_dtype, teacher_dtype)
    given: dict[str, Any] = {"labels": labels, "ce_weight": 0.5, **keywords}
    if given.pop("nothing counts", False):
        labels.fill_(-100)
    labels[0, 0] = given.get("ignore_index", labels[0, 0])
    labels[labels == -100] = given.get("ignore_index", -100)

    def answer() -> tuple[Tensor, Tensor]:
        value = kd_loss(student, teacher, **given)
        return value.detach(), torch.autograd.grad(1.7 * value, student)[0]

    assert direct_loss(arguments(student, teacher, **given)) is not None
    direct = answer()
    monkeypatch.setattr(loss, "direct_loss", lambda given: None)
    general = answer()
    assert direct[0].dtype == general[0].dtype
    # its rows are added up in another order
    torch.testing.assert_close(
        direct[0], general[0], rtol=torch.finfo(general[0].dtype).eps, atol=0
    )
    assert torch.equal(direct[1], general[1])


def test_evaluation_has_no_graph_and_no_gradient() -> None:
    student, teacher, labels = sides(torch.float32, torch.float32)
    with torch.no_grad():
        value = direct_loss(arguments(student, teacher, labels, ce_weight=0.5))
    assert value is not None and not value.requires_grad
    trained = kd_loss(student, teacher, labels, ce_weight=0.5)
    assert torch.equal(value, trained.detach()) and trained.requires_grad


def test_a_graph_that_is_kept_gives_its_gradient_again() -> None:
    student, teacher, labels = sides(torch.float32, torch.float32)
    value = kd_loss(student, teacher, labels)
    first, second = (torch.autograd.grad(3 * value, student, retain_graph=True) for _ in range(2))
    (last,) = torch.autograd.grad(3 * value, student)
    assert torch.equal(first[0], second[0]) and torch.equal(second[0], last)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


class OwnRows(backends.CustomRows):
    """Inherits all of a backend but what it computes rows with."""


OWN = divergences.Divergence("own", value=lambda lp, lq: lp.exp() * (lp - lq))


@pytest.mark.parametrize(
    "keywords",
    (
        {"token_weights": torch.ones(2, N // 2)},
        {"normalizer": 3.0},
        {"normalizer": torch.tensor(3.0)},
        {"num_counted": 5},
        {"vocab_size": V - 1},
        {"reduction": "none"},
        {"inplace": True},
        {"kd_weight": 0.0},
        {"temperature": 2000.0},
        {"temperature": torch.tensor(2.0)},
        {"temperature": True},
        {"teacher_temperature": 0.0},
        {"divergence": "no such thing"},
        {"divergence": OWN},
        {"divergence": []},
        {"backend": "reference"},
        {"backend": OwnRows("cpu", torch.device("cpu"))},
        {"labels": None},
        {"labels": torch.zeros(2, N // 2, dtype=torch.float64)},
        {"labels": torch.zeros(N, dtype=torch.int64)},
        {"labels": torch.full((2, N // 2), V)},
        {"labels": torch.full((2, N // 2), -1)},
        {"labels": torch.zeros(N // 2, 2, dtype=torch.int64).T},
        {"labels": [0] * N},
        {"student": None},
        {"student": torch.randn(2, N // 2, V).half()},
        {"student": torch.zeros(2, N // 2, V, dtype=torch.int64)},
        {"student": torch.randn(2, V, N // 2).mT},
        {"student": torch.randn(2, N // 2, V, device="meta")},
        {"student": torch.randn(2, N // 2, V).to_sparse()},
        {"student": torch.randn(2, N // 2, V).to_mkldnn()},
        {"student": torch.nested.nested_tensor([torch.randn(N // 2, V)] * 2)},
        {"student": LMHead(torch.randn(2, N // 2, 4), torch.randn(V, 4))},
        {"teacher": None},
        {"teacher": torch.randn(2, N // 2, V + 1)},
        {"teacher": torch.zeros(2, N // 2, V, dtype=torch.int32)},
        {"teacher": torch.randn(2, N // 2, V, requires_grad=True)},
        {"teacher": torch.randn(N // 2, V).expand(2, -1, -1)},
        {"teacher": LMHead(torch.randn(2, N // 2, 4), torch.randn(V, 4))},
        {
            "teacher": SparseTeacher(
                torch.zeros(2, N // 2, 1, dtype=torch.int64), torch.zeros(2, N // 2, 1)
            )
        },
    ),
    ids=lambda keywords: ", ".join(f"{k}={type(v).__name__}" for k, v in keywords.items()),
)
def test_what_is_out_of_the_ordinary_goes_the_general_way(keywords: dict[str, Any]) -> None:
    student, teacher, labels = sides(torch.float32, torch.float32)
    given = {"student": student, "teacher": teacher, "labels": labels, "ce_weight": 0.5}
    assert direct_loss(arguments(**given)) is not None
    assert direct_loss(arguments(**given | keywords)) is None


def test_so_does_a_call_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "ENABLED", True)
    assert direct_loss(arguments(*sides(torch.float32, torch.float32))) is None


def test_so_does_what_has_no_numbers_or_no_tokens_or_a_tangent() -> None:
    given = sides(torch.float32, torch.float32)
    student, teacher, labels = given
    assert direct_loss(arguments(student[:0], teacher[:0], labels[:0])) is None
    assert direct_loss(arguments(torch.tensor(1.0), torch.tensor(1.0), None)) is None
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in given]
        assert direct_loss(arguments(*fake)) is None
    assert direct_loss(arguments(*fake)) is None
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), torch.ones_like(student))
        assert direct_loss(arguments(dual, teacher, labels)) is None

    def mapped(x: Tensor) -> Tensor:
        assert direct_loss(arguments(x, teacher[0], labels[0])) is None
        return x.sum()

    torch.func.vmap(mapped)(student.detach())
