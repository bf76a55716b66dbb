"""Heads over a few classes, and heads that give numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from fusedkd.data.arguments import DataArguments
from fusedkd.data.labelled import load_examples, load_words
from fusedkd.train.compare import Compare, bernoulli, distributions, squared_error
from fusedkd.train.tasks.base import Task, TaskData, check_pads, config_of, same_classes

_PROBLEMS: dict[str, Compare] = {
    "single_label_classification": distributions,
    "multi_label_classification": bernoulli,
    "regression": squared_error,
}


class SequenceClassification(Task):
    """One answer for a sequence: a class, several at once, or numbers (``problem_type``)."""

    name = "sequence_classification"
    title = "sequence classification"
    auto = "AutoModelForSequenceClassification"
    adapter: ClassVar[str | None] = "SEQ_CLS"
    lists = ("SEQUENCE_CLASSIFICATION",)
    collator = "DataCollatorWithPadding(tokenizer), from rows with a label"
    unit = "example"
    over_tokens = per_token = False
    no_cache = "a classifier cannot have a teacher cache: use --teacher."

    def counted(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A number of -100 is a number."""
        labels = batch.get("labels")
        if labels is not None and labels.is_floating_point():
            return {"labels": torch.zeros_like(labels)}
        return batch

    def compare(self, student: Any, teacher: Any, labels: Tensor) -> Compare:
        """By ``problem_type``; without one by the labels' dtype, as transformers does."""
        problem = _problem(student) or _problem(teacher)
        if problem is None:
            several = labels.is_floating_point() or labels.dim() > 1
            problem = f"{'multi' if several else 'single'}_label_classification"
        return _PROBLEMS[problem]

    def measure(self, student: Any) -> str:
        """A regression has no distribution, and so no entropy."""
        numbers = _problem(student) == "regression"
        return "mean squared error" if numbers else super().measure(student)

    def check(self, student: Any, teacher: Any) -> None:
        """The same classes, and the same kind of problem."""
        ours, theirs = _problem(student), _problem(teacher)
        if ours and theirs and ours != theirs:
            raise ValueError(
                f"problem_type: the student's is {ours}, the teacher's {theirs}: expected one."
            )
        problem = ours or theirs
        if problem is None and config_of(student).num_labels == 1:
            raise ValueError(
                "num_labels=1 and no problem_type: a softmax over one class is always 1, and "
                "nothing would be learnt. Set config.problem_type of both models to 'regression' "
                "(compared by the mean squared error) or 'multi_label_classification' (sigmoids)."
            )
        if problem is not None and problem not in _PROBLEMS:
            raise ValueError(f"problem_type={problem!r}: expected one of {', '.join(_PROBLEMS)}.")
        same_classes(student, teacher)

    def data(self, flags: DataArguments, tokenizer: Any, teacher: Any) -> TaskData:
        """Rows of text and label."""
        check_pads(tokenizer)
        problem = teacher.problem_type
        train, test = load_examples(flags, tokenizer, _ids(teacher), problem == "regression")
        if problem is None and isinstance(train[0]["labels"], list):
            problem = "multi_label_classification"
        student = _same(teacher) | ({} if problem is None else {"problem_type": problem})
        return TaskData(train, test, DataCollatorWithPadding(tokenizer), student)


def _ids(config: Any) -> dict[str, int]:
    """Of the classes of a config, which may have only their names."""
    return {label: number for number, label in config.id2label.items()}


def _same(teacher: Any) -> dict[str, Any]:
    """What the config of a student of the same classes has."""
    return {"id2label": teacher.id2label, "label2id": _ids(teacher)}


def _problem(model: Any) -> str | None:
    return getattr(config_of(model), "problem_type", None)


class ImageClassification(SequenceClassification):
    """One answer for an image."""

    name = "image_classification"
    title = "image classification"
    auto = "AutoModelForImageClassification"
    adapter = None
    lists = ("IMAGE_CLASSIFICATION",)
    collator = "DefaultDataCollator, from rows with pixel_values and labels"


class AudioClassification(ImageClassification):
    """One answer for a recording."""

    name = "audio_classification"
    title = "audio classification"
    auto = "AutoModelForAudioClassification"
    lists = ("AUDIO_CLASSIFICATION",)
    collator = "DataCollatorWithPadding(feature_extractor), from rows with input_values and labels"


class TokenClassification(Task):
    """A class for each token: nothing is shifted."""

    name = "token_classification"
    title = "token classification"
    auto = "AutoModelForTokenClassification"
    adapter = "TOKEN_CLS"
    lists = ("TOKEN_CLASSIFICATION",)
    collator = "DataCollatorForTokenClassification(tokenizer)"
    over_tokens = False
    no_cache = SequenceClassification.no_cache

    def check(self, student: Any, teacher: Any) -> None:
        """The same classes."""
        same_classes(student, teacher)

    def data(self, flags: DataArguments, tokenizer: Any, teacher: Any) -> TaskData:
        """Rows of words and their labels."""
        check_pads(tokenizer)
        train, test = load_words(flags, tokenizer, _ids(teacher))
        return TaskData(train, test, DataCollatorForTokenClassification(tokenizer), _same(teacher))


class MultipleChoice(Task):
    """One of several continuations: a softmax over them."""

    name = "multiple_choice"
    title = "multiple choice"
    auto = "AutoModelForMultipleChoice"
    lists = ("MULTIPLE_CHOICE",)
    collator = "DataCollatorForMultipleChoice(tokenizer)"
    unit = "example"
    over_tokens = per_token = False
    no_cache = SequenceClassification.no_cache


class QuestionAnswering(Task):
    """Where an answer begins and ends: two softmaxes over the positions of the text."""

    name = "question_answering"
    title = "question answering"
    auto = "AutoModelForQuestionAnswering"
    adapter = "QUESTION_ANS"
    lists = ("QUESTION_ANSWERING",)
    collator = "DefaultDataCollator, from rows with start_positions and end_positions"
    unit = "position"
    asked_for = True
    over_tokens = per_token = False
    no_cache = SequenceClassification.no_cache
    _columns = "start_positions", "end_positions"

    def labels(self, inputs: dict[str, Any]) -> Tensor:
        """(B, 2) start and end; one beyond the text does not count, as in transformers."""
        length = inputs["input_ids"].shape[-1]
        for column in self._columns:
            if column not in inputs:
                raise self.missing(column, inputs)
        labels = torch.stack([inputs.pop(column) for column in self._columns], -1)
        return torch.where((labels >= 0) & (labels < length), labels, -100)

    def counted(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Both positions."""
        return {"labels": self.labels(dict(batch))}

    def logits(self, outputs: Any) -> Tensor:
        """(B, 2, L)."""
        found = (getattr(outputs, name, None) for name in ("start_logits", "end_logits"))
        there = [x for x in found if x is not None]
        if len(there) != 2:
            raise ValueError(
                f"the model returned a {type(outputs).__name__} without start_logits, end_logits."
            )
        return torch.stack(there, 1)
