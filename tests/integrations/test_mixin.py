"""What people set on their own Trainer, with the mixin before it, and on DistillationTrainer:
honoured or refused, on tiny random models. No network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families as tiny
import pytest
import torch
from mixin_hosts import KINDS, Mine, Seq2Seq, V, close, kl, losses, shifted, trainer
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- settings of the loss ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_label_smoothing(kind: str, tmp_path: Path) -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    options = {"label_smoothing_factor": 0.2, "loss": {"ce_weight": 0.5}}
    tested = trainer(kind, student, teacher, tmp_path, **options)
    data = tiny.batch(tiny.rows())
    labels = shifted(data["labels"])
    s, t = (model(data["input_ids"]).logits for model in (student, teacher))
    smoothed = F.cross_entropy(s[labels != -100], labels[labels != -100], label_smoothing=0.2)
    close(tested.compute_loss(student, dict(data)), kl(s, t, labels) + 0.5 * smoothed)


def test_label_smoothing_without_cross_entropy_is_refused(tmp_path: Path) -> None:
    models = tiny.build("llama", 1), tiny.build("llama", 2)
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0\.2 .* expected ce_weight above"
    ):
        trainer("mixin", *models, tmp_path, label_smoothing_factor=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_nothing_would_call_is_refused(kind: str, tmp_path: Path) -> None:
    models = tiny.build("llama", 1), tiny.build("llama", 2)
    with pytest.raises(ValueError, match=r"compute_loss_func=.*: expected None"):
        trainer(kind, *models, tmp_path, compute_loss_func=lambda *x, **named: x)


@pytest.mark.parametrize("kind", KINDS)
def test_shift_labels_are_the_labels(kind: str, tmp_path: Path) -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    tested = trainer(kind, student, teacher, tmp_path)
    data = tiny.batch(tiny.rows())
    s, t = (model(data["input_ids"]).logits for model in (student, teacher))
    labels = data["labels"].roll(-1, 1)  # the last of them is the first of the row, and counts
    given = data | {"shift_labels": labels}
    items = tested._get_num_items_in_batch([given], torch.device("cpu"))
    assert items == (labels != -100).sum()
    for inputs in (given, {k: v for k, v in given.items() if k != "labels"}):
        loss = tested.compute_loss(student, dict(inputs), num_items_in_batch=items)
        close(loss, kl(s, t, labels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("collator", ["LanguageModeling", "Seq2Seq"])
def test_a_batch_without_labels_names_a_collator(kind: str, collator: str, tmp_path: Path) -> None:
    student = tiny.build("llama", 1)
    tested = trainer(kind, student, tiny.build("llama", 2), tmp_path)
    ids = tiny.batch(tiny.rows())["input_ids"]
    with pytest.raises(ValueError, match=f"no 'labels', only input_ids: .*Collator.*{collator}"):
        tested.compute_loss(student, {"input_ids": ids})


# ---- evaluation ----------------------------------------------------------------------------------


def sizes_of_logits(model: Any) -> list[int]:
    found: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: found.append(out.numel()))
    return found


@pytest.mark.parametrize("host", [Mine, Seq2Seq])
def test_evaluation_makes_no_logits(host: Any, tmp_path: Path) -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    tested = trainer("mixin", student, teacher, tmp_path, host)
    sizes = sizes_of_logits(student)
    found = tested.evaluate()["eval_loss"]
    assert sizes and not any(sizes)
    data = tiny.batch(tiny.rows())
    s, t = (model(data["input_ids"]).logits for model in (student.eval(), teacher))
    close(found, kl(s, t, shifted(data["labels"])))


def test_metrics_see_logits(tmp_path: Path) -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    shapes: list[Any] = []
    metrics = lambda p: shapes.append(p.predictions.shape) or {"seen": 1.0}  # noqa: E731
    tested = trainer("mixin", student, teacher, tmp_path, compute_metrics=metrics)
    found = tested.evaluate()
    assert shapes == [(4, 12, V)] and found["eval_seen"] == 1.0
    tested.compute_metrics = None
    close(tested.evaluate()["eval_loss"], found["eval_loss"])


# ---- another model, another head -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_model_init_makes_a_fresh_student(kind: str, tmp_path: Path) -> None:
    """As in a search for hyper-parameters, and again."""
    made: list[Any] = []
    init = lambda: made.append(tiny.build("llama", len(made))) or made[-1]  # noqa: E731
    teacher = tiny.build("llama", 9)
    tested = trainer(kind, None, teacher, tmp_path, model_init=init, learning_rate=0.0)
    data = tiny.batch(tiny.rows())
    for _ in range(2):
        found = losses(tested)
        assert tested._student_head.found.linear is made[-1].lm_head
        s, t = (model(data["input_ids"]).logits for model in (made[-1], teacher))
        close(found[-1], kl(s, t, shifted(data["labels"])))
    assert len(made) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resized", ["student", "teacher", "both"])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_resized(kind: str, resized: str, tied: bool, tmp_path: Path) -> None:
    """After construction: the smaller vocabulary is the true one."""
    models = [tiny.build("llama", i, tie_word_embeddings=tied) for i in (1, 2)]
    tested = trainer(kind, *models, tmp_path)
    for name, model in zip(("student", "teacher"), models, strict=True):
        if resized in (name, "both"):
            model.resize_token_embeddings(V + 3)
    data = tiny.batch(tiny.rows())
    columns = V + 3 if resized == "both" else V
    s, t = (model(data["input_ids"]).logits[..., :columns] for model in models)
    sizes = [*map(sizes_of_logits, models)]
    close(tested.compute_loss(models[0], dict(data)), kl(s, t, shifted(data["labels"])))
    assert [made[-1] for made in sizes] == [0, 0]  # after what was tried on a new head


def test_a_search_leaves_modes_alone(tmp_path: Path) -> None:
    """Looking for a head runs the model in eval(); parts that were in it stay."""
    student = tiny.build("llama", 1).train()
    student.model.layers[0].eval()
    trainer("mixin", student, tiny.build("llama", 2), tmp_path)
    assert student.training and student.lm_head.training
    assert not any(module.training for module in student.model.layers[0].modules())


# ---- compiled models -----------------------------------------------------------------------------


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "in place":
        model.compile(backend="eager")
    return torch.compile(model, backend="eager") if how == "wrapped" else model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["argument", "left over", "in place", "wrapped", "teacher"])
def test_compiled(kind: str, how: str, tmp_path: Path) -> None:
    """Dense logits, whoever compiled: a compiled forward keeps the hooks of its first step."""
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    want = losses(trainer(kind, tiny.build("llama", 1), teacher, tmp_path, max_steps=3))
    options: dict[str, Any] = {"max_steps": 3, "remove_unused_columns": False}
    asked = options | {"torch_compile": True, "torch_compile_backend": "eager"}
    if how == "left over":  # in accelerate's state, by a trainer that came between
        tested = trainer(kind, student, teacher, tmp_path, **options)
        other = trainer("trainer", tiny.build("llama", 1), teacher, tmp_path, **asked)
        assert losses(other) == pytest.approx(want, rel=1e-4)
    elif how == "teacher":
        teacher = compiled(teacher, "wrapped")
        tested = trainer(kind, student, teacher, tmp_path, **options)
    else:
        options = asked if how == "argument" else options
        tested = trainer(kind, compiled(student, how), teacher, tmp_path, **options)
    assert losses(tested) == pytest.approx(want, rel=1e-4)
    head = tested._teacher_side.head if how == "teacher" else tested._student_head.found
    assert head is None


def test_terms_of_a_compiled_student_are_refused(tmp_path: Path) -> None:
    """At once, or when it is compiled."""
    options: dict[str, Any] = {"loss": {"terms": ["cosine"]}}
    asked = {"torch_compile": True, "torch_compile_backend": "eager"}
    models = tiny.build("llama", 1), tiny.build("llama", 2)
    with pytest.raises(ValueError, match=r"terms=.*cosine.*torch_compile"):
        trainer("trainer", *models, tmp_path, **options, **asked)
    tested = trainer("trainer", *models, tmp_path, **options)
    models[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"terms=.*cosine.*torch_compile"):
        tested.train()


def test_a_compiled_forward_is_named(tmp_path: Path) -> None:
    """Which nothing tells from outside: an error where it would learn from the first batch, unless
    dynamo gives up at the hooks and runs them."""

    def tested(compiled: bool) -> Any:
        student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
        if compiled:
            student.forward = torch.compile(student.forward, backend="eager")
        return trainer("mixin", student, teacher, tmp_path, max_steps=3, data=tiny.rows(12))

    try:
        found = losses(tested(compiled=True))
    except RuntimeError as error:
        assert re.search(r"did not come by Linear.*compile the model", str(error))
    else:
        assert found == pytest.approx(losses(tested(compiled=False)), rel=1e-6)
