"""Terms beside the divergence, in the trainer: what they add up to, and what they leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd import kd_loss_and_metrics
from fusedkd.models.capture import capture
from fusedkd.train import (
    DistillationArguments,
    DistillationTrainer,
    ahead,
    compare,
    objective,
)
from fusedkd.train.schedules import parse_schedules
from fusedkd.train.term_set import TermSet
from fusedkd.train.terms import parse_term

pytestmark = pytest.mark.usefixtures("one_thread")

V = 61
RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EVERY_TERM = [
    "cosine",
    "hidden_mse(weight=0.7, projection=per_layer)",
    "embedding_mse(0.5)",
    "attention_mse(weight=0.3, center=false)",
    "attention_kl",
    "relation_kl(weight=2, heads=2)",
]


def build(kind: str, seed: int, layers: int = 2, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_hidden_layers": layers, **changes}
    if kind == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**sizes, **NO_DROPOUT))
    if kind == "classifier":
        return tf.BertForSequenceClassification(tf.BertConfig(**sizes, **NO_DROPOUT, num_labels=3))
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2))


def rows(n: int = 4, masked: bool = False) -> list[dict[str, Tensor]]:
    """Padded to the right by different amounts; masked: few labels, not as many in each."""
    g = torch.Generator().manual_seed(3)
    found = []
    for i in range(n):
        ids, mask = torch.randint(3, V, (10,), generator=g), torch.ones(10, dtype=torch.long)
        labels = ids.clone()
        mask[10 - 2 * (i % 3) :] = 0
        labels[mask == 0], ids[mask == 0] = -100, 0
        if masked:
            labels[torch.arange(10) % (i + 2) != 0] = -100
        found.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return found


def batch(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def trainer(student: Any, teacher: Any, out: Path, data: Any, **arguments: Any) -> Any:
    defaults = {
        "output_dir": str(out), "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "backend": "reference", "temperature": 2.0,
        "learning_rate": 1e-2, "per_device_train_batch_size": 4,
    }  # fmt: skip
    callbacks = arguments.pop("callbacks", None)
    args = DistillationArguments(**{**defaults, **arguments})
    return DistillationTrainer(
        student, teacher, args, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Spy(tf.TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(gradients(model))


# ---- normalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("dense", [False, True])
def test_accumulation_changes_no_term(kind: str, dense: bool, tmp_path: Path) -> None:
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        spy, student = Spy(), build(kind, 1)
        torch.manual_seed(7)  # of the projections
        tested = trainer(
            student, build(kind, 2, layers=4), tmp_path, rows(masked=kind == "bert"),
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            max_steps=1, max_grad_norm=0.0, callbacks=[spy], terms=EVERY_TERM, kd_tokens="all",
            kd_weight=0.7, ce_weight=0.3,
        )  # fmt: skip
        if dense:
            tested._student_head.found = tested._teacher_side.head = None
        tested.train()
        log = tested.state.log_history[0]
        results.append(({k: log[k] for k in log if k not in ("epoch", "step")}, spy.seen[0]))
    first, grads = results[0]
    assert {"cosine", "relation_kl", "kd", "ce"} <= first.keys()
    assert any("fusedkd_projections" in name for name in grads)
    for log, found in results[1:]:
        assert log == pytest.approx(first, rel=1e-4, abs=1e-7)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def one_step(out: Path, size: int) -> None:
    """Train one step with every term; write what came of it. Also run by torchrun, see below."""
    spy, student = Spy(), build("bert", 1)
    torch.manual_seed(7)
    tested = trainer(
        student, build("bert", 2, layers=4), out, rows(masked=True), terms=EVERY_TERM,
        per_device_train_batch_size=size, max_steps=1, max_grad_norm=0.0, callbacks=[spy],
        kd_tokens="all", ce_weight=0.3,
    )  # fmt: skip
    tested.train()
    if tested.is_world_process_zero():
        log = {k: v for k, v in tested.state.log_history[0].items() if k != "epoch"}
        grads = {name.removeprefix("module."): grad for name, grad in spy.seen[0].items()}
        torch.save((log, grads), out / "step.pt")


def test_two_processes_are_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    command = [*torchrun, "2", __file__, str(tmp_path / "two")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, **processes.PATH})
    one_step(tmp_path / "one", 4)
    (log, grads), (theirs, found) = (torch.load(tmp_path / n / "step.pt") for n in ("one", "two"))
    assert theirs == pytest.approx(log, rel=1e-4, abs=1e-7)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_equal_models_have_no_loss_left(kind: str, tmp_path: Path) -> None:
    terms = [t.replace("projection=per_layer", "projection=none") for t in EVERY_TERM]
    student, teacher = build(kind, 1), build(kind, 1)
    tested = trainer(student, teacher, tmp_path, rows(), terms=terms, kd_tokens="all")
    assert abs(tested.compute_loss(student, batch(rows())).item()) < 1e-5
    found = tested.evaluate()
    assert found["eval_cosine"] < 1e-6 and found["eval_attention_mse"] < 1e-9


def test_divergence_on_every_token_and_cross_entropy_on_the_masked(tmp_path: Path) -> None:
    """DistilBERT's triple loss by hand: each of the three has tokens of its own."""
    student, teacher, data = build("bert", 1), build("bert", 2), batch(rows(masked=True))
    tested = trainer(
        student, teacher, tmp_path, rows(), terms=["cosine"], kd_tokens="all", kd_weight=5.0,
        ce_weight=2.0,
    )  # fmt: skip
    loss = tested.compute_loss(student, dict(data))
    inputs, real = {k: v for k, v in data.items() if k != "labels"}, data["attention_mask"] == 1
    ours, theirs = (m(**inputs, output_hidden_states=True) for m in (student, teacher))
    s, t = ours.logits[real] / 2, theirs.logits[real] / 2
    kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)
    ce = F.cross_entropy(ours.logits.view(-1, V), data["labels"].view(-1))
    last = ours.hidden_states[-1][real], theirs.hidden_states[-1][real]
    cosine = F.cosine_embedding_loss(*last, torch.ones(int(real.sum())))
    expected = 5 * 4 * kl + 2 * ce + cosine
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    longer = []
    for row in rows(masked=True):
        pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        longer.append({k: F.pad(v, (0, 6), value=pad[k]) for k, v in row.items()})
    losses = []
    for data in (rows(masked=True), longer):
        student, teacher = build("bert", 1), build("bert", 2)
        torch.manual_seed(7)
        tested = trainer(student, teacher, tmp_path, data, terms=EVERY_TERM, kd_tokens="all")
        losses.append(tested.compute_loss(student, batch(data)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_terms_alone_compute_no_vocabulary(tmp_path: Path) -> None:
    student, teacher = build("bert", 1), build("bert", 2)
    tested = trainer(
        student, teacher, tmp_path, rows(), terms=["hidden_mse"], kd_weight=0.0, max_steps=2,
        kd_tokens="all",
    )  # fmt: skip
    sizes: list[int] = []
    student.get_output_embeddings().register_forward_hook(lambda m, a, o: sizes.append(o.numel()))
    tested.train()
    first, second = [e for e in tested.state.log_history if "loss" in e]
    assert set(sizes) == {0} and "kd" not in first
    assert first["loss"] == pytest.approx(first["hidden_mse"], rel=1e-5)
    assert second["hidden_mse"] < first["hidden_mse"]


@pytest.mark.parametrize("recipe", ["tinybert_general", "tinybert_task", "minilm"])
def test_a_recipe_s_attention_terms_are_its_paper_s(recipe: str) -> None:
    """From what BERT's projections give, in plain torch and fp64, and all scores at once."""
    sizes = {"hidden_size": 24, "num_attention_heads": 2}
    if recipe == "minilm":  # whose relation heads are 12 on either side, whatever the models'
        sizes["num_attention_heads"] = 4
    student = build("bert", 1, hidden_size=12, num_attention_heads=2).double().eval()
    teacher = build("bert", 2, layers=4, **sizes).double().eval()
    text = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["terms"][0]
    terms, inputs = TermSet([text]), {**batch(rows())}
    del inputs["labels"]
    real = inputs["attention_mask"] == 1
    terms.attach(student, teacher)
    held, seen = [], []
    for model in (student, teacher):
        states: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
        for name, module in model.named_modules():
            if (last := name.rsplit(".", 1)[-1]) in states:
                module.register_forward_hook(lambda m, a, out, to=states[last]: to.append(out))
        with terms.watch(model) as captured:
            model(**inputs)
        held.append(states)
        seen.append(captured)
    (name,) = terms.terms
    loss = terms.terms[name](*seen, real, None)

    def scores(left: Tensor, right: Tensor, heads: int) -> Tensor:
        """Of (B, L, D); the lowest where a key is padding."""
        x, y = (s.unflatten(-1, (heads, -1)).transpose(1, 2) for s in (left, right))
        every = x @ y.transpose(-1, -2) / x.shape[-1] ** 0.5
        return every.masked_fill(~real[:, None, None], -1e30)

    expected = []
    if name == "attention_mse":  # of layers 1 and 2 with 2 and 4, in rows less their mean
        for ours, theirs in ((0, 1), (1, 3)):
            s, t = (
                scores(x["query"][i], x["key"][i], 2)
                for x, i in zip(held, (ours, theirs), strict=True)
            )
            gap = (s - t).where(real[:, None, None], 0.0)
            count = real.sum(-1)[:, None, None, None]
            gap = (gap - gap.sum(-1, keepdim=True) / count).where(real[:, None, None], 0.0)
            expected.append((gap.square().sum(-1) / count[..., 0]).mean(1)[real].mean())
    else:
        for part in ("query", "key", "value"):
            lq, lp = (scores(x[part][-1], x[part][-1], 12).log_softmax(-1) for x in held)
            gap = (lp.exp() * (lp - lq)).where(real[:, None, None], 0.0)
            expected.append(gap.sum(-1).mean(1)[real].mean())
    whole = torch.stack(expected).sum()
    torch.testing.assert_close(loss, whole, rtol=1e-9, atol=0)
    weights = [p for n, p in student.named_parameters() if "attention.self" in n]
    found, wanted = (
        torch.autograd.grad(
            x, weights, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        for x in (loss, whole)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-14)


# ---- the teacher, the checkpoint, the exported student -----------------------------------------


class Stop(tf.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt


def test_projections_are_trained_resumed_and_left_out(tmp_path: Path) -> None:
    common = {
        "terms": ["hidden_mse(projection=shared)", "embedding_mse"], "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    teacher = build("llama", 2, layers=4, hidden_size=24)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    def make(folder: str, **more: Any) -> tuple[Any, Any]:
        student = build("llama", 1)
        torch.manual_seed(7)
        return student, trainer(student, teacher, tmp_path / folder, rows(8), **common, **more)

    whole, tested = make("whole")
    start = whole.fusedkd_projections["hidden_mse"][0].weight.clone()
    tested.train()
    assert not torch.equal(whole.fusedkd_projections["hidden_mse"][0].weight, start)
    assert whole.fusedkd_projections["embedding_mse"][0].weight.shape == (24, 16)

    _, killed = make("parts", callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.manual_seed(99)
    resumed, second = make("parts")
    second.train(resume_from_checkpoint=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

    second.save_model(str(tmp_path / "out"))
    for folder in ("out", "parts/checkpoint-4"):
        assert not any("proj" in n and "fusedkd" in n for n in saved(tmp_path / folder))
    assert (tmp_path / "parts/checkpoint-4/projections.safetensors").is_file()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = batch(rows())["input_ids"]
    torch.testing.assert_close(again(ids).logits, whole(ids).logits, rtol=0, atol=0)

    assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())
    trained = {id(p) for group in second.optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in trained for p in teacher.parameters())
    assert all(id(p) in trained for p in resumed.fusedkd_projections.parameters())


def saved(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


def test_checkpointed_layers_give_the_same_gradient(tmp_path: Path) -> None:
    results = []
    for checkpointed in (False, True):
        spy, student = Spy(), build("llama", 1)
        torch.manual_seed(7)
        tested = trainer(
            student, build("llama", 2), tmp_path, rows(), terms=EVERY_TERM, max_steps=1,
            callbacks=[spy], gradient_checkpointing=checkpointed, max_grad_norm=0.0,
        )  # fmt: skip
        tested.train()
        results.append(spy.seen[0])
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_compute_metrics_gets_logits_and_nothing_else(tmp_path: Path) -> None:
    tested = trainer(build("bert", 1), build("bert", 2), tmp_path, rows(), terms=["cosine"])
    shapes: list[Any] = []
    tested.compute_metrics = lambda p: shapes.append(p.predictions.shape) or {}
    tested.evaluate()
    assert shapes == [(4, 10, V)]


def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        student = build("llama", 1)
        torch.manual_seed(7)
        tested = trainer(
            student, build("llama", 2), tmp_path, rows(), terms=EVERY_TERM, max_steps=3, bf16=bf16
        )
        tested.train()
        losses.append([e["loss"] for e in tested.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=3e-2) and losses[1][-1] < losses[1][0]


def test_a_term_without_weight_is_not_computed(tmp_path: Path) -> None:
    student, teacher = build("bert", 1), build("bert", 2, hidden_size=24)
    terms = ["hidden_mse", "embedding_mse"]
    tested = trainer(
        student, teacher, tmp_path, rows(), terms=terms, max_steps=4, weight_decay=0.0,
        schedules=["hidden_mse=step:0:0.5"],
    )  # fmt: skip
    tested.train()
    logs = [e for e in tested.state.log_history if "loss" in e]
    assert ["hidden_mse" in e for e in logs] == [True, True, False, False]
    assert all("embedding_mse" in e for e in logs)
    assert tested.evaluate()["eval_hidden_mse"] > 0


# ---- classification ----------------------------------------------------------------------------


def examples(n: int = 4) -> list[dict[str, Tensor]]:
    return [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows(n))]


def test_classification_is_hinton_s_loss_on_classes(tmp_path: Path) -> None:
    student, teacher = build("classifier", 1), build("classifier", 2)
    tested = trainer(
        student, teacher, tmp_path, examples(), kd_weight=0.8, ce_weight=0.2, terms=["cosine"]
    )
    data = batch(examples())
    loss = tested.compute_loss(student, dict(data))
    inputs = {k: v for k, v in data.items() if k != "labels"}
    with capture(student) as ours:
        s = student(**inputs).logits
    with capture(teacher) as theirs:
        t = teacher(**inputs).logits
    kl = F.kl_div(
        (s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="batchmean", log_target=True
    )
    real = data["attention_mask"] == 1
    gap = 1 - F.cosine_similarity(ours.hidden[-1][real], theirs.hidden[-1][real])
    expected = 0.8 * 4 * kl + 0.2 * F.cross_entropy(s, data["labels"]) + gap.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    accuracy = (s.argmax(-1) == data["labels"]).float().mean().item()
    assert tested.evaluate()["eval_student_accuracy"] == pytest.approx(accuracy)


def test_classification_is_accumulated_rightly(tmp_path: Path) -> None:
    grads = []
    for size, accumulation in ((3, 1), (1, 3)):
        spy = Spy()
        trainer(
            build("classifier", 1), build("classifier", 2), tmp_path, examples(3), max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            ce_weight=0.5, terms=["cosine", "attention_kl"], callbacks=[spy], max_grad_norm=0.0,
        ).train()  # fmt: skip
        grads.append(spy.seen[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    teacher = build("classifier", 2)
    teacher.config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    with pytest.raises(ValueError, match="perhaps"):
        trainer(build("classifier", 1), teacher, tmp_path, examples())


# ---- schedules ---------------------------------------------------------------------------------


def test_weights_and_temperature_move_over_the_training(tmp_path: Path) -> None:
    tested = trainer(
        build("llama", 1), build("llama", 2), tmp_path, rows(8), terms=["cosine(weight=2)"],
        schedules=["temperature=linear:1", "cosine=step:0:0.5", "ce_weight=cosine:1:0.5"],
        temperature=4.0, max_steps=4,
    )  # fmt: skip
    numbers = tested._objective.numbers
    assert [numbers(x)["temperature"] for x in (0, 0.5, 1)] == [4.0, 2.5, 1.0]
    assert [numbers(x)["cosine"] for x in (0, 0.49, 0.5, 1)] == [2.0, 2.0, 0.0, 0.0]
    assert [round(numbers(x)["ce_weight"], 6) for x in (0, 0.25, 0.5, 1)] == [0.0, 0.5, 1.0, 1.0]
    tested.train()
    for entry in (e for e in tested.state.log_history if "loss" in e):
        now = numbers((entry["step"] - 1) / 4)
        expected = now["temperature"] ** 2 * entry["kd"] + now["ce_weight"] * entry["ce"]
        assert entry["loss"] == pytest.approx(
            expected + now["cosine"] * entry.get("cosine", 0.0), rel=1e-3
        )


def test_a_gpu_s_kernels_are_asked_for_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T = 4, 2.5, 2 and 1 in turn, and cross-entropy at last; and nobody learns of it."""
    losses: list[list[float]] = []
    for compiled in (False, True):
        met: list[tuple[float, bool]] = []

        def recorded(*sides: Any, met: Any = met, **keywords: Any) -> Any:
            met.append((keywords["temperature"], keywords["ce_weight"] != 0))
            return kd_loss_and_metrics(*sides, **keywords)

        monkeypatch.setattr(compare, "kd_loss_and_metrics", recorded)
        monkeypatch.setattr(objective, "compiles", lambda *_, compiled=compiled: compiled)
        tested = trainer(
            build("llama", 1), build("llama", 2), tmp_path, rows(8), temperature=4.0, max_steps=8,
            schedules=["temperature=linear:1:0.75", "ce_weight=step:1:0.875"],
        )  # fmt: skip
        tested.train()
        losses.append([e["loss"] for e in tested.state.log_history if "loss" in e])
        steps = [(4.0 - 0.5 * i, False) for i in range(6)] + [(1.0, False), (1.0, True)]
        others = [(2.0, False), (1.0, False), (1.0, True)]
        assert met == (others if compiled else []) + steps
    assert losses[0] == losses[1]


def test_what_a_schedule_asks_of_a_gpu_anew() -> None:
    numbers = {"temperature": 2.0, "kd_weight": 1.0, "ce_weight": 0.0}
    steady: Any = lambda done: numbers  # noqa: E731
    assert ahead.other_kernels(steady, 0.0, 100) == []
    switched: Any = lambda done: numbers | {"kd_weight": float(done < 0.3)}  # noqa: E731
    assert ahead.other_kernels(switched, 0.0, 100) == [0.3]
    assert ahead.other_kernels(switched, 0.5, 100) == []  # goes on after that
    assert not ahead.compiles(torch.zeros(2, 3), None)


@pytest.mark.parametrize(
    "text",
    ["temprature=linear:1", "temperature", "temperature=linear", "temperature=square:1",
     "temperature=linear:0", "kd_weight=linear:-1", "kd_weight=linear:1:0", "kd_weight=linear:1:2",
     "kd_weight=linear:x", "kd_weight=constant:1", "kd_weight=linear:1:0.5:1"],
)  # fmt: skip
def test_wrong_schedules_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="schedules"):
        parse_schedules([text], {"temperature": 1.0, "kd_weight": 1.0})


def test_a_name_has_one_schedule() -> None:
    with pytest.raises(ValueError, match="one entry"):
        parse_schedules(["kd_weight=linear:0", "kd_weight=constant"], {"kd_weight": 1.0})


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin", "cosine"),
        ("cosine(3, last, none, 4)", "parameters of cosine"),
        ("cosine(wieght=1)", "weight"),
        ("cosine(weight=x)", "number"),
        ("cosine(weight=-1)", "at least 0"),
        ("attention_mse(center=maybe)", "true or false"),
        ("hidden_mse(projection=two)", "per_layer"),
        ("cosine(", "expected a name"),
    ],
)
def test_wrong_terms_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_term(text)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"num_attention_heads": 4}, {"terms": ["attention_mse"]}, "relation_kl"),
        ({}, {"terms": ["hidden_mse(layers=1 9)"]}, "layers='1 9'"),
        ({"hidden_size": 8}, {"terms": ["cosine(projection=none)"]}, "projection"),
        ({}, {"terms": ["cosine", "cosine(2)"]}, "twice"),
        ({}, {"kd_tokens": "some"}, "kd_tokens"),
        ({}, {"schedules": ["cosine=linear:1"]}, "schedules"),
    ],
)
def test_terms_that_do_not_fit_are_named(
    changes: Any, more: Any, message: str, tmp_path: Path
) -> None:
    student = build("llama", 1)
    with pytest.raises(ValueError, match=message):
        trainer(student, build("llama", 2, **changes), tmp_path, rows(), **more).compute_loss(
            student, batch(rows())
        )


if __name__ == "__main__":  # one of the processes of test_two_processes_are_one
    torch.set_num_threads(1)
    one_step(Path(sys.argv[1]), 2)
    processes.leave()
