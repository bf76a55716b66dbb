"""Students that need more than labels and logits: mixtures of experts, encoder-decoders."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import byte_llama
import families as tiny
import mixin_hosts as mixin
import pytest
import torch
import transformers as tf
import trl
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from fusedkd.integrations.transformers import DistillationMixin

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
T5 = {"vocab_size": tiny.V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0}
PAIR = {"vocab_size": tiny.V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
PAIR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
PAIR |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2}
PAIR |= {"pad_token_id": 1, "max_position_embeddings": 32}
NLLB = {"num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1}


def build(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    makers = {
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**tiny.DECODER, **EXPERTS, router_aux_loss_coef=0.5)
        ),
        "jetmoe": lambda: tf.JetMoeForCausalLM(
            tf.JetMoeConfig(**tiny.DECODER, **EXPERTS, aux_loss_coef=0.5, kv_channels=8)
        ),
        "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(
                **T5,
                num_layers=2,
                num_decoder_layers=2,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
                num_experts=4,
                expert_capacity=64,
                router_aux_loss_coef=0.5,
                router_z_loss_coef=0.3,
            )
        ),
        "nllb": lambda: tf.NllbMoeForConditionalGeneration(
            tf.NllbMoeConfig(**PAIR, **NLLB, output_router_logits=True)
        ),
        "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, num_layers=1)),
        "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIR)),
        "m2m": lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**PAIR)),
    }
    model = makers[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def expected(student: Any, teacher: Any, data: Any, causal: bool) -> Any:
    """KL, and what the student adds to its own cross-entropy."""
    asked = {k: v for k, v in data.items() if k != "output_router_logits"}
    ours, theirs = student(**data), teacher(**asked)
    labels = mixin.shifted(data["labels"]) if causal else data["labels"]
    ce = F.cross_entropy(ours.logits[labels != -100], labels[labels != -100])
    return mixin.kl(ours.logits, theirs.logits, labels) + (ours.loss - ce).detach()


@pytest.mark.parametrize("host", ["mixin", "trainer"])
@pytest.mark.parametrize("kind", ["mixtral", "jetmoe", "switch"])
def test_routers_are_trained_as_without_distillation(kind: str, host: str, tmp_path: Path) -> None:
    causal = kind != "switch"
    student, teacher = build(kind, 1), tiny.build("llama", 2) if causal else build("t5", 2)
    tested = mixin.trainer(host, student, teacher, tmp_path)
    data = tiny.batch(tiny.rows())
    plain = expected(student, teacher, data, causal)
    if kind == "switch":  # takes it from nowhere else
        data |= {"output_router_logits": True}
    want = expected(student, teacher, data, causal)
    assert (want - plain > 0.1) == (kind == "switch")
    for dense in (False, True):
        loss = tested.compute_loss(student, dict(data), return_outputs=dense)
        mixin.close(loss[0] if dense else loss, want)
    tested.compute_loss(student, dict(data)).backward()
    routers = [
        p.grad for name, p in student.named_parameters() if "router" in name or "gate" in name
    ]
    assert all(grad is not None and grad.any() for grad in routers)


@pytest.mark.parametrize("host", ["mixin", "trainer"])
def test_routers_over_micro_batches(host: str, tmp_path: Path) -> None:
    """Equal rows, so that the mean over micro-batches is the batch's."""
    rows = tiny.rows(1) * 4
    models = build("mixtral", 1), tiny.build("llama", 2)
    want = expected(*models, tiny.batch(rows), causal=True).item()
    for size in (4, 2, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        tested = mixin.trainer(host, *models, tmp_path, data=rows, learning_rate=0.0, **options)
        assert mixin.losses(tested) == pytest.approx([want], rel=1e-4)


class Sft(DistillationMixin, trl.SFTTrainer):
    pass


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_sft_trainer_weighs_routers_by_its_own(coefficient: float, tmp_path: Path) -> None:
    """It writes its coefficient into the config, which the model has read already."""
    student, teacher = build("mixtral", 1), tiny.build("llama", 2)
    data = {k: v[:, :12] for k, v in tiny.batch(tiny.rows()).items()}
    outputs = student(**data)
    want = mixin.kl(outputs.logits, teacher(**data).logits, mixin.shifted(data["labels"]))
    tokenizer = byte_llama.tokenizer()
    args = trl.SFTConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        router_aux_loss_coef=coefficient, gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [3, 4, 5]}])
    trainer = Sft(student, args, train_dataset=rows, processing_class=tokenizer)
    trainer.distil_from(teacher)
    student.eval()
    mixin.close(trainer.compute_loss(student, dict(data)), want + coefficient * outputs.aux_loss)


def test_routers_whose_loss_is_not_to_be_had_are_refused() -> None:
    student, teacher = build("nllb", 1), build("m2m", 2)
    tested = mixin.trainer("mixin", student, teacher, Path(tempfile.mkdtemp()))
    with pytest.raises(ValueError, match=r"output_router_logits=True: NllbMoe.*expected .*=False"):
        tested.compute_loss(student, tiny.batch(tiny.rows()))


@pytest.mark.parametrize("host", ["mixin", "trainer"])
@pytest.mark.parametrize("kind", ["t5", "bart", "m2m"])
def test_a_decoder_gets_its_inputs(kind: str, host: str, tmp_path: Path) -> None:
    """From labels, as the model's own forward makes them, where the collator made none."""
    student, teacher = build(kind, 1), build(kind, 2)
    options = {"host": mixin.Seq2Seq} if host == "mixin" else {}
    tested = mixin.trainer(host, student, teacher, tmp_path, **options)
    data = tiny.batch(tiny.rows())
    want = expected(student, teacher, data, causal=False)
    mixin.close(tested.compute_loss(student, dict(data)), want)
    given = data | {"decoder_input_ids": data["input_ids"]}
    s, t = (model(**given).logits for model in (student, teacher))
    mixin.close(tested.compute_loss(student, dict(given)), mixin.kl(s, t, data["labels"]))
