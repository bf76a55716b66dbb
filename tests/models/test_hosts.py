"""Students and teachers as people have them: adapters, tied and nested models, other devices; and
runs that are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import families as tiny
import processes
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from fusedkd import LMHead, kd_loss
from fusedkd.models.heads import plain_head
from fusedkd.teachers import LiveTeacher


def losses_agree(student: Any, teacher: nn.Module, out: Path, heads: bool) -> None:
    """The trainer's loss and gradients are those of the models' logits."""
    trainer = tiny.trainer(student, teacher, out, kd_weight=1.0, ce_weight=0.0)
    assert (trainer._student_head.found is not None) == heads
    data = tiny.batch(tiny.rows())
    loss = trainer.compute_loss(trainer.model, dict(data))
    loss.backward()
    found = tiny.gradients(student)
    student.zero_grad()
    labels = F.pad(data["labels"], (0, 1), value=-100)[..., 1:]
    logits = [model(data["input_ids"]).logits for model in (student, teacher)]
    want = kd_loss(logits[0], logits[1].detach(), labels, temperature=2.0, backend="reference")
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    tiny.assert_same(found, tiny.gradients(student), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options, heads",
    [
        ({"target_modules": ["q_proj", "v_proj"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),  # more than a product: dense logits
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
)
def test_lora(options: dict[str, Any], heads: bool, tmp_path: Path) -> None:
    config = LoraConfig(**options, r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    student = get_peft_model(tiny.build("llama", 1), config)
    losses_agree(student, tiny.build("llama", 2), tmp_path, heads)


@pytest.mark.parametrize("side", [0, 1])
def test_prompt_tuning_adds_no_answers(side: int, tmp_path: Path) -> None:
    """Its virtual tokens are before the others, on either side."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    pair: list[Any] = [tiny.build("llama", 1), tiny.build("llama", 2)]
    pair[side] = get_peft_model(pair[side], config).eval()
    trainer = tiny.trainer(*pair, tmp_path, kd_weight=1.0, ce_weight=0.0)
    data = tiny.batch(tiny.rows())
    found = trainer.compute_loss(trainer.model, dict(data))
    labels = F.pad(data["labels"], (0, 1), value=-100)[..., 1:]
    logits = [model(input_ids=data["input_ids"]).logits[:, -12:] for model in pair]
    want = kd_loss(logits[0], logits[1].detach(), labels, temperature=2.0, backend="reference")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_tied_embeddings(tmp_path: Path) -> None:
    student = tiny.build("llama", 1, tie_word_embeddings=True)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    losses_agree(student, tiny.build("llama", 2), tmp_path, heads=True)


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def nested(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "llava":
        vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
        text = {**tiny.DECODER, "model_type": "llama"}
        config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
        return tf.LlavaForConditionalGeneration(config)
    text = {**tiny.DECODER, "head_dim": 8, "final_logit_softcapping": 0.5}
    tokens = {"boi_token_index": 4, "eoi_token_index": 5, "image_token_index": 6}
    config = tf.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens
    )
    return tf.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_nested_configs(kind: str, tmp_path: Path) -> None:
    """A vision-language student and teacher, on text."""
    student, teacher = nested(kind, 1).eval(), nested(kind, 2).eval()
    assert plain_head(student).softcap is None
    losses_agree(student, teacher, tmp_path, heads=True)


def test_a_teachers_head_is_copied_once() -> None:
    teacher = LiveTeacher(tiny.build("llama", 2).eval())
    head = teacher({"input_ids": tiny.batch(tiny.rows())["input_ids"]})
    assert isinstance(head, LMHead)
    there = torch.device("meta")
    moved = [teacher._here(head, there) for _ in range(2)]
    assert moved[0].hidden.device == moved[0].weight.device == there
    assert moved[0].weight is moved[1].weight and moved[0].hidden is not moved[1].hidden
    assert teacher._here(head, head.hidden.device) is head


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    """kill -9 of one of two processes; the curve goes on as if nothing had happened."""
    with pytest.raises(AssertionError, match=f"exit codes .*{-signal.SIGKILL}"):
        processes.run("workers_resume.py", "killed", 2, tmp_path / "1", tmp_path / "run")
    assert "checkpoint-4" in os.listdir(tmp_path / "run")
    results = processes.run("workers_resume.py", "resumed", 2, tmp_path / "2", tmp_path / "run")
    for got, want in results:
        assert len(want) == 8 and got == want
