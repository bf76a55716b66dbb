"""Data for each thing that a model can be distilled to do: rows, and how they become batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from datasets import Dataset
from transformers import AutoConfig, DataCollatorWithPadding

from fusedkd.data.arguments import DataArguments
from fusedkd.data.labelled import load_examples
from fusedkd.data.loading import load_rows, say
from fusedkd.data.masking import FrequencyMasking, count_tokens
from fusedkd.errors import UserError, as_user_error

__all__ = ["TaskData", "prepare_data"]


class TaskData(NamedTuple):
    """What a trainer trains and evaluates on, and what the student's config has to have for it."""

    train: Dataset
    test: Dataset | None
    collator: Any
    student: dict[str, Any]


def prepare_data(task: str, flags: DataArguments, tokenizer: Any, teacher: str | None) -> TaskData:
    """The data of ``flags`` for a task of :func:`fusedkd.models.loading.task_of`.

    Raises:
        UserError: missing, unreadable or unfit data, or a tokenizer without what the task needs.
    """
    if task == "classification":
        return _classification(flags, tokenizer, str(teacher))
    if task == "masked" and flags.packing == "flatten":
        raise UserError("--packing flatten: expected none or blocks for a masked model.")
    train, test, collator, _, summary = load_rows(flags, tokenizer)
    say(summary)
    if task == "causal":
        return TaskData(train, test, collator, {})
    with as_user_error():
        counts = count_tokens(
            train.select_columns("input_ids").with_format("numpy"), len(tokenizer)
        )
        masking = FrequencyMasking(tokenizer, counts, flags.mlm_probability, flags.mlm_smoothing)
    return TaskData(train.remove_columns("labels"), _without_labels(test), masking, {})


def _without_labels(data: Dataset | None) -> Dataset | None:
    return None if data is None else data.remove_columns("labels")


def _classification(flags: DataArguments, tokenizer: Any, teacher: str) -> TaskData:
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token, which batches of sequences need.")
    classes = AutoConfig.from_pretrained(teacher)
    with as_user_error("--data"):
        train, test = load_examples(
            flags.data,
            flags.eval_data,
            flags.eval_share or 0.0,
            tokenizer,
            flags.block_size,
            classes.label2id,
        )
    student = {"id2label": classes.id2label, "label2id": classes.label2id}
    return TaskData(train, test, DataCollatorWithPadding(tokenizer), student)
