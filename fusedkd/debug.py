"""``FUSEDKD_DEBUG=1``: what each call does, in a few lines on stderr."""

from __future__ import annotations

import os
import sys
from types import ModuleType

from torch import Tensor

from fusedkd.cut import Cut
from fusedkd.inputs import Chunk, Inputs, Plan
from fusedkd.spec import LossSpec

ENABLED = os.environ.get("FUSEDKD_DEBUG", "0") not in ("", "0")


def show(
    inputs: Inputs, spec: LossSpec, plan: Plan, backend: ModuleType, cut: Cut, blocks: list[Chunk]
) -> None:
    """Print how a call is computed: sides, terms, backend, chunks, products."""
    total, chunks = inputs.row_scale.numel(), [len(list(b.parts(cut.logits))) for b in blocks]
    rows = blocks[-1].flat.stop
    student = _side(inputs.student, inputs.student_weight)
    teacher = "no teacher"
    if inputs.teacher is not None:
        form = f"{plan.tail} over {inputs.teacher.shape[-1]} entries" if plan.tail else ""
        teacher = form or _side(inputs.teacher, inputs.teacher_weight)
    gradients = [name for name, wanted in plan.wanted._asdict().items() if wanted]
    rule = "" if spec.row_rule is None else f"{spec.row_rule!r} x "
    z_loss = f" + {spec.z_loss_weight:g} x lse^2" if spec.z_loss_weight else ""
    lines = [
        f"student {student}; teacher {teacher}; vocabulary {spec.vocab_size:,}",
        f"{spec.kd_scale:g} x {rule}{spec.divergence!r} at T = {spec.temperature:g} (teacher "
        f"{spec.teacher_temperature:g}) + {spec.ce_weight:g} x CE{z_loss}; "
        f"reduction {spec.reduction}",
        f"{_backend(backend)} on {inputs.row_scale.device}; wanted: {', '.join(gradients) or '-'}",
        f"{rows:,} of {total:,} tokens; logits of {cut.logits:,} at a time, gradient of "
        f"{cut.gradient:,}, in {cut.bytes:,} bytes",
        f"products: {_products(inputs, plan, sum(chunks), len(blocks)) or 'none'}",
    ]
    note("\n         ".join(lines))


def note(text: str) -> None:
    """Print ``text`` if anything is to be printed."""
    if ENABLED:
        print(f"fusedkd: {text}", file=sys.stderr)


def _side(tensor: Tensor, weight: Tensor | None) -> str:
    shape = tuple(tensor.shape if weight is None else (*tensor.shape, weight.shape[0]))
    kind = "logits" if weight is None else "head"
    return f"{kind} {shape} {str(tensor.dtype).removeprefix('torch.')}"


def _backend(backend: ModuleType) -> str:
    name = getattr(backend, "__name__", type(backend).__name__).rpartition(".")[2]
    instructions = getattr(backend, "instruction_set", None)
    return f"{name} ({instructions()})" if instructions else name


def _products(inputs: Inputs, plan: Plan, chunks: int, blocks: int) -> str:
    """Of matrices, in the order in which they are made."""
    student, teacher = inputs.student_weight is not None, inputs.teacher_weight is not None
    products = {
        "student's logits": chunks * student,
        "teacher's logits": chunks * teacher,
        "dh": blocks * (student and plan.wanted.hidden),
        "dW": blocks * (student and plan.wanted.weight),
    }
    return ", ".join(f"{number} of {name}" for name, number in products.items() if number)
