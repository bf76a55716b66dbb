"""Which models a run distils, and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusedkd.models.loading import DTYPES

__all__ = ["ModelArguments"]


@dataclass
class ModelArguments:
    """The student and its teacher."""

    teacher: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the teacher."}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that `fusedkd cache` wrote, instead of --teacher."},
    )
    student: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the student to start from."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or hub name (default: the student's or teacher's)."}
    )
    student_init: str = field(
        default="weights",
        metadata={"help": "weights: as saved. random: only the student's config is used."},
    )
    student_dtype: str = field(
        default="float32",
        metadata={"help": f"Of the trained weights: {', '.join(DTYPES)}. --bf16 computes in bf16."},
    )
    teacher_dtype: str = field(
        default="auto", metadata={"help": f"{', '.join(DTYPES)} (auto: as saved)."}
    )

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {"student_init": ("weights", "random")}
        choices |= {"student_dtype": DTYPES, "teacher_dtype": DTYPES}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"--{name} {value}: expected one of {', '.join(known)}.")
