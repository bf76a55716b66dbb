"""Students with rounded weights: what they compute, what is saved, and who is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn
from words import V, bert, classifier, gpt2, llama, tokenizer

from fusedkd.cli import main
from fusedkd.errors import UserError
from fusedkd.models.arguments import ModelArguments
from fusedkd.models.proof import NoPlainHead, plain_head
from fusedkd.models.quantised import QUANTISED, SCHEMES, export, fake_quantise

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("one_thread")

GROUP = 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_round_their_weight_and_pass_the_gradient_on(scheme: str) -> None:
    torch.manual_seed(0)
    plain = llama()
    student = copy.deepcopy(plain)
    names = fake_quantise(student, scheme, GROUP)
    assert len(names) == 4 * 7 and not any("lm_head" in name for name in names)
    assert student.state_dict().keys() == plain.state_dict().keys()
    layer = student.get_submodule(names[3])
    weight = layer.weight.detach().double()
    # an identity shows what the layer multiplies by; activations are chosen to be whole steps
    used = layer(torch.eye(layer.in_features)).T.double()
    groups, whole = (x.unflatten(-1, (-1, GROUP)) for x in (used, weight))
    most = 2 ** (int(scheme[3]) - 1)
    scale = whole.abs().amax(-1, keepdim=True) / (most - 0.5)
    steps = groups / scale
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.min() > -most - 1e-4 and steps.max() < most - 1 + 1e-4
    assert ((groups - whole).abs() <= scale * (0.5 + 1e-4)).all()
    x = torch.randint(-128, 128, (5, layer.in_features)) / 64
    x[:, 0], x[:, 1] = -2, 127 / 64
    up = torch.randn(5, layer.out_features)
    layer(x).backward(up)
    apart = (layer.weight.grad - up.T @ x).abs() > 1e-4  # where rounding ends at the largest step
    assert apart.unflatten(-1, (-1, GROUP)).sum(-1).max() <= 1 and apart.float().mean() < 0.1


EXPORTED = [*((scheme, llama) for scheme in SCHEMES), ("int4-int8", bert), ("int4", classifier)]


@pytest.mark.parametrize("scheme, make", EXPORTED)
def test_what_is_saved_computes_what_was_trained(
    scheme: str, make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = make().eval()
    fake_quantise(student, scheme, GROUP)
    student.save_pretrained(tmp_path)
    folder = export(student, tmp_path, scheme, GROUP, tokenizer())
    assert folder == tmp_path / QUANTISED
    loaded = type(student).from_pretrained(folder)
    assert len(tf.AutoTokenizer.from_pretrained(folder)) == V
    ids = torch.randint(5, V, (2, 7))
    assert torch.equal(loaded(input_ids=ids).logits, student(input_ids=ids).logits)
    export(student, tmp_path, scheme, GROUP)  # over an older one
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {QUANTISED}


def test_qad_brings_a_rounded_model_back_to_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = llama()
    source.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i % 60} w{i % 7} w3 " * 9}) + "\n"
                            for i in range(40)))  # fmt: skip

    def run(out: Path, steps: int, *more: Any) -> dict[str, Any]:
        flags = [
            *("--student", tmp_path / "model", "--data", text, "--output_dir", out, *more),
            *("--block_size", 16, "--max_steps", steps, "--use_cpu", "true", "--report_to", "none"),
            *("--save_strategy", "no", "--disable_tqdm", "true", "--learning_rate", "0.003"),
            *("--report_samples", 0, "--eval_share", "0.3"),
        ]
        assert main(["distill", *map(str, flags)]) == 0
        card: dict[str, Any] = json.loads((out / "distillation.json").read_text())
        return card

    out, rounds = tmp_path / "out", ("--quantise", "int2", "--quantise_group", GROUP)
    card = run(out, 40, *rounds)
    assert card["eval_kd"] < 0.6 * card["before"]["eval_kd"]
    assert "int2, 8 weights a scale, in quantised/" in (out / "report.md").read_text()
    # the teacher is the same model, and is not rounded
    plain = run(tmp_path / "plain", 1, "--teacher", tmp_path / "model")
    assert plain["before"]["eval_kd"] == pytest.approx(0, abs=1e-6)
    assert plain["before"]["eval_loss"] == pytest.approx(card["eval_teacher_loss"], rel=1e-6)
    # what is saved is what was judged: where it goes on is where it stopped
    assert tf.LlamaForCausalLM.from_pretrained(out / QUANTISED)
    more = run(tmp_path / "more", 1, "--student", out, "--teacher", tmp_path / "model", *rounds)
    assert more["before"]["eval_loss"] == pytest.approx(card["eval_loss"], rel=1e-6)


def test_a_head_that_rounds_its_weight_is_not_plain() -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    model = llama()
    assert plain_head(model)
    config = QATConfig(IntxWeightOnlyConfig(torch.int8, PerGroup(GROUP)), step="prepare")
    quantize_(model, config, lambda layer, name: name == "lm_head")
    assert isinstance(model.lm_head, nn.Linear)
    with pytest.raises(NoPlainHead, match="quantised or adapted"):
        plain_head(model)


def test_who_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"GPT2LMHeadModel has no linear layers \(torch.nn.Linear\)"
    ):
        fake_quantise(gpt2(), "int4", GROUP)
    with pytest.raises(UserError, match=r"--quantise_group 7: .* has 24 weights a row: expected"):
        fake_quantise(llama(), "int4", 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"quantise": "int5"},
            "--quantise int5: expected one of int2, int3, int4, int8, int4-int8",
        ),
        ({"quantise": "int4", "quantise_group": 0}, "--quantise_group 0: expected"),
        ({"quantise": "int4", "use_peft": True}, "expected neither --use_peft nor"),
        ({"quantise": "int4", "student_load_in_4bit": True}, "expected neither --use_peft nor"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArguments(student="s", **flags)


def test_the_teacher_is_the_student_s_own_source() -> None:
    found = ModelArguments(student="s", student_revision="r", quantise="int4")
    assert (found.teacher, found.teacher_revision) == ("s", "r")
    assert ModelArguments(student="s", teacher="t", quantise="int4").teacher == "t"
    assert ModelArguments(student="s", teacher_cache="c", quantise="int4").teacher is None


def test_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "t.txt").write_text("w1 w2 w3 " * 40)
    flags = ["--student", tmp_path / "adapter", "--quantise", "int4", "--data", tmp_path / "t.txt",
             "--output_dir", tmp_path / "out", "--block_size", 8, "--use_cpu", "true"]  # fmt: skip
    assert main(["distill", *map(str, flags)]) == 2
    assert "an adapter: expected a model" in capsys.readouterr().err
