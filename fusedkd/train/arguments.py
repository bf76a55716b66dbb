"""What a distillation run can be told: transformers' arguments plus those of the loss."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from fusedkd import backends, divergences
from fusedkd.logits import TAILS
from fusedkd.spec import LossSpec

__all__ = ["DistillationArguments", "parse_divergence"]

_CALL = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<call>[^()]*)\)|:(?P<colon>[^()]*))?\s*")


def parse_divergence(text: str) -> divergences.Divergence:
    """The divergence that ``text`` describes, as a command line or a recipe writes it.

    ``"forward_kl"``, ``"jsd(beta=0.3)"``, ``"jsd(0.3)"`` and ``"jsd:0.3"`` are all understood;
    parameters that are not given have the default of the factory in :mod:`fusedkd.divergences`.
    Nothing is evaluated.

    Raises:
        ValueError: not of this form, an unknown name or parameter, or a parameter outside its
            range.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise ValueError(
            f"divergence={text!r}: expected a name with optional numbers, such as 'forward_kl', "
            "'jsd(beta=0.3)' or 'jsd:0.3'."
        )
    name, body = match["name"], match["call"] or match["colon"] or ""
    divergences.make(
        name
    ) if name not in divergences.names() else None  # its error names the alternatives
    factory = getattr(divergences, name)
    positional: list[float] = []
    named: dict[str, float] = {}
    for part in filter(str.strip, body.split(",")):
        key, equals, value = part.rpartition("=")
        if equals:
            named[key.strip()] = _number(text, value)
        else:
            positional.append(_number(text, value))
    try:
        bound = inspect.signature(factory).bind(*positional, **named)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters) or "none"
        raise ValueError(
            f"divergence={text!r}: {error}; the parameters of {name} are: {known}."
        ) from None
    return factory(*bound.args, **bound.kwargs)


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"divergence={text!r}: expected a number, not {value.strip()!r}."
        ) from None


@dataclass
class DistillationArguments(TrainingArguments):
    """Everything of :class:`transformers.TrainingArguments`, and the loss of
    :func:`fusedkd.kd_loss`.

    The defaults are those of ``kd_loss``: the plain divergence at T = 1 without cross-entropy,
    which is what Minitron (arXiv 2407.14679) found best for decoders. ``label_smoothing_factor``
    keeps its transformers meaning and smooths the cross-entropy term of training; evaluation
    always reports the unsmoothed cross-entropy.
    """

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "forward_kl, reverse_kl, 'jsd(beta=0.3)', ... (see fusedkd.divergences)."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Softens both sides of the divergence; cross-entropy stays at 1."},
    )
    teacher_temperature: float | None = field(
        default=None,
        metadata={"help": "The teacher's own temperature, if it differs from --temperature."},
    )
    teacher_tail: str = field(
        default="bucket",
        metadata={
            "help": "With a teacher cache, mass that it does not spell out: bucket (compared as "
            "one more entry), renormalize or drop."
        },
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy with the labels."}
    )
    scale_by_t2: bool = field(
        default=True,
        metadata={
            "help": "Multiply the divergence by temperature^2 (Hinton et al. 2015, section 2)."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "True vocabulary where teacher and student pad it differently (default: found)."
        },
    )
    chunk_bytes: int | None = field(
        default=None, metadata={"help": "Bytes of logits held at any time (default: by device)."}
    )
    backend: str | None = field(
        default=None, metadata={"help": "triton, cpu or reference (default: by device)."}
    )

    def __post_init__(self) -> None:
        keywords = self.loss_keywords()
        if self.teacher_temperature is None:
            keywords["teacher_temperature"] = self.temperature
        smoothing = self.label_smoothing_factor
        fixed = {"vocab_size": self.vocab_size or 1, "label_smoothing": smoothing}
        LossSpec(**{**keywords, **fixed})  # checks, before anything expensive
        counts = ("vocab_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: expected a whole number of at least 1.")
        if self.teacher_tail not in TAILS:
            raise ValueError(
                f"teacher_tail={self.teacher_tail!r}: expected one of {', '.join(TAILS)}."
            )
        super().__post_init__()
        if self.backend is not None:
            try:
                backends.resolve(self.backend, self.device)
            except RuntimeError as error:
                raise ValueError(str(error)) from None

    def loss_keywords(self) -> dict[str, Any]:
        """The keyword arguments of :func:`fusedkd.kd_loss` that do not change between batches."""
        return {
            "divergence": parse_divergence(self.divergence),
            "temperature": self.temperature,
            "teacher_temperature": self.teacher_temperature,
            "kd_weight": self.kd_weight,
            "ce_weight": self.ce_weight,
            "scale_by_t2": self.scale_by_t2,
            "vocab_size": self.vocab_size,
            "chunk_bytes": self.chunk_bytes,
            "backend": self.backend,
        }
