"""What a run reports when it is over."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

REPORTS = ("full", "short", "none")


@dataclass
class ReportArguments:
    """The report on a run."""

    report: str = field(
        default="full",
        metadata={
            "help": "full: the student is evaluated before the first step, too, the teacher once, "
            "both write samples, and report.md, curves.png and a model card are written. short: "
            "without that evaluation and samples. none: only the summary."
        },
    )
    report_samples: int = field(
        default=5, metadata={"help": "Held-out prompts that the models continue, greedily."}
    )
    report_new_tokens: int = field(default=32, metadata={"help": "Tokens that they write at most."})
    eval_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks of lm-eval (hellaswag, ...) for the student, at the end."},
    )

    def __post_init__(self) -> None:
        if self.report not in REPORTS:
            raise ValueError(f"--report {self.report}: expected one of {', '.join(REPORTS)}.")
        for name, least in (("report_samples", 0), ("report_new_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name} {value}: expected at least {least}.")
        if self.eval_tasks and importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                f"--eval_tasks {' '.join(self.eval_tasks)} needs lm-eval: pip install lm-eval"
            )
