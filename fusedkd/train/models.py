"""What the trainer has to know about the two models before they meet."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from fusedkd.train.heads import NoPlainHead, PlainHead, is_partitioned, plain_head

__all__ = [
    "StudentHead",
    "frozen",
    "is_causal",
    "is_classifier",
    "plain_head_or_none",
    "true_vocabulary",
    "vocabulary_size",
]

logger = logging.getLogger(__name__)


def is_causal(model: Any) -> bool:
    """Whether position n predicts token n + 1, as in every decoder; not in masked or
    encoder-decoder models, nor in classifiers."""
    masked = _base(model) in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return not masked and not is_classifier(model) and not model.config.is_encoder_decoder


def is_classifier(model: Any) -> bool:
    """Whether the model gives one distribution per sequence, over classes."""
    return _base(model) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def _base(model: Any) -> str:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft
    return type(model).__name__


def frozen(teacher: nn.Module, student: nn.Module, device: torch.device) -> nn.Module:
    trained = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            "teacher and student share parameters, so training one would change the other: load "
            "the teacher separately, or copy.deepcopy it."
        )
    teacher.eval().requires_grad_(False)
    if any(map(is_partitioned, teacher.parameters())):  # by from_pretrained, under ZeRO-3
        import deepspeed

        # only for its hooks, which gather each layer as it runs
        dtype = next(teacher.parameters()).dtype
        config = {
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }
        deepspeed.initialize(model=teacher, config=config)
        return teacher
    placed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
    return teacher if placed else teacher.to(device)


def plain_head_or_none(model: nn.Module, role: str) -> PlainHead | None:
    if is_classifier(model):  # a few classes: dense logits are nothing to warn about
        return None
    try:
        return plain_head(model)
    except NoPlainHead as reason:
        logger.warning(
            "%s %s: dense logits are used, because %s.", role, type(model).__name__, reason
        )
        return None


class StudentHead:
    """The student's plain head, if it has one: looked for at once, or in the first step where
    ZeRO-3 has the model in parts, which cannot run before DeepSpeed has wrapped it."""

    def __init__(self, model: nn.Module) -> None:
        self._waits = any(map(is_partitioned, model.parameters()))
        self.found = None if self._waits else plain_head_or_none(model, "student")

    def of(self, model: nn.Module) -> PlainHead | None:
        """The head of ``model``, the one that this was made for."""
        if self._waits:
            self.found, self._waits = plain_head_or_none(model, "student"), False
        return self.found


_PADDING = 512  # tables are padded to multiples of 64-512; more is another vocabulary


def vocabulary_size(model: Any) -> int:
    """The rows of the model's embedding, as its config says."""
    return int(model.config.get_text_config().vocab_size)


def true_vocabulary(student: Any, teacher: Any, given: int | None, tokenizer: Any) -> int | None:
    """How many columns of both models' logits are real; None: all of them.

    Checkpoints of one family pad the same vocabulary to different sizes (Qwen2.5: 151,936 columns
    up to 3B and 152,064 above, for 151,665 tokens). The number is, in this order: as given; the
    tokenizer's, if there is one; the smaller of the two, if they differ by no more than padding
    can.
    """
    if is_classifier(student):
        _check_classes(student, teacher)
        return None
    sizes = [vocabulary_size(model) for model in (student, teacher)]
    if given is not None and given > min(sizes):
        raise ValueError(
            f"vocab_size={given}: expected at most {min(sizes)}, the entries that both have "
            f"(student {sizes[0]}, teacher {sizes[1]})."
        )
    if given is not None or sizes[0] == sizes[1]:
        return given
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        if len(tokenizer) <= min(sizes):
            return len(tokenizer)
    elif abs(sizes[0] - sizes[1]) <= _PADDING:
        return min(sizes)
    raise ValueError(
        f"the student's vocabulary has {sizes[0]:,} entries and the teacher's {sizes[1]:,}, which "
        "is more than padding explains: distillation by token needs one tokenizer. If it is one, "
        "pass vocab_size=<number of its tokens>."
    )


def _check_classes(student: Any, teacher: Any) -> None:
    ours, theirs = (getattr(model.config, "id2label", None) for model in (student, teacher))
    if not is_classifier(teacher) or ours != theirs:
        raise ValueError(
            f"the student classifies into {ours}, the teacher ({type(teacher).__name__}) into "
            f"{theirs}: expected one set of classes; set the student's id2label to the teacher's."
        )
