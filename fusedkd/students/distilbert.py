"""A DistilBERT of a BERT (Sanh et al. 2019, arXiv 1910.01108, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
_MASKED_LM_HEAD = {
    "transform.dense": "vocab_transform",
    "transform.LayerNorm": "vocab_layer_norm",
    "decoder": "vocab_projector",
}
_SIBLINGS = {
    "BertModel": "DistilBertModel",
    "BertForMaskedLM": "DistilBertForMaskedLM",
    "BertForPreTraining": "DistilBertForMaskedLM",
    "BertForSequenceClassification": "DistilBertForSequenceClassification",
    "BertForTokenClassification": "DistilBertForTokenClassification",
    "BertForQuestionAnswering": "DistilBertForQuestionAnswering",
}
_EPS = 1e-12  # written into DistilBERT's code


@torch.no_grad()
def distilbert_of(teacher: Any, chosen: list[int]) -> Any:
    """A DistilBERT with these of the teacher's layers, and its embeddings and masked-LM head.

    DistilBERT has no token types, so row 0 of the teacher's is added to every position: with all of
    its layers the student's logits are then the teacher's, for text of one segment. It has no
    pooler either: a classifier's head starts anew.

    Raises:
        ValueError: not a BERT, or one whose LayerNorm DistilBERT cannot have.
    """
    sibling = _SIBLINGS.get(type(teacher).__name__)
    if sibling is None:
        raise ValueError(
            f"to='distilbert' of a {type(teacher).__name__}: expected {', '.join(_SIBLINGS)}."
        )
    if teacher.config.layer_norm_eps != _EPS:
        raise ValueError(
            f"to='distilbert': its LayerNorms have eps {_EPS}, the teacher's have "
            f"{teacher.config.layer_norm_eps}. Keep the architecture (to='same')."
        )
    config = _config(teacher.config, len(chosen))
    student = getattr(transformers, sibling)._from_config(config, dtype=teacher.dtype)
    _encoder(getattr(student, "distilbert", student), getattr(teacher, "bert", teacher), chosen)
    if hasattr(student, "vocab_projector"):
        _load(student, teacher.cls.predictions, _MASKED_LM_HEAD)
        student.tie_weights()
    elif hasattr(student, "qa_outputs"):
        student.qa_outputs.load_state_dict(teacher.qa_outputs.state_dict())
    return student


def _config(bert: Any, layers: int) -> Any:
    return transformers.DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        n_layers=layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act,
        initializer_range=bert.initializer_range,
        pad_token_id=bert.pad_token_id,
        tie_word_embeddings=bert.tie_word_embeddings,
        id2label=bert.id2label,
        label2id=bert.label2id,
        problem_type=bert.problem_type,
    )


def _encoder(student: Any, teacher: Any, chosen: list[int]) -> None:
    ours, theirs = student.embeddings, teacher.embeddings
    ours.word_embeddings.weight.copy_(theirs.word_embeddings.weight)
    ours.position_embeddings.weight.copy_(
        theirs.position_embeddings.weight + theirs.token_type_embeddings.weight[0]
    )
    ours.LayerNorm.load_state_dict(theirs.LayerNorm.state_dict())
    for layer, origin in zip(student.transformer.layer, chosen, strict=True):
        _load(layer, teacher.encoder.layer[origin], _LAYER)


def _load(target: Any, source: Any, names: dict[str, str]) -> None:
    for theirs, ours in names.items():
        target.get_submodule(ours).load_state_dict(source.get_submodule(theirs).state_dict())
