"""The terms that a distillation may have beside the divergence of the logits: each an object.

A new one is a dataclass here, listed in ``TERMS``; its fields are what a recipe can set.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fusedkd.features import (
    AttentionStates,
    attention_kl,
    attention_score_mse,
    cosine_loss,
    hidden_mse,
    relation_kl,
)
from fusedkd.models.capture import Captured
from fusedkd.models.layers import depth, layer_pairs
from fusedkd.values import bind_call, split_call

PROJECTIONS = ("auto", "none", "shared", "per_layer")


class Term(Protocol):
    """What the trainer asks of a term."""

    weight: float
    attention: ClassVar[bool]  # whether it looks at attention

    def bind(self, student: Any, teacher: Any) -> nn.Module | None:
        """Learn the two configs; return what is to be trained beside the student, if anything.

        Raises:
            ValueError: the two do not fit this term.
        """
        ...

    def __call__(
        self,
        student: Captured,
        teacher: Captured,
        tokens: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> Tensor:
        """The term before its weight: a mean over tokens, a sum over layers."""
        ...


@dataclass
class _Hidden:
    """Compares hidden states, layer by layer, the student's through a learned projection.

    ``projection`` is "none"; "shared": one matrix and bias for all layers (TinyBERT's code);
    "per_layer"; or "auto": none where the widths are equal, shared otherwise.
    """

    weight: float = 1.0
    layers: str = "uniform"
    projection: str = "auto"
    attention: ClassVar[bool] = False
    compare: ClassVar[Callable[..., Tensor]] = staticmethod(hidden_mse)

    def bind(self, student: Any, teacher: Any) -> nn.Module | None:
        self.pairs = layer_pairs(self.layers, depth(student), depth(teacher), first=0)
        widths = student.get_text_config().hidden_size, teacher.get_text_config().hidden_size
        kind = self.projection
        if kind == "auto":
            kind = "none" if widths[0] == widths[1] else "shared"
        if kind == "none":
            self.projections = None
            return None
        count = len(self.pairs) if kind == "per_layer" else 1
        self.projections = nn.ModuleList(nn.Linear(*widths) for _ in range(count))
        return self.projections

    def __call__(
        self,
        student: Captured,
        teacher: Captured,
        tokens: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> Tensor:
        total: Any = 0
        for place, (ours, theirs) in enumerate(self.pairs):
            hidden = student.hidden[ours]
            if self.projections is not None:
                hidden = self.projections[place % len(self.projections)](hidden)
            total = total + self.compare(hidden, teacher.hidden[theirs], tokens, normalizer)
        return total


@dataclass
class Cosine(_Hidden):
    """1 - cosine of the last hidden states (DistilBERT)."""

    layers: str = "last"
    compare: ClassVar[Callable[..., Tensor]] = staticmethod(cosine_loss)


@dataclass
class HiddenMSE(_Hidden):
    """Mean squared difference of hidden states (TinyBERT). Layer 0 is the embeddings' output."""


@dataclass
class EmbeddingMSE(_Hidden):
    """Mean squared difference of the embeddings' output, with a projection of its own."""

    layers: str = "0-0"


@dataclass
class _Attention:
    """Compares what two layers' attention computed from, head by head unless ``any_heads``."""

    weight: float = 1.0
    layers: str = "last"
    attention: ClassVar[bool] = True
    any_heads: ClassVar[bool] = False

    def bind(self, student: Any, teacher: Any) -> None:
        if not self.any_heads:
            self._check_heads(student, teacher)
        self.pairs = layer_pairs(self.layers, depth(student), depth(teacher))

    def _check_heads(self, student: Any, teacher: Any) -> None:
        ours, theirs = (c.get_text_config().num_attention_heads for c in (student, teacher))
        if ours != theirs:
            name = next(name for name, kind in TERMS.items() if kind is type(self))
            raise ValueError(
                f"terms: {name} compares head by head, but the student has {ours} heads and the "
                f"teacher {theirs}: use relation_kl."
            )

    def compare(self, s: AttentionStates, t: AttentionStates, tokens: Any, count: Any) -> Tensor:
        """The term at one pair of layers."""
        raise NotImplementedError

    def __call__(
        self, student: Captured, teacher: Captured, tokens: Any, normalizer: Any
    ) -> Tensor:
        total: Any = 0
        for ours, theirs in self.pairs:
            states = student.attention[ours - 1], teacher.attention[theirs - 1]
            total = total + self.compare(*states, tokens, normalizer)
        return total


@dataclass
class AttentionMSE(_Attention):
    """Mean squared difference of attention scores before the softmax (TinyBERT). ``center``
    subtracts each row's mean first, which a softmax does not see."""

    layers: str = "uniform"
    center: bool = True

    def compare(self, s: AttentionStates, t: AttentionStates, tokens: Any, count: Any) -> Tensor:
        return attention_score_mse(s, t, tokens, count, self.center)


@dataclass
class AttentionKL(_Attention):
    """KL of attention distributions (MiniLM)."""

    def compare(self, s: AttentionStates, t: AttentionStates, tokens: Any, count: Any) -> Tensor:
        return attention_kl(s, t, tokens, count)


@dataclass
class RelationKL(_Attention):
    """KL of relations among queries, among keys, among values (MiniLM v2): any heads, any widths.
    ``heads`` relation heads (0: as many as the student has attention heads)."""

    heads: int = 0
    relations: str = "qkv"
    any_heads: ClassVar[bool] = True

    def bind(self, student: Any, teacher: Any) -> None:
        super().bind(student, teacher)
        self.relation_heads = self.heads or student.get_text_config().num_attention_heads

    def compare(self, s: AttentionStates, t: AttentionStates, tokens: Any, count: Any) -> Tensor:
        return relation_kl(s, t, tokens, count, self.relation_heads, self.relations)


TERMS: dict[str, type[Any]] = {
    "cosine": Cosine,
    "hidden_mse": HiddenMSE,
    "embedding_mse": EmbeddingMSE,
    "attention_mse": AttentionMSE,
    "attention_kl": AttentionKL,
    "relation_kl": RelationKL,
}


def parse_term(text: str) -> tuple[str, Term]:
    """Name and object of ``"cosine"``, ``"hidden_mse(weight=0.5, layers=3 6 9 12)"``, ...

    Raises:
        ValueError: not of this form, an unknown name or parameter, or a wrong value.
    """
    name, positional, named = split_call("terms", text, "'cosine' or 'hidden_mse(weight=0.5)'")
    if name not in TERMS:
        near = difflib.get_close_matches(name, TERMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"terms={text!r}: {name!r} is not known{hint} Known: {', '.join(TERMS)}.")
    kinds = {f.name: type(f.default) for f in fields(TERMS[name])}
    order = list(kinds)
    args = [_value(text, kinds.get(key), v) for key, v in zip(order, positional, strict=False)]
    args += positional[len(order) :]  # too many: bind_call says so
    term = bind_call(
        "terms",
        text,
        name,
        TERMS[name],
        args,
        {key: _value(text, kinds.get(key), value) for key, value in named.items()},
    )
    if not 0 <= term.weight < float("inf"):
        raise ValueError(f"terms={text!r}: weight={term.weight}: expected at least 0.")
    if getattr(term, "projection", "auto") not in PROJECTIONS:
        raise ValueError(
            f"terms={text!r}: projection={term.projection!r}: expected one of "
            f"{', '.join(PROJECTIONS)}."
        )
    return name, term


def _value(text: str, kind: type | None, value: str) -> Any:
    truth = {"true": True, "false": False}
    try:
        if kind is bool:
            return truth[value.lower()]
        return value if kind is None else kind(value)
    except (KeyError, ValueError):
        wanted = "true or false" if kind is bool else "a number"
        raise ValueError(f"terms={text!r}: expected {wanted}, not {value!r}.") from None
