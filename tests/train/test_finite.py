"""Runs that meet NaN or infinity stop, say where, and leave what was good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, rows, trainer
from safetensors.torch import load_file
from torch import nn

from fusedkd import kd_loss_and_metrics
from fusedkd.errors import NotFinite
from fusedkd.train.checkpoints import staged
from fusedkd.train.finite import finite_rows


def spoil(model: nn.Module, name: str, value: float, row: int | None = None) -> nn.Module:
    with torch.no_grad():
        weight = model.get_parameter(name)
        (weight if row is None else weight[row]).fill_(value)
    return model


def padded() -> list[dict[str, Any]]:
    """Two rows; the second ends in padding (id 0), which has no label."""
    data = rows(2)
    data[1]["input_ids"][8:] = 0
    for row in data:
        row["attention_mask"] = (row["input_ids"] != 0).long()
        row["labels"] = row["labels"].masked_fill(row["input_ids"] == 0, -100)
    return data


def huge(kind: str) -> nn.Module:
    """Finite in float16, but what it computes overflows."""
    model = build(kind, 2)
    with torch.no_grad():
        model.model.norm.weight.fill_(60_000.0)
        model.model.embed_tokens.weight.mul_(10)
    return model.half()


NAN, INF = float("nan"), float("inf")
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], list[str]]] = {
    "teacher": (
        lambda: (build("llama", 1), spoil(build("llama", 2), "model.norm.weight", NAN)),
        ["step 1", "teacher's answers", "all 4 rows", "model.norm.weight", "damaged"],
    ),
    "teacher's head": (
        lambda: (build("llama", 1), spoil(build("llama", 2), "lm_head.weight", INF, row=7)),
        ["step 1", "lm_head.weight", "damaged"],
    ),
    "teacher in float16": (
        lambda: (build("llama", 1), huge("llama")),
        ["teacher's answers", "65,504", "--teacher_dtype bfloat16"],
    ),
    "student": (
        lambda: (spoil(build("llama", 1), "model.norm.weight", NAN), build("llama", 2)),
        ["student's answers", "as loaded"],
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_run_stops_and_says_why(what: str, tmp_path: Path) -> None:
    models, words = CASES[what]
    with pytest.raises(NotFinite) as caught:
        trainer(*models(), tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    assert all(word in str(caught.value) for word in words), caught.value
    assert "No earlier checkpoint" in str(caught.value) and not list(tmp_path.iterdir())


def test_one_row_is_named(tmp_path: Path) -> None:
    data = rows()
    data[2]["input_ids"][3] = 66
    data[2]["labels"][3] = 66
    teacher = spoil(build("llama", 2), "model.embed_tokens.weight", NAN, row=66)
    with pytest.raises(NotFinite, match=r"teacher's answers are NaN or infinite in row \d of 4"):
        trainer(build("llama", 1), teacher, tmp_path, data).train()


def test_padding_is_not_looked_at(tmp_path: Path) -> None:
    """A teacher that gives NaN where nothing counts is none the worse."""
    hidden = torch.randn(2, 12, 5)
    hidden[1, 8:] = NAN
    labels = torch.stack([row["labels"] for row in padded()])
    assert finite_rows(hidden, labels != -100).all() and not finite_rows(hidden, None)[1]
    teacher = build("llama", 2)
    teacher.lm_head.register_forward_pre_hook(
        lambda module, args: (args[0].index_fill(1, torch.tensor([11]), NAN), *args[1:])
    )
    student = build("llama", 1)
    trainer(student, teacher, tmp_path, max_steps=2).train()  # the last position has no label
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_student_that_diverges_leaves_the_good_checkpoint(tmp_path: Path) -> None:
    tested = trainer(
        build("llama", 1), build("llama", 2), tmp_path, max_steps=5, save_strategy="steps",
        save_steps=1, optim="sgd", learning_rate=1e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=2,
    )  # fmt: skip
    step = tested.training_step

    def breaks(model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(model, *args, **kwargs)
        if tested.state.global_step == 2:
            model.model.norm.weight.grad.fill_(INF)
        return loss

    tested.training_step = breaks  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match="not saved") as caught:
        tested.train()
    assert "step 3" in str(caught.value) and "checkpoint-2 is from before" in str(caught.value)
    for step_ in (1, 2):
        weights = load_file(tmp_path / f"checkpoint-{step_}" / "model.safetensors")
        assert all(w.isfinite().all() for w in weights.values())
    assert not (tmp_path / "checkpoint-3" / "trainer_state.json").exists()


def test_a_broken_evaluation_before_training_is_an_error(tmp_path: Path) -> None:
    teacher = spoil(build("llama", 2), "model.norm.weight", NAN)
    with pytest.raises(NotFinite, match="evaluation at step 0"):
        trainer(build("llama", 1), teacher, tmp_path).evaluate()


def test_a_saved_student_is_replaced_when_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = trainer(build("llama", 1), build("llama", 2), tmp_path, max_steps=1)
    tested.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "model.safetensors" in before
    tested.train()
    with monkeypatch.context() as patch:  # the disk is full after the weights

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(type(tested.model.config), "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            tested.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    spoil(tested.model, "model.norm.weight", NAN)
    with pytest.raises(NotFinite, match=r"model\.norm\.weight"):
        tested.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with staged(tested, str(tmp_path / "elsewhere")) as folder:
        assert folder == str(tmp_path / "elsewhere")


def test_a_student_is_pushed_once_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = trainer(build("llama", 1), build("llama", 2), tmp_path)
    tested.args.push_to_hub, found = True, []
    monkeypatch.setattr(
        tested, "push_to_hub", lambda **how: found.append((tmp_path / "config.json").exists())
    )
    tested.save_model()
    assert found == [True] and not (tmp_path / "model.tmp").exists()


def test_agreement_of_nan_is_none() -> None:
    teacher, labels = torch.full((3, 5), NAN), torch.tensor([0, 1, 2])
    for student in (torch.randn(3, 5), torch.full((3, 5), NAN)):
        _, metrics = kd_loss_and_metrics(student, teacher, labels)
        assert metrics.top1_agreement.isnan() and metrics.teacher_accuracy.isnan()
    assert metrics.student_accuracy.isnan()
    _, metrics = kd_loss_and_metrics(torch.randn(3, 5), torch.randn(3, 5), labels)
    assert metrics.top1_agreement.isfinite() and metrics.student_accuracy.isfinite()
