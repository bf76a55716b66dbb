"""``fusedkd student``: a teacher from disk, a student of it to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers import AutoConfig, set_seed

from fusedkd.errors import UserError, as_user_error
from fusedkd.train.loading import load_tokenizer, required
from fusedkd.train.student import StudentPlan, build_student

__all__ = ["make_student"]


def make_student(
    teacher: str | None, plan: StudentPlan, output: Path, tokenizer: str | None, seed: int
) -> None:
    """Build the student, save it as safetensors with the teacher's tokenizer, say how large it is.

    Raises:
        UserError: a missing or wrong argument or model, or files in ``output`` already.
    """
    name = required("from", teacher)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty: choose another folder.")
    model = _load(name)
    set_seed(seed)  # of whatever is not copied
    with as_user_error():
        student = build_student(model, plan)
    student.save_pretrained(output)
    try:
        load_tokenizer(tokenizer, teacher=name).save_pretrained(output)
    except UserError as error:
        if tokenizer is not None:
            raise
        Console(stderr=True).print(f"Saved without a tokenizer: {error}", highlight=False)
    _say(model, student, plan, output)


def _load(name: str) -> Any:
    """The teacher in the class that it was saved in, from safetensors: nothing is unpickled."""
    with as_user_error(f"--from {name} cannot be loaded"):
        architectures = AutoConfig.from_pretrained(name).architectures or []
        found = [getattr(transformers, a) for a in architectures if hasattr(transformers, a)]
        if not found:
            raise UserError(
                f"--from {name}: its config names no architecture of transformers "
                f"({', '.join(architectures) or 'none'})."
            )
        return found[0].from_pretrained(name, dtype="auto", use_safetensors=True)


def _say(teacher: Any, student: Any, plan: StudentPlan, output: Path) -> None:
    ours, theirs = student.num_parameters(), teacher.num_parameters()
    console = Console(highlight=False)
    console.print(f"teacher  {theirs:>13,} parameters  {type(teacher).__name__}")
    console.print(
        f"student  {ours:>13,} parameters  {type(student).__name__}, {ours / theirs:.1%} "
        f"({theirs / ours:.2f}x smaller)"
    )
    start = "copied from the teacher" if plan.copies else "random: other widths, nothing to copy"
    console.print(f"weights  {start}; saved to {output}")
