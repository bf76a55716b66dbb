"""Several teachers for one batch: the loss, the gradient and the metrics are those of the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedkd import LMHead, Routed, SparseTeacher, kd_loss, kd_loss_and_metrics
from fusedkd.loss import losses_by_teacher

B, L, H, V = 5, 4, 6, 17
NAMES = ["code", "math", "code", "chat", "math"]


def sides(temperature: float = 1.0) -> tuple[LMHead, dict[str, Any], Any, torch.Tensor]:
    """A student's head, three teachers' forms of their rows, their logits, labels; in fp64."""
    make = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    student = LMHead(draw(B, L, H).requires_grad_(), draw(V, H).requires_grad_())
    logits = draw(B, L, V)
    weight = draw(V, H)
    hidden = draw(2, L, H)
    logits[[1, 4]] = hidden @ weight.T
    whole = (logits[3:4] / temperature).log_softmax(-1)
    ids = torch.arange(V).expand(1, L, V)
    teachers = {
        "code": logits[[0, 2]],
        "math": lambda: LMHead(hidden, weight),
        "chat": SparseTeacher(ids, whole, "drop"),
        "nobody": logits[:0],
    }
    labels = torch.randint(V, (B, L), generator=make)
    labels[0, 1] = labels[3] = -100
    return student, teachers, logits, labels


@pytest.mark.parametrize("options", [
    {}, {"divergence": "jsd(beta=0.3)", "ce_weight": 0.5}, {"reduction": "none"},
    {"reduction": "sum", "temperature": 2.0}, {"normalizer": 7.0},
    {"token_weights": torch.linspace(0, 2, B * L, dtype=torch.float64).reshape(B, L)},
])  # fmt: skip
@pytest.mark.parametrize("labelled", [True, False])
def test_it_is_the_loss_of_the_rows(options: dict[str, Any], labelled: bool, backend: str) -> None:
    if not labelled and "ce_weight" in options:
        options = {"divergence": "jsd(beta=0.3)"}
    student, teachers, logits, labels = sides(options.get("temperature", 1.0))
    given = labels if labelled else None
    inputs = student.hidden, student.weight
    found, told = kd_loss_and_metrics(
        student, Routed(teachers, NAMES), given, backend=backend, **options
    )
    expected, wanted = kd_loss_and_metrics(student, logits, given, backend=backend, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
    for name, one, other in zip(told._fields, told, wanted, strict=True):
        if name.endswith("_mass"):  # of a SparseTeacher, which one of the three is
            assert one is other is None
            continue
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)


def test_metrics_of_each() -> None:
    student, teachers, logits, labels = sides()
    loss, by_name = losses_by_teacher(student, Routed(teachers, NAMES), labels)
    assert list(by_name) == ["code", "math", "chat"] and int(by_name["chat"].num_tokens) == 0
    alone = LMHead(student.hidden[[1, 4]], student.weight)
    _, math = kd_loss_and_metrics(alone, logits[[1, 4]], labels[[1, 4]])
    torch.testing.assert_close(by_name["math"].kd, math.kd)
    torch.testing.assert_close(loss, kd_loss(student, logits, labels))


def test_mistakes() -> None:
    student, teachers, _, labels = sides()
    with pytest.raises(ValueError, match="row 1 is taught by 'x': expected one of code, math"):
        Routed(teachers, ["code", "x"])
    with pytest.raises(ValueError, match="5 rows and there are 4 names"):
        kd_loss(student, Routed(teachers, NAMES[:4]), labels)
    with pytest.raises(ValueError, match="leading shape"):
        kd_loss(student, Routed(teachers | {"chat": teachers["code"]}, NAMES), labels)
