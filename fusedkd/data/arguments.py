"""Which data a run trains and evaluates on, and what becomes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

PACKING = ("none", "blocks", "flatten")
TRAIN_ON = ("assistant", "last", "all")
STOPPING = ("first_exhausted", "all_exhausted")


@dataclass
class DataArguments:
    """The data of a run. ``conversations`` is no flag: whether a row keeps what it was made from,
    for a teacher that has a chat template of its own
    (:mod:`fusedkd.data.two_templates`)."""

    conversations = False

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files (.jsonl .json .csv .tsv .parquet .arrow; text: .txt .md .py), folders "
            "of them, what save_to_disk wrote, or hub names, NAME[:CONFIG][:SPLIT]; with weights, "
            "a.jsonl=0.7 b/=0.3. Rows have messages, prompt and completion, text, or input_ids; "
            "for a classifier text, label and perhaps text_pair. stdlib: the sources of Python's "
            "standard library."
        },
    )
    data_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "Share of the rows that comes from each --data (default: all rows)."},
    )
    data_stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "A mixture with weights ends when the first source is used up, or repeats rows "
            "until the last one is (all_exhausted)."
        },
    )
    data_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of data sets on the hub."}
    )
    data_streaming: bool = field(
        default=False,
        metadata={"help": "Read while training, without preparing all first; needs --max_steps."},
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "The same, to evaluate on (default: --eval_share of the data)."},
    )
    eval_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the rows put aside for evaluation; 0: none (default: 0.02; none with "
            "--data_streaming)."
        },
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column of conversations (default: messages)."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of prompts, text or messages (default: prompt)."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of their answers (default: completion)."}
    )
    teacher_column: str | None = field(
        default=None,
        metadata={"help": "Column that names each row's teacher, where --teacher gives several."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of plain text (default: text)."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Jinja file to use instead of the tokenizer's own chat template."},
    )
    train_on: str = field(
        default="assistant",
        metadata={
            "help": "Tokens of a conversation that carry a label: the assistant's turns (of a "
            "prompt and completion the completion), its last turn (last), or all. Text: always all."
        },
    )
    max_length: int = field(
        default=512,
        metadata={
            "help": "Tokens per training example at most; longer ones are truncated, and counted.",
            "aliases": ["--block_size", "--block-size"],
        },
    )
    packing: str | None = field(
        default=None,
        metadata={
            "help": "none: one example per row, padded. blocks: examples joined and cut every "
            "--max_length tokens. flatten: whole examples joined into one row that position ids "
            "keep apart. (default: blocks for text, none for conversations)"
        },
    )
    data_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize (default: one)."}
    )
    mlm_probability: float = field(
        default=0.15,
        metadata={"help": "Masked models: share of the tokens that is masked; 0: none."},
    )
    mlm_smoothing: float = field(
        default=0.7,
        metadata={"help": "They are drawn by count^-this, rare ones more often; 0: uniformly."},
    )

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(
                f"--max_length (--block_size) {self.max_length}: expected at least 2 tokens."
            )
        if self.data_streaming and self.eval_share:
            raise ValueError(
                f"--eval_share {self.eval_share} with --data_streaming: a stream's length is not "
                "known: expected --eval_data."
            )
        if self.eval_share is None:
            self.eval_share = 0.0 if self.data_streaming else 0.02
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"--eval_share {self.eval_share}: expected a share from 0 to below 1.")
        known = {"packing": PACKING, "train_on": TRAIN_ON, "data_stopping_strategy": STOPPING}
        for name, choices in known.items():
            if (value := getattr(self, name)) is not None and value not in choices:
                raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}.")
        if self.data_num_proc is not None and self.data_num_proc < 1:
            raise ValueError(f"--data_num_proc {self.data_num_proc}: expected at least 1.")
        for weight in self.data_weights:
            if not 0 < weight < math.inf:
                raise ValueError(f"--data_weights {weight}: expected numbers above 0.")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(
                f"--data_weights has {len(self.data_weights)} numbers and --data {len(self.data)} "
                "entries: expected one for each."
            )

    @property
    def block_size(self) -> int:
        """The older name of ``max_length``."""
        return self.max_length
