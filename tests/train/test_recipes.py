"""Every recipe trains a tiny random model from the command line, stops, goes on and can be loaded;
and the data it trains on: masking, the student's own text, examples of classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor
from words import (
    NAMES,
    SPECIAL,
    WORDS,
    V,
    albert,
    bert,
    classifier,
    gpt2,
    llama,
    rows,
    tokenizer,
)

from fusedkd import kd_loss
from fusedkd.cli import main
from fusedkd.data.masking import FrequencyMasking, count_tokens
from fusedkd.data.text import load_documents
from fusedkd.train import DistillationArguments, DistillationTrainer
from fusedkd.train.on_policy import OnPolicy, _batch

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).parents[2] / "recipes"


NARROW = ["--layers", "2", "--hidden", "12", "--intermediate", "16"]
# recipe: the teacher, the flags of `fusedkd student`, what distillation is told on top
CASES: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "hinton": (llama, ["--layers", "2"], []),
    "hinton, classifier": (classifier, ["--layers", "2"], []),
    "distilbert": (bert, ["--to", "distilbert", "--layers", "2"], []),
    "distilgpt2": (gpt2, ["--layers", "2"], []),
    "tinybert_general": (bert, NARROW, []),
    "tinybert_task": (classifier, NARROW, []),
    "albert": (bert, ["--to", "albert", "--layers", "3", "--embedding", "8"], []),
    "albert, as teacher": (albert, ["--layers", "2"], []),
    "minilm": (bert, NARROW, []),
    "gkd": (llama, ["--layers", "2"], ["--on_policy_new_tokens", "5"]),
    "distillm": (llama, ["--layers", "2"], []),
    "minillm": (gpt2, ["--layers", "2"], ["--on_policy_new_tokens", "5"]),
    "opd": (llama, ["--layers", "2"], ["--on_policy_new_tokens", "5"]),
    "abkd": (llama, ["--layers", "2"], []),
    "alm": (llama, ["--layers", "2"], ["--cross_tokenizer", "both"]),
    "minitron": (llama, ["--layers", "2", "--map", "first"], []),
    "lora": (llama, ["--layers", "2"], ["--learning_rate", "0.01"]),
    "qad": (llama, ["--layers", "2"], ["--quantise_group", "4"]),
}


MASKED = ("distilbert", "albert", "albert, as teacher")


def test_every_recipe_is_tried() -> None:
    assert {case.split(",")[0] for case in CASES} == {path.stem for path in RECIPES.glob("*.yaml")}


def write_data(folder: Path, labelled: bool) -> Path:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=n)) for n in generator.integers(20, 60, 40)]
    path = folder / "data.jsonl"
    rows = [
        {"text": t} | ({"label": NAMES[i % 2]} if labelled else {}) for i, t in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_trains_stops_goes_on_and_loads(case: str, tmp_path: Path) -> None:
    make, student, more = CASES[case]
    if case == "qad":
        pytest.importorskip("torchao")
    torch.manual_seed(1)
    teacher = make()
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    made = ["student", "--from", str(tmp_path / "teacher"), "--output", str(tmp_path / "student")]
    assert main([*made, *student]) == 0
    out, recipe = tmp_path / "out", RECIPES / f"{case.split(',')[0]}.yaml"
    theirs = [] if case == "qad" else ["--teacher", str(tmp_path / "teacher")]
    command = [
        "distill", "--config", str(recipe), *theirs,
        "--student", str(tmp_path / "student"), "--output_dir", str(out),
        "--data", str(write_data(tmp_path, make is classifier)),
        "--block_size", "16", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--max_steps", "4", "--save_strategy", "steps",
        "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps",
        "1", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", *more,
    ]  # fmt: skip
    assert main(command) == 0
    weights = out / f"{'adapter_' * (case == 'lora')}model.safetensors"
    whole = load_file(weights)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert all(np.isfinite(e["loss"]) for e in history if "loss" in e)
    assert any("eval_loss" in e for e in history)

    shutil.rmtree(out / "checkpoint-4")
    weights.unlink()
    assert main([*command, "--resume_from_checkpoint", "last"]) == 0
    resumed = load_file(weights)
    assert resumed.keys() == whole.keys() and not any("fusedkd" in name for name in whole)
    if case not in MASKED:  # masks are drawn ahead, so other ones than those of a whole run
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    auto = {"classifier": tf.AutoModelForSequenceClassification, "llama": tf.AutoModelForCausalLM,
            "gpt2": tf.AutoModelForCausalLM}  # fmt: skip
    loaded = auto.get(make.__name__, tf.AutoModelForMaskedLM).from_pretrained(out)
    start = load_file(tmp_path / "student" / "model.safetensors")
    start |= {n: torch.zeros_like(p) for n, p in loaded.state_dict().items() if "lora_B" in n}
    moved = [n for n, p in loaded.state_dict().items() if n in start and not p.equal(start[n])]
    assert case != "lora" or all("lora_B" in name for name in moved), moved
    assert moved, "nothing was learnt"


def test_the_default_text_is_there() -> None:
    documents = load_documents(["stdlib"])
    assert len(documents) > 200 and sum(map(len, documents["text"])) > 1_000_000


def test_hinton_s_law_of_large_temperatures(backend: str, device: torch.device) -> None:
    """Section 2.1: the soft gradient, times T^2, comes to (s - t) / V, each centred. What is
    missing is of the order of the logits over T."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 200, generator=generator).double().to(device) / 2 for _ in range(2))
    expected = ((s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))) / 200
    s.requires_grad_()

    def gradient(temperature: float, **keywords: Any) -> Tensor:
        loss = kd_loss(s, t, temperature=temperature, reduction="sum", backend=backend, **keywords)
        return torch.autograd.grad(loss, s)[0]

    missing = [(gradient(t_) - expected).norm() / expected.norm() for t_ in (50.0, 500.0)]
    assert missing[0] < 0.01 and missing[1] < 0.11 * missing[0]
    unscaled = gradient(50.0, scale_by_t2=False)
    torch.testing.assert_close(unscaled * 2500, gradient(50.0), rtol=1e-9, atol=0)


# ---- masking -----------------------------------------------------------------------------------


def test_masking_is_distilbert_s() -> None:
    data = rows(4000)
    counts = count_tokens(data, V)
    assert counts.sum() == 80_000 and counts[: len(SPECIAL)].sum() == 0
    collate = FrequencyMasking(tokenizer(), counts)
    batch = collate(data)
    labelled = batch["labels"] != -100
    assert labelled.sum().item() == 12_000  # 15 %, exactly
    before = torch.tensor([row["input_ids"] for row in data])
    assert torch.equal(batch["labels"][labelled], before[labelled])
    assert torch.equal(batch["input_ids"][~labelled], before[~labelled])
    now, then = batch["input_ids"][labelled], before[labelled]
    masked = (now == 3).float().mean().item()
    kept = (now == then).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1, abs=0.02)
    # of two tokens, how often each is drawn goes as its count ** 0.3
    drawn = np.bincount(then, minlength=V)
    often, rare = np.argsort(counts)[[-2, -12]]
    expected = (counts[often] / counts[rare]) ** 0.3
    assert drawn[often] / drawn[rare] == pytest.approx(expected, rel=0.25)


def test_masking_leaves_padding_and_special_tokens_alone() -> None:
    data = [{"input_ids": [1, 9, 2]}, {"input_ids": [1, 10, 11, 12, 13, 14, 2]}]
    collate = FrequencyMasking(tokenizer(), np.ones(V, np.int64), probability=0.99)
    batch = collate(data)
    assert batch["attention_mask"].sum().item() == 10
    assert (batch["labels"] != -100).sum().item() == 6
    assert torch.equal(batch["input_ids"][:, 0], torch.tensor([1, 1]))
    nothing = FrequencyMasking(tokenizer(), np.ones(V, np.int64), probability=0.0)(data)
    assert (nothing["labels"] == -100).all() and nothing["input_ids"][1].tolist() == data[1][
        "input_ids"
    ]


# ---- the student's own text --------------------------------------------------------------------


def test_written_batches_count_what_was_written_up_to_the_end() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    written = torch.tensor([[0, 7, 8, 20, 2, 0, 0], [5, 6, 7, 30, 31, 32, 33]])
    batch = _batch(written, mask, [2])
    assert batch["input_ids"].tolist() == [[7, 8, 20, 2, 0, 0, 0], [5, 6, 7, 30, 31, 32, 33]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 3, [1] * 7]
    ignored = -100
    assert batch["labels"].tolist() == [
        [ignored, ignored, 20, 2, *[ignored] * 3],
        [ignored] * 3 + [30, 31, 32, 33],
    ]


def test_prompts_end_where_labels_begin() -> None:
    write = OnPolicy(1.0, prompt=3, new_tokens=4, temperature=1.0)
    ids = torch.arange(10, 34).view(3, 8)
    labels = ids.clone()
    labels[0, :5], labels[2, 6:] = -100, -100  # a prompt of 5; none; padding at the end
    mask = torch.ones_like(ids)
    mask[2, 2:] = 0
    prompts, there = write.prompts({"input_ids": ids, "labels": labels, "attention_mask": mask}, 0)
    assert prompts.tolist() == [[10, 11, 12, 13, 14], [0, 0, 18, 19, 20], [0, 0, 0, 0, 26]]
    assert torch.equal(there, (prompts != 0).long())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_on_policy_steps_are_means_over_written_tokens(share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = llama(), llama()
    data = [
        {"input_ids": torch.arange(5, 21) + i, "labels": torch.arange(5, 21) + i} for i in range(4)
    ]
    args = DistillationArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        on_policy_share=share, on_policy_prompt=4, on_policy_new_tokens=6, backend="reference",
        divergence="reverse_kl", save_strategy="no",
    )  # fmt: skip
    tested = DistillationTrainer(student, teacher, args, train_dataset=data)
    batches: list[dict[str, Tensor]] = []
    compute = tested.compute_loss

    def spy(model: Any, inputs: Any, **kwargs: Any) -> Any:
        batches.append({**inputs, "items": kwargs["num_items_in_batch"]})
        return compute(model, inputs, **kwargs)

    tested.compute_loss = spy  # type: ignore[method-assign]
    tested.train()
    counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert all(int(batch["items"]) == counted for batch in batches)
    if share:
        assert all(batch["input_ids"].shape[1] <= 10 for batch in batches) and counted <= 24
    else:
        assert counted == 60
    log = tested.state.log_history[0]
    assert log["loss"] == pytest.approx(log["kd"], rel=1e-4) and student.training


def test_on_policy_mistakes_are_named(tmp_path: Path) -> None:
    for wrong, message in (
        ({"on_policy_share": 1.5}, "on_policy_share=1.5"),
        ({"on_policy_new_tokens": 0}, "on_policy_new_tokens=0"),
        ({"on_policy_share": 0.5, "ce_weight": 0.1}, "ce_weight=0"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationArguments(output_dir=str(tmp_path), **wrong)
    args = DistillationArguments(output_dir=str(tmp_path), on_policy_share=0.5, use_cpu=True)
    with pytest.raises(ValueError, match="decoder"):
        DistillationTrainer(bert(), bert(), args)


# ---- what the command line says ----------------------------------------------------------------


def test_tasks_that_differ_and_wrong_labels_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (("bert", bert()), ("llama", llama()), ("classifier", classifier())):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"text": "w1 w2", "label": "maybe"}) + "\n")

    def run(teacher: str, student: str) -> str:
        command = ["distill", "--teacher", str(tmp_path / teacher), "--student"]
        more = ["--data", str(data), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
        assert main([*command, str(tmp_path / student), *more]) == 2
        return capsys.readouterr().err

    assert "a causal one" in run("llama", "bert")
    assert "'maybe'" in run("classifier", "bert")
    data.write_text(json.dumps({"text": "w1 w2"}) + "\n")
    assert "text and label" in run("classifier", "classifier")
