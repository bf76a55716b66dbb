"""Losses on hidden states and attention, and what is captured for them from real architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.nn import functional as F

from fusedkd.features import (
    AttentionStates,
    attention_kl,
    attention_score_mse,
    cosine_loss,
    hidden_mse,
    relation_kl,
)
from fusedkd.models.capture import Captured, _attention, capture, expose_attention

pytestmark = pytest.mark.usefixtures("one_thread")

V, LAYERS = 67, 3
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 2}


def build(kind: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    makers = {
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
        "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**SIZES, embedding_size=8)),
        "distilbert": lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(
                vocab_size=V, dim=16, hidden_dim=24, n_layers=LAYERS, n_heads=4, pad_token_id=0
            )
        ),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=V, n_embd=16, n_layer=LAYERS, n_head=4, initializer_range=0.3)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GQA, head_dim=8)),
        "gemma3": lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                **GQA, head_dim=8, query_pre_attn_scalar=3, sliding_window=4,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        ),
        "modernbert": lambda: tf.ModernBertForMaskedLM(
            tf.ModernBertConfig(
                **SIZES, cls_token_id=1, sep_token_id=2, local_attention=4,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
            )
        ),
    }  # fmt: skip
    return makers[kind]().eval()


KINDS = ["bert", "albert", "distilbert", "gpt2", "llama", "qwen3", "gemma3", "modernbert"]


def padded(pad: int = 0) -> dict[str, Tensor]:
    """Two sequences of 9 and 6 tokens, and ``pad`` more columns of padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, V, (2, 9 + pad), generator=generator)
    mask = torch.zeros_like(ids)
    mask[0, :9], mask[1, :6] = 1, 1
    ids[0, :9] = torch.arange(10, 19)
    ids[1, :6] = torch.arange(40, 46)
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, inputs: dict[str, Tensor]) -> Captured:
    expose_attention(model)
    with capture(model, attention=True) as seen:
        model(**inputs)
    return seen


# ---- what is captured --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", [False, True])
def test_captured_scores_are_those_of_eager_attention(kind: str, pad: bool) -> None:
    model, inputs = build(kind), padded()
    if not pad:
        inputs = {"input_ids": inputs["input_ids"]}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**inputs, output_attentions=True, output_hidden_states=True)
        seen = run(model, inputs)
    assert len(eager.attentions) == len(seen.attention) == LAYERS
    real = inputs.get("attention_mask", torch.ones(2, 9))[:, None, :, None].bool()
    for theirs, states in zip(eager.attentions, seen.attention, strict=True):
        ours = states.scores().masked_fill(~states.pairs(), -torch.inf).softmax(-1)
        torch.testing.assert_close(
            ours.where(real, 0.0), theirs.where(real, 0.0), rtol=0, atol=1e-6
        )
    for theirs, ours in zip(eager.hidden_states, seen.hidden, strict=True):
        torch.testing.assert_close(
            ours.where(real[:, 0], 0.0), theirs.where(real[:, 0], 0.0), rtol=1e-4, atol=1e-5
        )


def test_capture_ends_and_leaves_the_model_as_it_was() -> None:
    model, inputs = build("llama"), padded()
    seen = run(model, inputs)
    assert model(**inputs).hidden_states is None
    assert len(seen.attention) == LAYERS
    assert "fusedkd" not in model.config.to_json_string()


def test_a_wrong_number_of_captures_raises() -> None:
    model, inputs = build("bert"), padded()
    wrong = pytest.raises(RuntimeError, match="0 layers of BertForMaskedLM")
    with wrong, capture(model, attention=True):  # never exposed: it attends through plain sdpa
        model(**inputs)
    expose_attention(model)
    model.config.num_hidden_layers += 1
    wrong = pytest.raises(RuntimeError, match=f"expected {LAYERS + 2}")
    with wrong, capture(model):
        model(**inputs)


def test_attention_that_cannot_be_seen_is_refused() -> None:
    """Soft-capped scores, and attention sinks: a softmax of what is written down is not theirs."""
    with pytest.raises(ValueError, match="attention terms"):
        expose_attention(tf.Gemma2ForCausalLM(tf.Gemma2Config(**GQA, head_dim=8)))
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="s_aux"), capture(build("bert"), attention=True):
        _attention(build("bert"), x, x, x, None, s_aux=torch.zeros(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_come_through_checkpointed_layers_or_an_error(reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = build("llama")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()  # no dropout in it
        if checkpointed and reentrant:
            model.enable_input_require_grads()
            with pytest.raises(RuntimeError, match="use_reentrant"):
                run(model, padded())
            return
        sum(s.scores().square().mean() for s in run(model, padded()).attention).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


# ---- the losses --------------------------------------------------------------------------------

Loss = Callable[..., Tensor]
LOSSES: dict[str, tuple[Loss, str]] = {
    "cosine": (cosine_loss, "hidden"),
    "hidden_mse": (hidden_mse, "hidden"),
    "score_mse": (attention_score_mse, "attention"),
    "raw_score_mse": (lambda *a: attention_score_mse(*a, center=False), "attention"),
    "attention_kl": (attention_kl, "attention"),
    "relation_kl": (lambda *a: relation_kl(*a, heads=2), "attention"),
}


def loss_of(name: str, student: Captured, teacher: Captured, *rest: Any) -> Tensor:
    function, part = LOSSES[name]
    ours, theirs = getattr(student, part), getattr(teacher, part)
    return torch.stack([function(s, t, *rest) for s, t in zip(ours, theirs, strict=True)]).sum()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "gemma3"])
def test_equal_models_lose_nothing_and_others_do(name: str, kind: str) -> None:
    inputs = padded()
    tokens = inputs["attention_mask"].bool()
    student, same, other = (run(build(kind, seed), inputs) for seed in (1, 1, 2))
    assert abs(loss_of(name, student, same, tokens).item()) < 1e-6
    assert loss_of(name, student, other, tokens).item() > 1e-4


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_padding_changes_neither_loss_nor_gradient(name: str, kind: str) -> None:
    results = []
    for pad in (0, 5):
        inputs = padded(pad)
        student, teacher = build(kind, 1), build(kind, 2)
        loss = loss_of(
            name, run(student, inputs), run(teacher, inputs), inputs["attention_mask"].bool()
        )
        loss.backward()
        results.append((loss, {n: p.grad for n, p in student.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-7)
    for parameter, grad in results[0][1].items():
        if grad is not None:
            found = results[1][1][parameter]
            torch.testing.assert_close(found[: len(grad)], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up(name: str) -> None:
    """With the whole batch's tokens as normalizer, sequences one by one make the same loss."""
    student, teacher = build("bert", 1), build("bert", 2)
    whole = padded()
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(2)]
    total = whole["attention_mask"].sum()

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        tokens = inputs["attention_mask"].bool()
        return loss_of(name, run(student, inputs), run(teacher, inputs), tokens, total)

    expected = loss_of(
        name, run(student, whole), run(teacher, whole), whole["attention_mask"].bool()
    )
    torch.testing.assert_close(loss(parts[0]) + loss(parts[1]), expected, rtol=1e-5, atol=1e-7)


def states(seed: int, heads: int = 4, d: int = 5, length: int = 7, **more: Any) -> AttentionStates:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, length, d, generator=g, dtype=torch.float64) for _ in range(3))
    return AttentionStates(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), **more)


def test_score_mse_by_hand() -> None:
    s, t = states(1, causal=True), states(2, causal=True, scaling=0.1)
    raw, centred = [], []
    for b in range(2):
        for row in range(7):
            for h in range(4):
                gap = (
                    s.key[b, h, : row + 1] @ s.query[b, h, row] / 5**0.5
                    - 0.1 * t.key[b, h, : row + 1] @ t.query[b, h, row]
                )
                raw.append(gap.square().mean())
                centred.append((gap - gap.mean()).square().mean())
    torch.testing.assert_close(
        attention_score_mse(s, t, center=False), torch.stack(raw).mean(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        attention_score_mse(s, t), torch.stack(centred).mean(), rtol=1e-12, atol=0
    )


def test_relation_kl_by_hand_between_different_heads_and_widths() -> None:
    s, t = states(1), states(2, heads=2, d=20)
    expected = torch.zeros((), dtype=torch.float64)
    for name in ("query", "key", "value"):
        logits = []
        for side, width in ((s, 20), (t, 40)):
            x = getattr(side, name).transpose(1, 2).reshape(2, 7, 2, width // 2).transpose(1, 2)
            logits.append((x @ x.transpose(-1, -2) / (width // 2) ** 0.5).log_softmax(-1))
        expected = expected + F.kl_div(*logits, reduction="sum", log_target=True) / (2 * 2 * 7)
    loss = relation_kl(s, t, heads=2)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (s.query, s.key, s.value))
    assert t.query.grad is None


def test_a_row_s_constant_is_not_compared_unless_asked() -> None:
    s = states(1)
    assert s.query.shape == s.key.shape
    shifted = AttentionStates(s.query, s.key + 0.7, s.value)  # adds q . 0.7 to each row
    assert attention_score_mse(s, shifted).item() < 1e-12
    assert attention_score_mse(s, shifted, center=False).item() > 1e-2


def test_additive_masks_hide_and_bias() -> None:
    s = states(1)
    bias = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    bias[..., 2], bias[..., 5] = 1.5, torch.finfo(torch.float64).min
    masked = AttentionStates(s.query, s.key, s.value, mask=bias)
    assert masked.pairs().sum().item() == 42
    torch.testing.assert_close(masked.scores()[..., 2], s.scores()[..., 2] + 1.5)


def test_nothing_counts_is_zero_with_a_graph() -> None:
    s, t, none = states(1), states(2), torch.zeros(2, 7, dtype=torch.bool)
    for loss in (attention_score_mse(s, t, none), attention_kl(s, t, none)):
        loss.backward()
        assert loss.item() == 0 and s.query.grad is not None and not s.query.grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_kl(states(1), states(2, heads=2)), "relation_kl"),
        (lambda: attention_score_mse(states(1), states(2, heads=2)), "heads"),
        (lambda: relation_kl(states(1), states(2), heads=3), "heads=3"),
        (lambda: relation_kl(states(1), states(2), relations="qx"), "qx"),
        (lambda: cosine_loss(torch.ones(1, 2, 3), torch.ones(1, 2, 4)), "shape"),
        (lambda: hidden_mse(torch.ones(1, 2, 3), torch.ones(1, 2, 4)), "projection"),
    ],
)
def test_mismatches_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
