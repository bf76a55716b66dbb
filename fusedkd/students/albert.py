"""An ALBERT-style student of a BERT (Lan et al. 2020, arXiv 1909.11942): few layers' weights,
applied over and over, and a table of words that is narrower than the model.

**Embeddings.** With the rows of words, positions and token types centred (LayerNorm subtracts the
mean anyway), the words' table has the best approximation of rank E - 1 from its singular value
decomposition, V_k its directions. Written in an orthonormal basis C of the E - 1 dimensions that
are orthogonal to (1, ..., 1), such rows have mean 0 in E dimensions too, so ALBERT's LayerNorm in E
dimensions divides by the same standard deviation as BERT's in H, but for a factor sqrt(E / H). That
factor and BERT's gain go into the mapping from E to H, and BERT's shift into its bias: at E = H
nothing is lost, and the layers receive what BERT's do.

**Layers.** A group starts from the mean of the teacher's layers that it stands for, or from one.

**Head.** Its nonlinearity works in E dimensions, where BERT's works in H: no start is exact. It
gets BERT's transform, turned into the E dimensions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor

from fusedkd.models.layers import pick_layers

_LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention.LayerNorm",
    "intermediate.dense": "ffn",
    "output.dense": "ffn_output",
    "output.LayerNorm": "full_layer_layer_norm",
}
_SIBLINGS = {
    "BertModel": "AlbertModel",
    "BertForMaskedLM": "AlbertForMaskedLM",
    "BertForPreTraining": "AlbertForMaskedLM",
    "BertForSequenceClassification": "AlbertForSequenceClassification",
    "BertForTokenClassification": "AlbertForTokenClassification",
    "BertForQuestionAnswering": "AlbertForQuestionAnswering",
}


@torch.no_grad()
def albert_of(teacher: Any, layers: int, groups: int, embedding: int | None, layer_map: str) -> Any:
    """An ALBERT of ``layers`` applications of ``groups`` layers with weights.

    Args:
        embedding: E, the width of the tables, 2 to the teacher's H; None: 128, or H if that is
            less.
        layer_map: ``"average"`` or ``"spaced"``, the default of other students (either: each group
            is the mean of its stretch of the teacher), or one teacher layer per group:
            ``"first"``, ``"last"``, ``"0,6"``.

    Raises:
        ValueError: not a BERT, or numbers that do not fit it.
    """
    sibling, bert = _SIBLINGS.get(type(teacher).__name__), teacher.config
    if sibling is None:
        raise ValueError(
            f"to='albert' of a {type(teacher).__name__}: expected {', '.join(_SIBLINGS)}."
        )
    if layers < 1 or not 1 <= groups <= min(layers, bert.num_hidden_layers):
        raise ValueError(
            f"layers={layers}, groups={groups}: expected at least 1, no more groups than layers, "
            f"and no more than the teacher's {bert.num_hidden_layers}."
        )
    embedding = min(128, bert.hidden_size) if embedding is None else embedding
    if not 2 <= embedding <= bert.hidden_size:
        raise ValueError(
            f"embedding={embedding}: expected 2 to {bert.hidden_size}, the teacher's width."
        )
    config = _config(bert, layers, groups, embedding)
    student = getattr(transformers, sibling)._from_config(config, dtype=teacher.dtype)
    inner, theirs = getattr(student, "albert", student), getattr(teacher, "bert", teacher)
    basis = _embeddings(inner, theirs.embeddings)
    for group, origins in zip(
        inner.encoder.albert_layer_groups, _origins(layer_map, groups, bert), strict=True
    ):
        _average(group.albert_layers[0], [theirs.encoder.layer[i] for i in origins])
    _heads(student, inner, teacher, theirs, basis)
    return student


def _config(bert: Any, layers: int, groups: int, embedding: int) -> Any:
    return transformers.AlbertConfig(
        embedding_size=embedding,
        num_hidden_layers=layers,
        num_hidden_groups=groups,
        classifier_dropout_prob=bert.classifier_dropout or bert.hidden_dropout_prob,
        **{
            name: getattr(bert, name)
            for name in (
                "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
                "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob",
                "max_position_embeddings", "type_vocab_size", "initializer_range",
                "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
                "tie_word_embeddings", "id2label", "label2id", "problem_type",
            )
        },
    )  # fmt: skip


def _origins(layer_map: str, groups: int, bert: Any) -> list[list[int]]:
    total = bert.num_hidden_layers
    if layer_map in ("average", "spaced"):
        ends = [round(g * total / groups) for g in range(groups + 1)]
        return [list(range(a, b)) for a, b in pairwise(ends)]
    return [[layer] for layer in pick_layers(layer_map, groups, total)]


def _embeddings(student: Any, theirs: Any) -> Tensor:
    """Fill the tables and the mapping; returns the (H, E) directions of the E dimensions."""
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    centred = {name: _centred(getattr(theirs, name).weight) for name in tables}
    width = student.embeddings.LayerNorm.normalized_shape[0]
    # of the words' H x H Gram matrix, in fp64: the same directions as of the V x H table
    words = centred["word_embeddings"]
    directions = torch.linalg.eigh(words.T @ words).eigenvectors.flip(1)[:, : width - 1]
    basis = directions @ _orthogonal_to_ones(width, words).T  # (H, E)
    for name, rows in centred.items():
        getattr(student.embeddings, name).weight.copy_(rows @ basis)
    norm, mapping = theirs.LayerNorm, student.encoder.embedding_hidden_mapping_in
    factor = (basis.shape[0] / width) ** 0.5
    mapping.weight.copy_(norm.weight.double()[:, None] * basis * factor)
    mapping.bias.copy_(norm.bias)
    return basis


def _centred(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows - rows.mean(-1, keepdim=True)


def _orthogonal_to_ones(width: int, like: Tensor) -> Tensor:
    """(E, E - 1), orthonormal columns that each sum to 0."""
    square = torch.eye(width, dtype=like.dtype, device=like.device)
    square[:, 0] = 1.0
    return torch.linalg.qr(square).Q[:, 1:]


def _average(target: Any, sources: list[Any]) -> None:
    for theirs, ours in _LAYER.items():
        modules = [source.get_submodule(theirs) for source in sources]
        for name, value in target.get_submodule(ours).named_parameters():
            value.copy_(torch.stack([m.get_parameter(name) for m in modules]).mean(0))


def _heads(student: Any, inner: Any, teacher: Any, theirs: Any, basis: Tensor) -> None:
    if getattr(inner, "pooler", None) is not None and theirs.pooler is not None:
        inner.pooler.load_state_dict(theirs.pooler.dense.state_dict())
    if hasattr(student, "predictions"):
        head, dense = teacher.cls.predictions, teacher.cls.predictions.transform.dense
        student.predictions.dense.weight.copy_(basis.T @ dense.weight.double())
        student.predictions.dense.bias.copy_(basis.T @ dense.bias.double())
        student.predictions.bias.copy_(head.bias)
        student.tie_weights()
    for name in ("classifier", "qa_outputs"):
        if hasattr(student, name):
            getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
