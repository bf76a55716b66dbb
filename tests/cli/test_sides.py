"""How each side of `fusedkd distill` is read: adapters, quantised weights, heads that were never
saved."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from words import NAMES, SIZES, bert, classifier, llama, tokenizer

from fusedkd.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        saved(tmp_path / name, llama())
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"w{i % 60} w{i % 7} w3 " * 9}) + "\n" for i in range(12))
    )
    return tmp_path


def run(disk: Path, *more: Any, teacher: Any = "teacher", student: Any = "student") -> int:
    flags = [
        *("--teacher", disk / teacher, "--student", disk / student, "--data", disk / "text.jsonl"),
        *("--output_dir", disk / "out", "--block_size", 16, "--max_steps", 3, "--eval_share", 0),
        *("--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"),
        *("--disable_tqdm", "true", "--learning_rate", "0.01", *more),
    ]
    return main(["distill", *map(str, flags)])


def test_lora_trains_adapters_and_goes_on(disk: Path) -> None:
    before = load_file(disk / "student" / "model.safetensors")
    lora = ("--use_peft", "--lora_r", 4, "--lora_alpha", 8, "--lora_target_modules", "q_proj",
            "v_proj", "--gradient_checkpointing", "true")  # fmt: skip
    assert run(disk, *lora) == 0
    out = disk / "out"
    assert not (out / "model.safetensors").exists()
    first = load_file(out / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in first} == {"q_proj", "v_proj"}
    assert any(weight.any() for name, weight in first.items() if "lora_B" in name)
    after = load_file(disk / "student" / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    model = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert model.peft_config["default"].r == 4

    out.rename(disk / "adapter")  # a saved adapter as student, and as teacher
    assert run(disk, student="adapter") == 0
    second = load_file(out / "adapter_model.safetensors")
    assert second.keys() == first.keys()
    assert any(not torch.equal(second[name], first[name]) for name in first)
    assert run(disk, "--output_dir", disk / "other", teacher="adapter") == 0
    assert (disk / "other" / "model.safetensors").exists()


def test_a_classifier_s_adapter_keeps_its_head(disk: Path) -> None:
    rows = [{"text": "w1 w2 w3", "label": NAMES[i % 2]} for i in range(8)]
    (disk / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved(disk / "teacher", classifier())
    saved(disk / "body", tf.BertModel(tf.BertConfig(**SIZES)))
    assert run(disk, "--use_peft", student="body") == 0
    weights = load_file(disk / "out" / "adapter_model.safetensors")
    assert any("classifier" in name for name in weights)
    (disk / "out").rename(disk / "adapter")
    assert run(disk, student="adapter") == 0


BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not BITSANDBYTES, reason="needs bitsandbytes")
def test_qlora(disk: Path) -> None:
    bits = ("--student_load_in_4bit", "--use_peft", "--teacher_load_in_8bit")
    assert run(disk, *bits, "--gradient_checkpointing", "true") == 0
    assert (disk / "out" / "adapter_model.safetensors").exists()


def test_a_teacher_is_placed(disk: Path) -> None:
    more = ("--teacher_device_map", '{"": "cpu"}', "--attn_implementation", "eager")
    assert run(disk, *more) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student_load_in_4bit"], "quantised weights cannot be trained: add --use_peft"),
        (["--student_load_in_4bit", "--student_load_in_8bit"], "expected one"),
        (["--use_peft", "--lora_target_modules", "nothing"], "nothing"),
        (["--use_peft", "--lora_r", "0"], "--lora_r 0"),
        (["--attn_implementation", "x"], "x"),
        (["--teacher_device_map", "{"], "--teacher_device_map"),
        (["--task", "x"], "task='x': expected one of masked, causal"),
        pytest.param(["--teacher_load_in_8bit"], "needs bitsandbytes", marks=pytest.mark.skipif(
            BITSANDBYTES, reason="bitsandbytes is there")),
    ],
)  # fmt: skip
def test_mistakes(
    flags: list[str], message: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(disk, *flags) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1] and "Traceback" not in said


# ---- heads -------------------------------------------------------------------------------------


def without(folder: Path, word: str) -> Path:
    """A model whose config promises weights that are not there."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if word not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bare encoder": (lambda f: saved(f, tf.BertModel(tf.BertConfig(**SIZES))), "BertModel"),
    "pretraining": (
        lambda f: saved(f, tf.BertForPreTraining(tf.BertConfig(**SIZES))), "BertForPreTraining"
    ),
    "no head": (lambda f: without(saved(f, llama()), "lm_head"), "no weights for lm_head.weight"),
    "no transform": (lambda f: without(saved(f, bert()), "transform"), "no weights for cls."),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_no_head_is_made_up(
    kind: str, role: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = KINDS[kind]
    make(disk / "odd")
    if kind != "no head":
        saved(disk / "teacher", bert())
        saved(disk / "student", bert())
    assert run(disk, **{role: "odd"}) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--{role} {disk / 'odd'}" in said and message in said
    assert not (disk / "out").exists()


def test_a_classifier_that_lost_its_head(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A student that was saved as a classifier is one; another model's head is learnt anew."""
    rows = [{"text": "w1 w2 w3", "label": NAMES[i % 2]} for i in range(8)]
    (disk / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved(disk / "teacher", classifier())
    without(saved(disk / "student", classifier()), "classifier")
    assert run(disk) == 2
    assert "no weights for classifier.bias" in capsys.readouterr().err
    saved(disk / "student", bert())
    assert run(disk) == 0


# ---- what examples become ----------------------------------------------------------------------

CLASSES = {0: "O", 1: "PER", 2: "LOC"}


def t5() -> Any:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = tf.T5Config(vocab_size=SIZES["vocab_size"], **small, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config)


def of(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, f"BertFor{kind}")(tf.BertConfig(**SIZES, **more))


EXAMPLES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "words": (of("TokenClassification", id2label=CLASSES),
              {"tokens": ["w1", "w2", "w3"], "ner_tags": ["O", "PER", 2]}, "kd"),
    "pairs": (t5, {"source": "w1 w2 w3", "target": "w4 w5"}, "perplexity"),
    "text and label": (t5, {"text": "w1 w2 w3", "label": "w4 w5"}, "perplexity"),
    "several classes": (of("SequenceClassification", id2label=CLASSES),
                        {"text": "w1 w2", "label": ["PER", "LOC"]}, "student_accuracy"),
    "numbers": (of("SequenceClassification", num_labels=1, problem_type="regression"),
                {"text": "w1 w2", "text_pair": "w3", "label": 2.5}, "mse"),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples_of_every_kind(kind: str, disk: Path) -> None:
    make, row, metric = EXAMPLES[kind]
    (disk / "text.jsonl").write_text((json.dumps(row) + "\n") * 8)
    for seed, role in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        saved(disk / role, make())
    assert run(disk, "--eval_share", 0.5, "--ce_weight", 0.5) == 0
    metrics = json.loads((disk / "out" / "distillation.json").read_text())
    assert f"eval_{metric}" in metrics
    assert ("eval_perplexity" in metrics) == (metric == "perplexity")
    config = tf.AutoConfig.from_pretrained(disk / "out")
    assert config.architectures == [type(make()).__name__]
    assert kind != "several classes" or config.problem_type == "multi_label_classification"


def test_lora_spares_the_head_of_a_token_classifier(disk: Path) -> None:
    make, row, _ = EXAMPLES["words"]
    (disk / "text.jsonl").write_text((json.dumps(row) + "\n") * 8)
    for role in ("teacher", "student"):
        saved(disk / role, make())
    assert run(disk, "--use_peft") == 0
    names = load_file(disk / "out" / "adapter_model.safetensors").keys()
    heads = {name.split("classifier.")[1] for name in names if "classifier." in name}
    assert heads == {"weight", "bias"}


def test_a_word_s_first_token_carries_its_label() -> None:
    from fusedkd.data.labelled import _of_tokens

    found = _of_tokens([None, 0, 0, 1, None], ["ab", "c"], ["PER", 2], {"O": 0, "PER": 1, "L": 2})
    assert found == [-100, 1, -100, 2, -100]
    with pytest.raises(ValueError, match="2 tokens and 1 labels"):
        _of_tokens([None, 0, 1], ["a", "b"], ["PER"], {"PER": 1})


ROWS = [
    ("words", {"tokens": ["w1"], "labels": ["X"]}, "'X'"),
    ("words", {"text": "w1"}, "expected tokens and labels, for token classification"),
    ("pairs", {"text": "w1"}, "expected source and target, for an encoder-decoder"),
    ("numbers", {"text": "w1", "label": "x"}, "expected a number"),
    ("several classes", {"text": "w1", "label": ["X"]}, "'X'"),
]


@pytest.mark.parametrize(("kind", "row", "message"), ROWS)
def test_rows_that_do_not_fit(
    kind: str, row: Any, message: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk / "text.jsonl").write_text(json.dumps(row) + "\n")
    for role in ("teacher", "student"):
        saved(disk / role, EXAMPLES[kind][0]())
    assert run(disk) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
