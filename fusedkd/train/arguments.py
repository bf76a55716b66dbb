"""What a distillation run can be told: transformers' arguments plus those of the loss."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from fusedkd import KDLoss, backends, divergences, row_rules
from fusedkd.alignment.likelihood import FORMS
from fusedkd.checks import check_temperature, check_weight
from fusedkd.distributions import TAILS
from fusedkd.sampled import K1, LOSS_TYPES
from fusedkd.train.on_policy import OnPolicy
from fusedkd.train.schedules import Schedule, parse_schedules
from fusedkd.train.terms import parse_term

KD_TOKENS = ("labels", "all")
OBJECTIVES = ("exact", "sampled")
CROSS = ("alm", "shared_kl", "both")
METRICS = ("every", "logging_steps", "none")
# those of fusedkd.train.tasks, which reads data: too much for a help text
TASK_NAMES = """masked, causal, seq2seq, sequence_classification, token_classification, \
multiple_choice, question_answering, image_classification, audio_classification"""


@dataclass
class DistillationArguments(TrainingArguments):
    """Everything of :class:`transformers.TrainingArguments`, and the loss of
    :func:`fusedkd.kd_loss`.

    The defaults are those of ``kd_loss``: the plain divergence at T = 1 without cross-entropy,
    which is what Minitron (arXiv 2407.14679) found best for decoders. ``label_smoothing_factor``
    keeps its transformers meaning and smooths the cross-entropy term of training; evaluation
    always reports the unsmoothed cross-entropy.
    """

    task: str | None = field(
        default=None,
        metadata={
            "help": f"What is distilled, {TASK_NAMES} (default: by the "
            "student's class; question_answering has to be named)."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "forward_kl, reverse_kl, 'jsd(beta=0.3)', ... (see fusedkd.divergences)."
        },
    )
    row_rule: str | None = field(
        default=None,
        metadata={
            "help": "A factor on each token's divergence: 'my_module:entropy_gate(threshold=2.0)', "
            "made by @row_rules.custom (see fusedkd.row_rules)."
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
            "one more entry), renormalize, drop, generalized (measures on its ids) or conditional "
            "(both sides given its ids)."
        },
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy with the labels."}
    )
    z_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the square of the student's logsumexp, where tokens have labels; in "
            "training alone (PaLM has 1e-4)."
        },
    )
    scale_by_t2: bool = field(
        default=True,
        metadata={
            "help": "Multiply the divergence by temperature^2 (Hinton et al. 2015, section 2)."
        },
    )
    kd_tokens: str = field(
        default="labels",
        metadata={
            "help": "Where the divergence counts: labels (where cross-entropy does) or all (every "
            "token that is not padding, as DistilBERT)."
        },
    )
    terms: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Terms beside the divergence: cosine, 'hidden_mse(weight=0.5, layers=3 6 9 "
            "12)', embedding_mse, attention_mse, attention_kl, relation_kl (fusedkd.train.terms)."
        },
    )
    schedules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Numbers that change over the training, NAME=SHAPE:END[:AT]: "
            "temperature=cosine:1, hidden_mse=step:0:0.8. NAME is temperature, "
            "teacher_temperature, kd_weight, ce_weight, z_loss_weight or a term; SHAPE constant, "
            "linear, cosine or step; AT the share of the training after which it is at END."
        },
    )
    on_policy_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the batches that the student writes itself from their prompts (GKD's "
            "lambda)."
        },
    )
    on_policy_prompt: int = field(
        default=128,
        metadata={"help": "Tokens of a prompt where labels do not tell where it ends."},
    )
    on_policy_new_tokens: int = field(
        default=128, metadata={"help": "Tokens that the student writes at most."}
    )
    on_policy_temperature: float = field(
        default=1.0, metadata={"help": "That the student writes at."}
    )
    objective: str = field(
        default="exact",
        metadata={
            "help": "On what the student writes: exact (the divergence of whole distributions) or "
            "sampled (--loss_type of the tokens that were written, fusedkd.sampled_kd_loss)."
        },
    )
    loss_type: str = field(
        default="k2",
        metadata={
            "help": "With --objective sampled: k2 or policy (the gradient of the reverse KL) or k3 "
            "(that of the forward KL)."
        },
    )
    cross_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "For a teacher with another tokenizer: alm (how probable both think the same "
            "bytes, arXiv 2503.20083), shared_kl (--divergence over the tokens that both have, "
            "where both have just ended the same bytes) or both."
        },
    )
    alm_weight: float = field(
        default=1.0, metadata={"help": "Weight of alm; --kd_weight is that of shared_kl."}
    )
    # 100 is the paper's. Of the gap that a teacher with the student's own tokenizer closes, alm
    # closed 100 % at 100 and -5 % at 1 (BPE of 2,000 to 600), and 42 % and 23 % the other way round
    # (`python -m fusedkd.benchmarks.across --mini`, one seed, busy machine, 2026-11-28)
    alm_temperature: float = field(
        default=100.0,
        metadata={
            "help": "Probabilities are compared to the power of 1 / this, and the loss multiplied "
            "by it, so that its gradient does not shrink (alm)."
        },
    )
    alm_form: str = field(default="kl", metadata={"help": "With alm: kl or tv (total variation)."})
    metrics: str = field(
        default="every",
        metadata={
            "help": "Training steps whose divergence, entropies, accuracies are measured: every, "
            "logging_steps (a log's means are then over its last step) or none."
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
        # checks, before anything expensive
        KDLoss(**self.loss_keywords(), label_smoothing=self.label_smoothing_factor)
        counts = ("vocab_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: expected a whole number of at least 1.")
        if self.task is not None:
            from fusedkd.train.tasks import task_named

            task_named(self.task)
        if self.teacher_tail not in TAILS:
            raise ValueError(
                f"teacher_tail={self.teacher_tail!r}: expected one of {', '.join(TAILS)}."
            )
        if self.metrics not in METRICS:
            raise ValueError(f"metrics={self.metrics!r}: expected one of {', '.join(METRICS)}.")
        if self.kd_tokens not in KD_TOKENS:
            raise ValueError(
                f"kd_tokens={self.kd_tokens!r}: expected one of {', '.join(KD_TOKENS)}."
            )
        check_weight("z_loss_weight", self.z_loss_weight)
        self.parsed_schedules()
        if self.on_policy().share and (self.ce_weight or "ce_weight" in self.parsed_schedules()):
            raise ValueError(
                f"on_policy_share={self.on_policy_share} with a cross-entropy: the labels would be "
                "what the student wrote itself. Expected ce_weight=0."
            )
        self._check_objective()
        self._check_across()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = (
                True  # else accelerate makes each of torchrun's processes a run of its own
            )
        super().__post_init__()
        if self.backend is not None:
            try:
                backends.resolve(self.backend, self.device)
            except RuntimeError as error:
                raise ValueError(str(error)) from None

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective={self.objective!r}: expected one of {', '.join(OBJECTIVES)}."
            )
        if self.loss_type not in LOSS_TYPES:
            k1 = f" {K1}" if self.loss_type == "k1" else ""
            raise ValueError(
                f"loss_type={self.loss_type!r}: expected one of {', '.join(LOSS_TYPES)}.{k1}"
            )
        if self.objective == "exact":
            return
        if self.on_policy_share != 1:
            raise ValueError(
                f"objective='sampled' with on_policy_share={self.on_policy_share:g}: its gradient "
                "is a divergence's where the student has drawn the tokens: expected 1."
            )
        if self.temperature != self.on_policy_temperature or {
            "temperature",
            "teacher_temperature",
        } & set(self.parsed_schedules()):
            raise ValueError(
                f"objective='sampled' with temperature={self.temperature:g}, "
                f"on_policy_temperature={self.on_policy_temperature:g}: expected one number, "
                "without a schedule: the loss is for tokens that were drawn at its temperature."
            )
        if self.row_rule is not None:
            raise ValueError(
                f"objective='sampled' with row_rule={self.row_rule!r}: there is no divergence of "
                "whole distributions that it could be a factor on: expected none."
            )
        if self.z_loss_weight:
            raise ValueError(
                f"objective='sampled' with z_loss_weight={self.z_loss_weight:g}: its loss is of "
                "single tokens: expected 0."
            )
        if self.kd_tokens == "all":
            raise ValueError(
                "objective='sampled' with kd_tokens='all': a prompt's tokens are not drawn: "
                "expected 'labels'."
            )

    def _check_across(self) -> None:
        if self.cross_tokenizer is None:
            return
        if self.cross_tokenizer not in CROSS:
            raise ValueError(
                f"cross_tokenizer={self.cross_tokenizer!r}: expected one of {', '.join(CROSS)}."
            )
        check_weight("alm_weight", self.alm_weight)
        check_temperature("alm_temperature", self.alm_temperature)
        if self.alm_form not in FORMS:
            raise ValueError(f"alm_form={self.alm_form!r}: expected one of {', '.join(FORMS)}.")
        neither = {
            "terms": self.terms,
            "on_policy_share": self.on_policy_share,
            "label_smoothing_factor": self.label_smoothing_factor,
            "vocab_size": self.vocab_size,
            "z_loss_weight": self.z_loss_weight,
            "kd_tokens": self.kd_tokens if self.kd_tokens != "labels" else None,
        }
        for name, value in neither.items():
            if value:
                raise ValueError(
                    f"cross_tokenizer={self.cross_tokenizer!r} with {name}={value!r}, which is for "
                    "one tokenizer: expected the default."
                )

    def across(
        self, keywords: dict[str, Any], numbers: dict[str, float]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What :func:`fusedkd.train.across.across` takes, of the loss' keywords and the weights at
        this moment."""
        kind = self.cross_tokenizer
        keywords = keywords | ({"kd_weight": 0.0} if kind == "alm" else {})
        alm = {
            "weight": 0.0 if kind == "shared_kl" else numbers["alm_weight"] * self.alm_temperature,
            "threshold_temperature": self.alm_temperature,
            "form": self.alm_form,
        }
        return keywords, alm

    def scheduled(self) -> dict[str, float]:
        """The numbers that can follow a schedule, and what they start from."""
        names = ["temperature", "teacher_temperature", "kd_weight", "ce_weight"]
        if self.cross_tokenizer is None and self.objective == "exact":
            names.append("z_loss_weight")
        names += ["alm_weight"] if self.cross_tokenizer in ("alm", "both") else []
        numbers = {name: value for name in names if (value := getattr(self, name)) is not None}
        return numbers | {name: term.weight for name, term in map(parse_term, self.terms)}

    def on_policy(self) -> OnPolicy:
        """How batches are written by the student."""
        return OnPolicy(
            self.on_policy_share,
            self.on_policy_prompt,
            self.on_policy_new_tokens,
            self.on_policy_temperature,
        )

    def check_for_cache(self, asks: bool = False) -> None:
        """Refuse what a cache of the teacher's answers cannot serve.

        Args:
            asks: it can ask for more.

        Raises:
            ValueError: the student writes batches, or the teacher's temperature moves.
        """
        if self.objective == "sampled":
            raise ValueError(
                "objective='sampled': expected a teacher that runs here, which says of every token "
                "how probable it is."
            )
        if self.on_policy_share and not asks:
            raise ValueError("on_policy_share: a cache has no answers to what the student writes.")
        moving = "temperature" if self.teacher_temperature is None else "teacher_temperature"
        if moving in self.parsed_schedules():
            raise ValueError(f"schedules: a cache has answers at fixed temperatures, not {moving}.")

    def parsed_schedules(self) -> dict[str, Schedule]:
        """``schedules`` by name."""
        return parse_schedules(self.schedules, self.scheduled())

    def loss_keywords(self) -> dict[str, Any]:
        """The keyword arguments of :func:`fusedkd.kd_loss` that do not change between batches."""
        return {
            "divergence": divergences.make(self.divergence),
            "row_rule": row_rules.resolve(self.row_rule),
            "temperature": self.temperature,
            "teacher_temperature": self.teacher_temperature,
            "kd_weight": self.kd_weight,
            "ce_weight": self.ce_weight,
            "scale_by_t2": self.scale_by_t2,
            "vocab_size": self.vocab_size,
            "chunk_bytes": self.chunk_bytes,
            "backend": self.backend,
        }
