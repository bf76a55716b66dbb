"""Heads in whatever a student, its teacher and autocast compute in, against fp64."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import families as tiny
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd import LMHead, kd_loss
from fusedkd.models.heads import loss_in_forward
from fusedkd.models.kinds import HeadOf
from fusedkd.teachers import LiveTeacher

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of loss and gradients, as parts of their size: what one rounding loses, a few times over
ERRORS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def exact(student: nn.Module, teacher: nn.Module, ids: Tensor, labels: Tensor) -> Any:
    """KL and its gradients in fp64, of the same weights."""
    s, t = (copy.deepcopy(model).double() for model in (student, teacher))
    lq, lp = (F.log_softmax(model(ids).logits, -1) for model in (s, t))
    loss = F.kl_div(lq, lp.detach(), reduction="none", log_target=True).sum(-1)[labels != -100]
    loss.mean().backward()
    return loss.mean().detach(), torch.cat([p.grad.flatten() for p in s.parameters()])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", list(product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_heads_in_every_dtype(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype], autocast: torch.dtype | None
) -> None:
    student, teacher = (tiny.build(kind, i + 1).eval().to(dtype) for i, dtype in enumerate(dtypes))
    data = tiny.batch(tiny.rows())
    ids, labels = data["input_ids"], F.pad(data["labels"], (0, 1), value=-100)[:, 1:]
    want, right = exact(student, teacher, ids, labels)

    def context() -> Any:
        return torch.autocast("cpu", autocast, enabled=autocast is not None)

    def compute(head: Any) -> tuple[Tensor, None]:
        assert isinstance(head, LMHead) and isinstance(answer, LMHead)
        with context():
            return kd_loss(head, answer, labels), None

    if autocast is not None:  # as accelerate's prepare_model, which is all that sees it
        for model in (student, teacher):
            model.forward = convert_outputs_to_fp32(context()(model.forward))
    answer = LiveTeacher(teacher, context)({"input_ids": ids})
    head = HeadOf("student").of(student)
    loss = loss_in_forward(student, student, head, {"input_ids": ids}, compute)[0]
    loss.backward()
    got = torch.cat([p.grad.double().flatten() for p in student.parameters()])
    error = max(ERRORS[dtype] for dtype in (*dtypes, autocast or torch.float32))
    assert abs(loss.double() - want) <= error * want
    assert (got - right).norm() <= error * right.norm()
