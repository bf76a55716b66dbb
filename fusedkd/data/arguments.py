"""Which data a run trains and evaluates on, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DataArguments"]


@dataclass
class DataArguments:
    """The data of a run."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text (.txt .md .py), .jsonl, .json or .parquet files, or folders of them. "
            "Rows have a column text, messages or input_ids; for a classifier text, label and "
            "perhaps text_pair. stdlib: the sources of Python's standard library."
        },
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "The same, to evaluate on (default: --eval_share of the data)."},
    )
    eval_share: float = field(
        default=0.02, metadata={"help": "Share of the documents put aside for evaluation; 0: none."}
    )
    block_size: int = field(default=512, metadata={"help": "Tokens per training example."})
    mlm_probability: float = field(
        default=0.15,
        metadata={"help": "Masked models: share of the tokens that is masked; 0: none."},
    )
    mlm_smoothing: float = field(
        default=0.7,
        metadata={"help": "They are drawn by count^-this, rare ones more often; 0: uniformly."},
    )

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"--block_size {self.block_size}: expected at least 2 tokens.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"--eval_share {self.eval_share}: expected a share from 0 to below 1.")
