"""What the evidence trains: text, teachers, students, and the losses of the recipes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    default_data_collator,
    set_seed,
)

from fusedkd.data.masking import FrequencyMasking, count_tokens
from fusedkd.demo.corpus import Corpus, Sizes, corpus
from fusedkd.shipped import shipped
from fusedkd.students.copy import StudentPlan, build_student

LOSS = ("divergence", "temperature", "kd_weight", "kd_tokens", "ce_weight", "terms", "schedules")


@dataclass(frozen=True)
class Setting(Sizes):
    """The defaults fit an hour of two cores."""

    transfer_tokens: int = 60_000
    held_out_blocks: int = 200
    vocabulary: int = 2000
    block: int = 64
    # A BERT of this size learns from neighbours within minutes in short blocks; in blocks of 64 it
    # stays with token frequencies for thousands of steps. (BERT's own training began short too.)
    masked_block: int = 16
    batch: int = 16  # blocks of ``block`` tokens; masked batches hold as many tokens
    width: int = 128
    layers: int = 4
    heads: int = 4
    learning_rate: float = 2e-3
    seeds: int = 3

    # A teacher whose cross-entropy is above this share of what token frequencies alone give has
    # nothing to teach, and its students would show nothing.
    learnt: float = 0.95

    def block_of(self, kind: str) -> int:
        return self.masked_block if kind == "masked" else self.block

    def batch_of(self, kind: str) -> int:
        return self.batch * self.block // self.block_of(kind)


SMOKE = Setting(60_000, 4_000, 8, 300, 16, 8, 4, 32, seeds=1, learnt=math.inf)


@dataclass(frozen=True)
class Text:
    """Blocks by kind of model: to train on, "unlimited" and "limited"; and held out, with masks
    drawn once."""

    train: dict[str, dict[str, Dataset]]
    held_out: dict[str, Dataset]
    tokenizer: Any
    counts: np.ndarray
    bytes_per_token: float

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        """Masks what has no labels; causal rows have theirs, held-out ones were masked once."""
        return default_data_collator(rows) if "labels" in rows[0] else self.masking()(rows)

    def masking(self) -> FrequencyMasking:
        """Uniform also for DistilBERT, whose release draws rare tokens more often: what a student
        learns of frequencies would be held against it where it is judged."""
        return FrequencyMasking(self.tokenizer, self.counts, smoothing=0.0)

    def chance(self, kind: str) -> float:
        """Accuracy of always saying the most frequent token."""
        labels = np.asarray(self.held_out[kind]["labels"])
        return float((labels[labels != -100] == self.counts.argmax()).mean())

    def unigram(self, kind: str) -> float:
        """Cross-entropy of the training tokens' frequencies: what can be had without context."""
        labels = np.asarray(self.held_out[kind]["labels"])
        counts = self.counts + 1.0  # no token is impossible
        return float(-np.log(counts / counts.sum())[labels[labels != -100]].mean())


def make_text(size: Setting) -> Text:
    """The standard library's sources, split by file; the tokenizer never saw the held-out ones."""
    text = corpus(size)
    text.tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    sets = {"unlimited": text.teacher, "limited": text.transfer, "held out": text.held_out}
    short = {name: _cut(blocks, size.masked_block) for name, blocks in sets.items()}
    counts = count_tokens(text.teacher.with_format("numpy"), len(text.tokenizer))
    held_out = short.pop("held out")
    made = Text(
        {"causal": sets, "masked": short},
        {"causal": sets.pop("held out")},
        text.tokenizer,
        counts,
        text.bytes_per_token,
    )
    set_seed(0)
    batch = made.masking()(list(held_out))
    made.held_out["masked"] = Dataset.from_dict({k: v.tolist() for k, v in batch.items()})
    return made


def _cut(blocks: Dataset, length: int) -> Dataset:
    """Shorter blocks, without labels."""
    ids = np.asarray(blocks.with_format("numpy")["input_ids"][:])
    return Dataset.from_dict({"input_ids": ids.reshape(-1, length)})


def make_teacher(kind: str, size: Setting, tokenizer: Any, seed: int = 0) -> Any:
    """A random GPT-2 or BERT of the teacher's size, without dropout."""
    set_seed(seed)
    if kind == "causal":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=size.block,
                n_embd=size.width,
                n_layer=size.layers,
                n_head=size.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            max_position_embeddings=size.masked_block,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# ---- students ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Student:
    """How one starts and what it minimises; ``without`` are its loss less one of its parts, and
    ``papers`` what the paper lost by that."""

    kind: str
    plan: Callable[[Setting], StudentPlan]
    loss: dict[str, Any]
    without: dict[str, dict[str, Any]] = field(default_factory=dict)
    papers: dict[str, str] = field(default_factory=dict)

    def build(self, teacher: Any, size: Setting, seed: int, random: bool = False) -> Any:
        """The student before training; ``random``: of the same shape, with nothing copied."""
        set_seed(seed)
        student = build_student(teacher, self.plan(size))
        return type(student)(student.config) if random else student


def _recipe(name: str) -> dict[str, Any]:
    content = yaml.safe_load(shipped("recipes")[name].read_text())
    return {key: content[key] for key in LOSS if key in content}


def _less(loss: dict[str, Any], term: str) -> dict[str, Any]:
    """The loss without a term, or without "kd_weight" or "ce_weight" and what moves it."""
    kept = [text for text in loss.get("schedules", []) if not text.startswith(f"{term}=")]
    changed = {
        **loss,
        "schedules": kept,
        "terms": [text for text in loss.get("terms", []) if not text.startswith(term)],
    }
    return changed | ({term: 0.0} if term.endswith("_weight") else {})


def _students() -> dict[str, Student]:
    triple, terms = _recipe("distilbert"), _recipe("tinybert_general")
    # the two stages in one: the terms for half of the steps, then prediction and masked LM
    names = [text.split("(")[0] for text in terms["terms"]]
    half = [f"{name}=step:0:0.5" for name in names]
    stages = {**terms, "schedules": [*half, "kd_weight=step:1:0.5", "ce_weight=step:1:0.5"]}
    # a term's ablation, and what the paper lost
    tiny = {"attention_mse": "4.6", "hidden_mse": "2.7", "kd_weight": "2.1", "embedding_mse": "1.5"}
    distil = {"kd_weight": "2.96", "cosine": "1.46", "ce_weight": "0.31", "initialisation": "3.69"}
    return {
        "GPT-style": Student("causal", lambda s: StudentPlan(s.layers // 2), _recipe("distilgpt2")),
        "DistilBERT-style": Student(
            "masked",
            lambda s: StudentPlan(s.layers // 2, to="distilbert"),
            triple,
            {n: _less(triple, n) for n in distil if n != "initialisation"}
            | {"initialisation": triple},
            {n: f"{loss} of 77.0" for n, loss in distil.items()},
        ),
        "TinyBERT-style": Student(
            "masked",
            lambda s: StudentPlan(s.layers // 2, hidden=s.width // 2),
            stages,
            {n: _less(stages, n) for n in tiny},
            {n: f"{loss} of 75.6" for n, loss in tiny.items()},
        ),
        "ALBERT-style": Student(
            "masked",
            lambda s: StudentPlan(s.layers, to="albert", embedding=s.width // 2),
            _recipe("albert"),
        ),
    }


STUDENTS = _students()


# ---- rows beside the recipes: where answers come from, and another tokenizer ---------------------

BASE = "GPT-style"  # the student of these rows, with little text
ACROSS = "two tokenizers"  # and one of its size with another tokenizer


@dataclass(frozen=True)
class Row:
    """One way to train the base student and its control, which differs in that way alone."""

    variant: str
    control: str
    loss: dict[str, Any]
    control_loss: dict[str, Any] | None
    says: str
    share: float = 1.0  # of the base student's steps


def rows(size: Setting) -> dict[str, Row]:
    """By student and variant of their results."""
    kept = _less(STUDENTS[BASE].loss, "cosine")  # a cache has no hidden states to compare
    reverse = {"divergence": "reverse_kl"}
    writes = {
        "on_policy_share": 1.0,
        "on_policy_prompt": size.block // 4,
        "on_policy_new_tokens": size.block // 2,
    }
    across = {"cross_tokenizer": "alm", "ce_weight": 1.0}
    return {
        BASE + "/cached": Row("cached", "live", kept, kept, f"top {TOP_K} of a cache | live"),
        BASE + "/on-policy": Row(
            *("on-policy", "off-policy", reverse | writes, reverse),
            "reverse KL on what it writes | on the text",
            share=0.25,
        ),
        ACROSS + "/alm": Row("alm", "plain", across, None, "ALM and CE | CE alone"),
    }


TOP_K = 32


def other_text(size: Setting) -> Corpus:
    """The same files, by a tokenizer with fewer entries."""
    return corpus(replace(size, vocabulary=max(280, 3 * size.vocabulary // 10)))
