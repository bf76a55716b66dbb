"""``fusedkd student``: a teacher from disk, a student of it to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers import PreTrainedModel, set_seed

from fusedkd.errors import UserError, as_user_error
from fusedkd.files import is_vacant, new_folder
from fusedkd.models.loading import architectures, load_tokenizer, read_config, read_model, required
from fusedkd.models.saved import SavedModel
from fusedkd.students.copy import StudentPlan, build_student


def make_student(
    teacher: str | None, plan: StudentPlan, output: Path, tokenizer: str | None, seed: int
) -> None:
    """Build the student, save it as safetensors with the teacher's tokenizer, say how large it is.

    Raises:
        UserError: a missing or wrong argument or model, or files in ``output`` already.
    """
    name = required("from", teacher)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a folder.")
    if output.exists() and not is_vacant(output):
        raise UserError(f"--output {output} is not empty: choose another folder.")
    model = _load(name)
    set_seed(seed)  # of whatever is not copied
    with as_user_error():
        student = build_student(model, plan)
    found = _tokenizer(tokenizer, name)
    with new_folder(output) as folder:
        student.save_pretrained(folder)
        if found is not None:
            found.save_pretrained(folder)
    _say(model, student, plan, output)


def _tokenizer(given: str | None, teacher: str) -> Any:
    """None where the teacher has none and none was asked for."""
    try:
        return load_tokenizer(given, teacher=SavedModel("from", teacher))
    except UserError as error:
        if given is not None:
            raise
        Console(stderr=True, markup=False, emoji=False, highlight=False).print(
            f"Without a tokenizer: {error}"
        )
        return None


def _load(name: str) -> Any:
    """The teacher in the class that it was saved in."""
    names = architectures(read_config("from", name))
    found = [getattr(transformers, a) for a in names if hasattr(transformers, a)]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    if not kinds:
        raise UserError(
            f"--from {name}: its config names no architecture of transformers "
            f"({', '.join(names) or 'none'})."
        )
    model, _ = read_model("from", name, kinds[0], dtype="auto")
    return model


def _say(teacher: Any, student: Any, plan: StudentPlan, output: Path) -> None:
    ours, theirs = student.num_parameters(), teacher.num_parameters()
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"teacher  {theirs:>13,} parameters  {type(teacher).__name__}")
    console.print(
        f"student  {ours:>13,} parameters  {type(student).__name__}, {ours / theirs:.1%} "
        f"({theirs / ours:.2f}x smaller)"
    )
    start = "copied from the teacher" if plan.copies else "random: other widths, nothing to copy"
    console.print(f"weights  {start}; saved to {output}")
