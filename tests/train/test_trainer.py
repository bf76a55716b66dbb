"""DistillationTrainer on tiny, randomly initialised models of the real library. No network."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import (
    DECODER,
    DECODERS,
    ENCODERS,
    V,
    assert_same,
    batch,
    build,
    gradients,
    rows,
    trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd import kd_loss
from fusedkd.models.heads import NoPlainHead, plain_head
from fusedkd.train import (
    DistillationArguments,
    DistillationTrainer,
    compare,
    parse_divergence,
)


def by_hand(student: nn.Module, teacher: nn.Module, data: dict[str, Tensor], shift: bool) -> Tensor:
    """Hinton's loss from the models' own logits, written out."""
    inputs = {k: v for k, v in data.items() if k != "labels"}
    s, t, y = student(**inputs).logits.float(), teacher(**inputs).logits.float(), data["labels"]
    if shift:
        s, t, y = s[:, :-1], t[:, :-1], y[:, 1:]
    s, t, y = s[y != -100], t[y != -100], y[y != -100]
    kl = F.kl_div(
        F.log_softmax(s / 2, -1), F.log_softmax(t / 2, -1), reduction="sum", log_target=True
    )
    return (0.7 * 4 * kl + 0.3 * F.cross_entropy(s, y, reduction="sum")) / len(y)


# ---- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS + ENCODERS)
def test_loss_and_gradient_are_those_of_the_logits(kind: str, tmp_path: Path) -> None:
    student, teacher = build(kind, 1).eval(), build(kind, 2).eval()
    tested = trainer(student, teacher, tmp_path)
    assert tested._student_head.found is not None and tested._teacher_side.head is not None
    data = batch(rows())
    loss = tested.compute_loss(student, dict(data))
    loss.backward()
    found = gradients(student)
    student.zero_grad()
    expected = by_hand(student, teacher, data, shift=kind in DECODERS)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert_same(found, gradients(student), rtol=1e-3, atol=1e-5)
    student.zero_grad()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_no_logits_are_made(kind: str, tmp_path: Path) -> None:
    student, teacher = build(kind, 1), build(kind, 2)
    tested = trainer(student, teacher, tmp_path)
    shapes = []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: shapes.append(output.numel())
        )
    tested.compute_loss(student, batch(rows()))
    assert shapes == [0, 0]
    assert student(batch(rows())["input_ids"]).logits.shape == (4, 12, V)  # and the hooks are gone


def test_encoder_decoder_is_not_shifted(tmp_path: Path) -> None:
    student, teacher = build("t5", 1).eval(), build("t5", 2).eval()
    tested = trainer(student, teacher, tmp_path, kd_weight=0.0, ce_weight=1.0)
    data = batch(rows())
    expected = student(**data).loss
    torch.testing.assert_close(
        tested.compute_loss(student, dict(data)), expected, rtol=1e-4, atol=1e-5
    )


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


class Odd(tf.LlamaForCausalLM):
    """Squares its logits: nothing that a config names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits**2
        return outputs


def not_plain(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "squared":
        return Odd(tf.LlamaConfig(**DECODER))
    model = build("llama")
    if kind == "adapted":
        model.lm_head = Adapted(16, V, bias=False)
    return model


@pytest.mark.parametrize("kind", ["squared", "adapted"])
def test_without_a_plain_head_dense_logits_are_used(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = not_plain(kind).eval(), build("llama", 2).eval()
    with pytest.raises(NoPlainHead):
        plain_head(student)
    with caplog.at_level(logging.WARNING, logger="fusedkd"):
        tested = trainer(student, teacher, tmp_path)
        data = batch(rows())
        losses = [tested.compute_loss(student, dict(data)) for _ in range(2)]
    expected = by_hand(student, teacher, data, shift=True)
    torch.testing.assert_close(losses, [expected] * 2, rtol=1e-4, atol=1e-5)
    assert len([r for r in caplog.records if "dense logits" in r.message]) == 1


class Int8(Tensor):
    """Says that it is fp32 and holds int8, as torchao's weights do."""

    whole: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor, scale: Tensor) -> Int8:
        made = Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)
        made.whole, made.scale = whole, scale
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        plain = [x.whole * x.scale if isinstance(x, cls) else x for x in args]
        return func(*plain, **(kwargs or {}))


class Linear8(nn.Linear):
    """Its weight is an integer tensor that only its forward understands, as with bitsandbytes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale)


def quantise(head: nn.Linear, kind: str) -> nn.Linear:
    scale = head.weight.detach().abs().max() / 127
    whole = (head.weight.detach() / scale).round().to(torch.int8)
    made = (Linear8 if kind == "integers" else nn.Linear)(16, V, bias=False)
    weight = whole if kind == "integers" else Int8(whole, scale)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.scale = scale
    return made


@pytest.mark.parametrize("kind", ["integers", "subclass"])
def test_a_quantised_teachers_head_gives_dense_logits(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = build("llama", 1).eval(), build("llama", 2).eval()
    teacher.lm_head = quantise(teacher.lm_head, kind)
    with caplog.at_level(logging.WARNING, logger="fusedkd"):
        tested = trainer(student, teacher, tmp_path)
    data = batch(rows())
    loss = tested.compute_loss(student, dict(data))
    torch.testing.assert_close(
        loss, by_hand(student, teacher, data, shift=True), rtol=1e-4, atol=1e-5
    )
    loss.backward()
    assert student.lm_head.weight.grad.abs().sum() > 0
    assert [r for r in caplog.records if "teacher" in r.message and "quantised" in r.message]


def test_outputs_hold_logits_where_they_are_asked_for(tmp_path: Path) -> None:
    student, teacher = build("llama", 1).eval(), build("llama", 2)
    tested = trainer(student, teacher, tmp_path)
    data = batch(rows())
    loss, outputs = tested.compute_loss(student, dict(data), return_outputs=True)
    assert outputs.logits.shape == (4, 12, V)
    torch.testing.assert_close(loss, tested.compute_loss(student, dict(data)), rtol=1e-5, atol=1e-6)


# ---- normalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dense", [False, True])
def test_accumulation_changes_neither_loss_nor_gradient(
    kind: str, dense: bool, tmp_path: Path
) -> None:
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        student, teacher = build(kind, 1), build(kind, 2)
        seen: list[dict[str, Tensor]] = []

        class Spy(tf.TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
                seen.append(gradients(model))  # noqa: B023

        tested = trainer(
            student.eval(),
            teacher,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            callbacks=[Spy()],
        )
        _without_dropout(student)
        if dense:
            tested._student_head.found = tested._teacher_side.head = None
        tested.train()
        results.append((tested.state.log_history[0]["loss"], seen[0]))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_same(grads, results[0][1], rtol=1e-3, atol=1e-6)


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def test_the_model_s_own_loss_is_met_without_distillation(tmp_path: Path) -> None:
    """kd_weight 0 and ce_weight 1 is the stock Trainer's training, step for step."""
    ours, stock = build("llama", 1), build("llama", 1)
    trainer(ours, build("llama", 2), tmp_path, kd_weight=0.0, ce_weight=1.0, max_steps=3).train()
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        max_steps=3,
    )
    tf.Trainer(stock, arguments, train_dataset=rows()).train()
    assert_same(dict(ours.named_parameters()), dict(stock.named_parameters()), rtol=1e-3, atol=1e-5)


# ---- the teacher -------------------------------------------------------------------------------


def test_the_teacher_is_not_trained_switched_or_saved(tmp_path: Path) -> None:
    student, teacher = build("gpt2", 1), build("gpt2", 2).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    tested = trainer(student, teacher, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    tested.train()
    tested.evaluate()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) <= set(student.state_dict())


def test_shared_parameters_are_refused(tmp_path: Path) -> None:
    student, teacher = build("llama", 1), build("llama", 2)
    teacher.model.embed_tokens = student.model.embed_tokens
    with pytest.raises(ValueError, match="share parameters"):
        trainer(student, teacher, tmp_path)
    with pytest.raises(ValueError, match="share parameters"):
        trainer(student, student, tmp_path)
    with pytest.raises(TypeError, match="teacher"):
        trainer(student, "gpt2", tmp_path)  # type: ignore[arg-type]


# ---- vocabularies ------------------------------------------------------------------------------


class Tokenizer(tf.PreTrainedTokenizerBase):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def test_padded_vocabularies_are_cut_to_the_true_one(tmp_path: Path) -> None:
    student, teacher = (
        build("llama", 1, vocab_size=V + 5).eval(),
        build("llama", 2, vocab_size=V + 13),
    )
    data = batch(rows())
    tested = trainer(student, teacher, tmp_path, vocab_size=V)
    loss = tested.compute_loss(student, dict(data))
    s, t = (m(data["input_ids"]).logits[:, :-1].detach() for m in (student, teacher))
    expected = kd_loss(
        s, t, data["labels"][:, 1:], temperature=2.0, kd_weight=0.7, ce_weight=0.3, vocab_size=V,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert trainer(student, teacher, tmp_path)._loss_keywords["vocab_size"] == V + 5


@pytest.mark.parametrize("tokens", ["labels", "all"])
def test_a_z_loss_follows_its_schedule_in_training_alone(tmp_path: Path, tokens: str) -> None:
    """Of the tokens that have a label, wherever the divergence counts."""
    student, teacher = build("llama", 1).eval(), build("llama", 2)
    data = batch(rows())
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    plain = trainer(student, teacher, tmp_path, kd_tokens=tokens, ce_weight=0.0)
    tested = trainer(
        student, teacher, tmp_path, kd_tokens=tokens, ce_weight=0.0, z_loss_weight=0.2,
        schedules=["z_loss_weight=linear:0.1"],
    )  # fmt: skip
    assert [tested._objective.numbers(x)["z_loss_weight"] for x in (0, 1)] == [0.2, 0.1]
    labels = data["labels"][:, 1:]
    lse = student.train()(data["input_ids"]).logits[:, :-1].logsumexp(-1)[labels != -100]
    got, base = (t.compute_loss(student, dict(data)) for t in (tested, plain))
    torch.testing.assert_close(got - base, 0.2 * (lse**2).mean(), rtol=1e-4, atol=1e-5)
    student.eval()
    assert tested.compute_loss(student, dict(data)) == plain.compute_loss(student, dict(data))


def test_a_z_loss_is_refused_where_there_is_none(tmp_path: Path) -> None:
    sampled = {"objective": "sampled", "on_policy_share": 1.0}
    for others in ({"z_loss_weight": -1.0}, sampled, {"cross_tokenizer": "alm"}):
        with pytest.raises(ValueError, match="z_loss_weight="):
            options = {"z_loss_weight": 0.1, **others}
            DistillationArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    for compared in (compare.bernoulli, compare.squared_error):
        with pytest.raises(ValueError, match="z_loss_weight="):
            compared(False, torch.zeros(2), torch.zeros(2), torch.zeros(2), z_loss_weight=0.1)


def test_the_tokenizer_tells_the_true_vocabulary() -> None:
    from fusedkd.models.kinds import true_vocabulary

    small, large, other = (build("llama", vocab_size=n) for n in (V, V + 600, V + 13))
    assert true_vocabulary(small, other, None, Tokenizer(V - 2)) == V - 2
    assert true_vocabulary(small, large, None, Tokenizer(V - 2)) == V - 2
    assert true_vocabulary(small, small, None, Tokenizer(V - 2)) is None
    assert true_vocabulary(small, large, V, None) == V
    for tokenizer, pair in ((Tokenizer(V + 1), (small, other)), (None, (small, large))):
        with pytest.raises(ValueError, match="vocabulary"):
            true_vocabulary(*pair, None, tokenizer)


# ---- logs, evaluation, resuming ----------------------------------------------------------------


def test_metrics_are_logged_with_the_loss(tmp_path: Path) -> None:
    student, teacher = build("llama", 1), build("llama", 2)
    tested = trainer(student, teacher, tmp_path, max_steps=4, logging_steps=2)
    tested.train()
    logs = [entry for entry in tested.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert entry["kd"] > 0 and entry["ce"] > 0
        assert 0 < entry["teacher_entropy"] <= math.log(V) + 1e-6
        assert 0 <= entry["top1_agreement"] <= 1 and 0 <= entry["student_accuracy"] <= 1
        # one batch of equal composition per step: the mean loss is the mean of its parts
        assert entry["loss"] == pytest.approx(0.7 * 4 * entry["kd"] + 0.3 * entry["ce"], rel=1e-3)


@pytest.mark.parametrize("metrics", ["every", "logging_steps", "none"])
def test_metrics_of_the_steps_that_are_asked_for(
    metrics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and what is learnt are the same; evaluation measures in any case."""
    seen: list[bool] = []
    for name, measures in (("kd_loss", False), ("kd_loss_and_metrics", True)):
        call = getattr(compare, name)
        monkeypatch.setattr(
            compare, name, lambda *a, f=call, m=measures, **k: seen.append(m) or f(*a, **k)
        )
    found = []
    for which in ("every", metrics):
        seen.clear()
        student, teacher = build("llama", 1), build("llama", 2)
        options = {"max_steps": 4, "logging_steps": 2, "metrics": which}
        tested = trainer(student, teacher, tmp_path / which, **options)
        tested.train()
        logs = [entry for entry in tested.state.log_history if "loss" in entry]
        found.append([(entry["loss"], entry["grad_norm"]) for entry in logs])
        assert "eval_kd" in tested.evaluate()
    steps = {"every": [True] * 4, "logging_steps": [False, True] * 2, "none": [False] * 4}
    assert seen[:4] == steps[metrics] and found[0] == found[1]
    assert all(("kd" in entry) == (metrics != "none") for entry in logs)
    with pytest.raises(ValueError, match="metrics='some': expected one of every, logging_steps"):
        trainer(build("llama", 1), teacher, tmp_path, metrics="some")


def test_evaluation_reports_the_student_s_cross_entropy(tmp_path: Path) -> None:
    student, teacher = build("llama", 1), build("llama", 2)
    data = rows(5)  # batches of 2, 2 and 1 with different token counts
    tested = trainer(
        student, teacher, tmp_path, data, per_device_eval_batch_size=2, label_smoothing_factor=0.2
    )
    found = tested.evaluate()
    whole = batch(data)
    with torch.no_grad():
        logits = student.eval()(whole["input_ids"]).logits[:, :-1]
        theirs = teacher(whole["input_ids"]).logits[:, :-1]
    labels = whole["labels"][:, 1:]
    counted = labels != -100
    expected = F.cross_entropy(logits[counted], labels[counted]).item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    agree = (logits.argmax(-1) == theirs.argmax(-1))[counted].float().mean().item()
    assert found["eval_top1_agreement"] == pytest.approx(agree, abs=1e-6)


def test_compute_metrics_still_gets_logits(tmp_path: Path) -> None:
    student, teacher = build("llama", 1), build("llama", 2)
    tested = trainer(student, teacher, tmp_path)
    shapes = []
    tested.compute_metrics = lambda p: shapes.append(p.predictions.shape) or {"seen": 1.0}
    found = tested.evaluate()
    assert shapes == [(4, 12, V)] and found["eval_seen"] == 1.0
    tested.compute_metrics = None
    assert tested.evaluate()["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)


class Stop(tf.TrainerCallback):
    """Ends the training after some step, as a killed process would, right after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            raise KeyboardInterrupt
        return control


def test_resuming_equals_not_stopping(tmp_path: Path) -> None:
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3,
              "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # fmt: skip
    data, teacher = rows(10), build("gpt2", 2)  # gpt2: with dropout, so the generator matters

    def make(folder: str, **more: Any) -> tuple[nn.Module, DistillationTrainer]:
        student = build("gpt2", 1)
        return student, trainer(student, teacher, tmp_path / folder, data, **common, **more)

    whole, uninterrupted = make("whole")
    uninterrupted.train()
    _, killed = make("parts", callbacks=[Stop(3)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed, second = make("parts")
    second.train(resume_from_checkpoint=True)
    assert_same(dict(resumed.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0)
    last = [[e for e in t.state.log_history if "loss" in e][-1] for t in (uninterrupted, second)]
    assert last[0] == last[1]


# ---- what people switch on ---------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_options_train_close_to_plain_fp32(option: dict[str, bool], tmp_path: Path) -> None:
    students = [build("llama", 1) for _ in range(2)]
    losses = []
    for student, more in zip(students, ({}, option), strict=True):
        tested = trainer(student, build("llama", 2), tmp_path, max_steps=3, **more)
        assert tested._student_head.found is not None
        tested.train()
        losses.append([e["loss"] for e in tested.state.log_history if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert losses[1][-1] < losses[1][0]


def test_a_teacher_in_another_dtype_and_family(tmp_path: Path) -> None:
    student, teacher = build("llama", 1), build("gemma2", 2, hidden_size=24).to(torch.bfloat16)
    tested = trainer(student, teacher, tmp_path, max_steps=3)
    tested.train()
    assert next(teacher.parameters()).dtype == torch.bfloat16
    losses = [e["loss"] for e in tested.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]


def test_frozen_embeddings_stay_put(tmp_path: Path) -> None:
    student, teacher = build("llama", 1), build("llama", 2)
    student.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(student.lm_head.weight.data)
    trainer(student, teacher, tmp_path, max_steps=2).train()
    assert torch.equal(before, student.lm_head.weight)


def test_model_init(tmp_path: Path) -> None:
    args = DistillationArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", backend="reference", max_steps=1,
        disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    tested = DistillationTrainer(
        None, build("llama", 2), args, model_init=lambda: build("llama", 1), train_dataset=rows()
    )
    tested.train()
    assert any("kd" in entry for entry in tested.state.log_history)


def test_a_batch_without_labels_is_named(tmp_path: Path) -> None:
    student = build("llama", 1)
    tested = trainer(student, build("llama", 2), tmp_path)
    with pytest.raises(ValueError, match="labels"):
        tested.compute_loss(student, {"input_ids": batch(rows())["input_ids"]})


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "params"),
    [
        ("forward_kl", "forward_kl", ()),
        ("jsd", "jsd", (0.5,)),
        ("jsd(beta=0.3)", "jsd", (0.3,)),
        (" jsd ( 0.3 ) ", "jsd", (0.3,)),
        ("jsd:0.3", "jsd", (0.3,)),
        ("alpha_beta:beta=0.7, alpha=2", "alpha_beta", (2.0, 0.7)),
        ("alpha_beta(1e-1, beta=0.5)", "alpha_beta", (0.1, 0.5)),
    ],
)
def test_divergence_is_parsed(text: str, name: str, params: tuple[float, ...]) -> None:
    found = parse_divergence(text)
    assert (found.name, found.params) == (name, params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foward_kl", "forward_kl"),
        ("jsd(gamma=0.3)", "beta"),
        ("jsd(0.3, 0.4)", "beta"),
        ("jsd(x)", "number"),
        ("jsd(0)", "forward_kl"),
        ("__import__('os').system('true')", "expected a name"),
        ("jsd(beta=0.3", "expected a name"),
        ("forward_kl(1)", "none"),
    ],
)
def test_a_wrong_divergence_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_divergence(text)


@pytest.mark.parametrize(
    ("argument", "value"), [("temperature", 0.0), ("kd_weight", -1.0), ("chunk_bytes", 0)]
)
def test_arguments_are_checked_at_once(argument: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=argument):
        DistillationArguments(output_dir=str(tmp_path), **{argument: value})
