"""What the trainer, its hosts and the command line ask of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from fusedkd.data.arguments import DataArguments
from fusedkd.errors import UserError
from fusedkd.models.columns import known_ids, own_columns
from fusedkd.models.kinds import own_positions
from fusedkd.train.compare import Compare, distributions


class TaskData(NamedTuple):
    """What a run of the command line trains and evaluates on, and what the student's config has to
    have for it."""

    train: Dataset
    test: Dataset | None
    collator: Any
    student: dict[str, Any]


class Task:
    """A thing that a model can be distilled to do: which models do it, what a batch has for them,
    and how answers are compared. Without state; the attributes say what a subclass may change."""

    name: ClassVar[str]
    title: ClassVar[str]  # for messages
    auto: ClassVar[str]  # the class of transformers that loads such a model
    also: ClassVar[tuple[str, ...]] = ()  # and those that load kinds which that one does not know
    lists: ClassVar[tuple[str, ...]]  # transformers' MODEL_FOR_{}_MAPPING_NAMES: who does it
    adapter: ClassVar[str | None] = None  # peft's task_type
    collator: ClassVar[str]  # of transformers, for a message
    unit: ClassVar[str] = "token"  # what the loss is a mean over
    asked_for: ClassVar[bool] = False  # other numbers than ``logits``: only where it is named
    causal: ClassVar[bool] = False  # position n predicts token n + 1
    over_tokens: ClassVar[bool] = True  # the answers are distributions over a vocabulary
    per_token: ClassVar[bool] = True  # there is one for each token of the input
    writes: ClassVar[bool] = False  # the student can write text itself
    no_cache: ClassVar[str | None] = "a cache is for causal language models: use --teacher."

    def classes(self) -> frozenset[str]:
        """The names of the models that do this."""
        return _listed(self.lists) | _registered(self.auto)

    def fits(self, config: Any) -> bool:
        """Whether a model of :meth:`classes` with this config does this, and not something else
        that its class can do, too."""
        return True

    def loader(self, config: Any) -> str:
        """The class of transformers that loads a model with this config."""
        known = (x for x in self.also if type(config) in _mapping(x))
        return self.auto if type(config) in _mapping(self.auto) else next(known, self.auto)

    # ---- a batch ----

    def labels(self, inputs: dict[str, Any]) -> Tensor:
        """Take the labels out of ``inputs``, aligned with the logits: label n is the target of
        answer n.

        Raises:
            ValueError: there are none.
        """
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        if shifted is not None:
            return shifted
        if labels is None:
            raise self.missing("labels", inputs)
        return labels

    def missing(self, column: str, inputs: Iterable[str]) -> ValueError:
        return ValueError(
            f"the batch has no '{column}', only {', '.join(inputs)}: use a collator that makes "
            f"them, such as {self.collator}."
        )

    def counted(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What stands for the batch where transformers' Trainer counts the labels of a step."""
        return batch

    def inputs(
        self, model: Any, other: Any, inputs: Mapping[str, Any], labels: Tensor
    ) -> dict[str, Any]:
        """Of a batch without its labels, what ``model`` reads; not what only ``other`` does."""
        found = own_columns(model, other, inputs)
        return known_ids(model, other, found) if self.over_tokens else found

    # ---- answers ----

    def logits(self, outputs: Any) -> Tensor:
        """Of a model's outputs.

        Raises:
            ValueError: they hold none.
        """
        found = outputs.get("logits") if isinstance(outputs, dict) else None
        found = getattr(outputs, "logits", None) if found is None else found
        if not isinstance(found, Tensor):
            raise ValueError(f"the model returned a {type(outputs).__name__} without 'logits'.")
        return found

    def trimmed(self, model: Any, side: Any, labels: Tensor) -> Any:
        """A model's answers without those at tokens that are none, which prompt tuning adds."""
        aligned = self.per_token or self.over_tokens
        return own_positions(model, side, labels.shape[1]) if aligned else side

    def compare(self, student: Any, teacher: Any, labels: Tensor) -> Compare:
        """How this batch's answers of two models are compared."""
        return distributions

    def measure(self, student: Any) -> str:
        """What a student's held-out loss is, for people."""
        return f"cross-entropy, nats per {self.unit}"

    def check(self, student: Any, teacher: Any) -> None:
        """Raises ValueError unless both models' answers are about the same things."""

    # ---- the command line ----

    def data(self, flags: DataArguments, tokenizer: Any, teacher: Any) -> TaskData:
        """The data of a run, for a teacher with this config (None: a cache).

        Raises:
            UserError: missing, unreadable or unfit data, a tokenizer without what the task needs,
                or a task of Python alone.
        """
        raise UserError(
            f"{self.title} is distilled in Python, with a collator of your own: "
            "fusedkd.train.DistillationTrainer(student, teacher, args, data_collator=...)."
        )


def config_of(model: Any) -> Any:
    """A model's config; None where it has none, as an ensemble of one's own may."""
    return getattr(model, "config", None)


def check_pads(tokenizer: Any) -> None:
    """Raises UserError unless batches of sequences can be padded."""
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token, which batches of sequences need.")


def same_classes(student: Any, teacher: Any) -> None:
    """Raises ValueError unless both classify into the same classes, as their configs say."""
    ours, theirs = (getattr(config_of(model), "id2label", None) for model in (student, teacher))
    if isinstance(teacher, nn.Module) and config_of(teacher) is not None and ours != theirs:
        raise ValueError(
            f"the student classifies into {ours}, the teacher ({type(teacher).__name__}) into "
            f"{theirs}: expected one set of classes; set the student's id2label to the teacher's."
        )


@cache
def _listed(lists: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = set()
    for name in lists:
        for classes in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).values():
            found |= {classes} if isinstance(classes, str) else set(classes)
    return frozenset(found)


def _mapping(auto: str) -> Any:
    return getattr(getattr(transformers, auto, None), "_model_mapping", {})


def _registered(auto: str) -> frozenset[str]:
    """What people have added by ``AutoModelFor...register``."""
    added = getattr(_mapping(auto), "_extra_content", {}).values()
    classes = (x for entry in added for x in (entry if isinstance(entry, tuple) else (entry,)))
    return frozenset(x.__name__ for x in classes if x is not None)
