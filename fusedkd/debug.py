"""``FUSEDKD_DEBUG=1``: what each call does, in a few lines on stderr."""

from __future__ import annotations

import os
import sys
from types import ModuleType

from torch import Tensor

from fusedkd.inputs import Chunk, Inputs, Plan
from fusedkd.spec import LossSpec

ENABLED = os.environ.get("FUSEDKD_DEBUG", "0") not in ("", "0")


def show(
    inputs: Inputs, spec: LossSpec, plan: Plan, backend: ModuleType, chunks: list[Chunk]
) -> None:
    """Print how a call is computed: sides, terms, backend, chunks, products."""
    total = inputs.row_scale.numel()
    rows = [chunk.flat.stop - chunk.flat.start for chunk in chunks]
    student = _side(inputs.student, inputs.student_weight)
    teacher = "no teacher"
    if inputs.teacher is not None:
        form = f"{plan.tail} over {inputs.teacher.shape[-1]} entries" if plan.tail else ""
        teacher = form or _side(inputs.teacher, inputs.teacher_weight)
    gradients = [name for name, wanted in plan.wanted._asdict().items() if wanted]
    lines = [
        f"student {student}; teacher {teacher}; vocabulary {spec.vocab_size:,}",
        f"{spec.kd_scale:g} x {spec.divergence!r} at T = {spec.temperature:g} (teacher "
        f"{spec.teacher_temperature:g}) + {spec.ce_weight:g} x CE; reduction {spec.reduction}",
        f"{_backend(backend)} on {inputs.row_scale.device}; wanted: {', '.join(gradients) or '-'}",
        f"{sum(rows):,} of {total:,} tokens in {len(rows)} chunks of at most {max(rows):,} rows",
        f"products a chunk: {', '.join(_products(inputs, plan)) or 'none'}",
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


def _products(inputs: Inputs, plan: Plan) -> list[str]:
    """Of matrices, in the order in which they are made."""
    products = []
    if inputs.student_weight is not None:
        products.append("student's logits")
    if inputs.teacher_weight is not None:
        products.append("teacher's logits")
    if inputs.student_weight is not None:
        products += [
            name
            for name, wanted in (("dh", plan.wanted.hidden), ("dW", plan.wanted.weight))
            if wanted
        ]
    return products
