"""The flags of a teacher that is served, which several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ServedArguments:
    """How a teacher behind HTTP is asked."""

    teacher_protocol: str | None = field(
        default=None,
        metadata={"help": "Of a served teacher: vllm, sglang or trl (default: it tells)."},
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "Name of a served teacher (default: the only one there)."}
    )
    teacher_answers: str | None = field(
        default=None,
        metadata={
            "help": "Folder on a local disk where what a served teacher says is kept, so that "
            "nothing is asked twice (default: teacher_answers beside the output)."
        },
    )
    teacher_ahead: int = field(
        default=4,
        metadata={"help": "Batches that a served teacher is asked for before they are needed."},
    )
    teacher_timeout: float = field(
        default=120.0, metadata={"help": "Seconds for one answer of a served teacher."}
    )
    teacher_patience: float = field(
        default=600.0,
        metadata={"help": "Seconds without a good answer after which the command ends."},
    )
