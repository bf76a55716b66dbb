"""One call for transformers models in a loop of one's own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import families as tiny
import processes
import pytest
import torch
import transformers as tf
import workers_hf
from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd import LMHead, SparseTeacher, hf, kd_loss
from fusedkd.cache import CacheError, Job, Layout, Policy, TeacherCache, build

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS: dict[str, Any] = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.3}


@pytest.fixture(scope="module")
def alone() -> Any:
    """The step of one process, whole."""
    return workers_hf.step(tiny.build("llama", 1), tiny.build("llama", 2), [slice(0, 4)], False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return processes.run("workers_hf.py", "everything", 2, tmp_path_factory.mktemp("two"))


def same(got: Any, want: Any) -> None:
    for mine, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert got[2] == pytest.approx(want[2], rel=1e-5) and want[2]["kd"] > 0


def test_micro_batches(alone: Any) -> None:
    cuts = [slice(0, 1), slice(1, 4)]
    same(workers_hf.step(tiny.build("llama", 1), tiny.build("llama", 2), cuts, True), alone)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2", "fsdp2_layers"])
@pytest.mark.parametrize("how", ["whole", "cut"])
def test_processes(wrap: str, how: str, alone: Any, ranks: list[Any]) -> None:
    """Other numbers of tokens on every process; with micro-batches and without."""
    for rank in ranks:
        same(rank[wrap, how], alone)


def test_a_step_within_ddp(alone: Any, ranks: list[Any]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["around"], alone[1], rtol=1e-4, atol=1e-6)


def test_what_ddp_holds_is_refused(ranks: list[Any]) -> None:
    assert all("expected the DistributedDataParallel itself" in rank["inside"] for rank in ranks)


def test_a_loss_past_ddp_is_said(ranks: list[Any]) -> None:
    """From the second step on, and not where the hidden states are DDP's own."""
    for rank in ranks:
        right, wrong = rank["past"]
        assert not right and len(wrong) == 2
        assert "forward has not run since the last step: gradients are not averaged" in wrong[0]


def test_a_process_that_measured_nothing(ranks: list[Any]) -> None:
    assert [rank["unheard"] for rank in ranks] == [{"kd": 3.0}] * 2


def by_hand(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        sides = [model.eval()(batch["input_ids"]).logits for model in (student, teacher)]
    student.train()
    return kd_loss(*sides, labels, **LOSS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_live_teacher(family: str) -> None:
    """A soft cap and a scale are the model's own; nothing is left on the teacher."""
    student, teacher = tiny.build(family, 1), tiny.build("llama", 2).train()
    batch = tiny.batch(tiny.rows())
    loss, metrics = hf.distill(student, teacher, batch, **LOSS)
    loss.backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(loss.detach(), by_hand(student, teacher, batch), rtol=1e-5, atol=0)
    counted = (batch["labels"][:, 1:] != -100).sum()
    assert metrics["kd"].tokens == counted == hf.normalizer(student, [batch])
    assert 0 < metrics["kd"].item() < loss


def test_teachers_of_every_kind() -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    batch = tiny.batch(tiny.rows())
    want = by_hand(student, teacher, batch)
    logits = teacher(batch["input_ids"]).logits.detach()
    head = LMHead(teacher.model(batch["input_ids"])[0].detach(), teacher.lm_head.weight.detach())
    ids = torch.arange(tiny.V).expand(*logits.shape)
    sparse = SparseTeacher(ids, (logits / 2).log_softmax(-1), "drop")
    for given in (logits, head, sparse, lambda inputs: teacher(inputs["input_ids"]).logits):
        loss, _ = hf.distill(student, given, batch, **LOSS)
        torch.testing.assert_close(loss.detach(), want, rtol=1e-5, atol=0)


def test_a_cache(tmp_path: Path) -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2).eval()
    rows = tiny.rows()
    facts = {"teacher": "t", "teacher_hash": None, "tokenizer_hash": "00" * 32,
             "padded_vocab_size": tiny.V, "dtype": "float32"}  # fmt: skip
    layout = Layout(Policy("top", tiny.V - 1), tiny.V, (2.0,))
    job = Job([row["input_ids"].numpy() for row in rows], layout, facts)
    with torch.no_grad():
        build(tmp_path / "cache", job, lambda ids: teacher(ids).logits)
    batch = tiny.batch(rows)
    loss, _ = hf.distill(student, TeacherCache(tmp_path / "cache"), batch, **LOSS)
    torch.testing.assert_close(loss.detach(), by_hand(student, teacher, batch), rtol=2e-3, atol=0)
    with pytest.raises(CacheError, match="temperature"):
        hf.distill(student, TeacherCache(tmp_path / "cache"), batch)
    batch["input_ids"] = batch["input_ids"].flip(1)
    with pytest.raises(CacheError):
        hf.distill(student, TeacherCache(tmp_path / "cache"), batch, **LOSS)


def test_labels_of_ones_own() -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    batch = tiny.batch(tiny.rows())
    ids = batch.pop("input_ids")
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="no 'labels'"):
        hf.distill(student, teacher, {"input_ids": ids})
    given = {"input_ids": ids, "labels": ids}
    loss, _ = hf.distill(student, teacher, given, labels=labels, **LOSS)
    want = by_hand(student, teacher, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(loss.detach(), want, rtol=1e-5, atol=0)


def test_an_encoder_s_labels_are_not_shifted() -> None:
    student, teacher = tiny.build("bert", 1).eval(), tiny.build("bert", 2).eval()
    batch = tiny.batch(tiny.rows())
    loss, _ = hf.distill(student, teacher, batch)
    with torch.no_grad():
        sides = [model(batch["input_ids"]).logits for model in (student, teacher)]
    torch.testing.assert_close(loss.detach(), kd_loss(*sides, batch["labels"]), rtol=1e-5, atol=0)


def test_mistakes() -> None:
    student, batch = tiny.build("llama", 1), tiny.batch(tiny.rows())
    with pytest.raises(ValueError, match="share parameters"):
        hf.distill(student, student, batch)
    with pytest.raises(ValueError, match="more than padding explains"):
        hf.distill(student, tiny.build("llama", 2, vocab_size=1000), batch)
    with pytest.raises(TypeError, match="ignore_index"):
        hf.distill(student, tiny.build("llama", 2), batch, ignore_index=0)
    with pytest.raises(TypeError, match=r"reduction='sum'.*normalizer=1"):
        hf.distill(student, tiny.build("llama", 2), batch, reduction="sum")
    with pytest.raises(TypeError, match="tempreature"):
        hf.distill(student, tiny.build("llama", 2), batch, tempreature=2.0)
    with pytest.raises(ValueError, match="a masked one"):
        hf.distill(student, tiny.build("bert", 2), batch)


def test_nothing_stays_with_a_copy() -> None:
    """Of what is kept with a model, a copy or a file has nothing."""
    student, teacher, batch = (
        tiny.build("llama", 1),
        tiny.build("llama", 2),
        tiny.batch(tiny.rows()),
    )
    want, _ = hf.distill(student, teacher, batch)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert other._fusedkd is None
        other.lm_head.weight.data.mul_(2)
        assert hf.distill(other, teacher, batch)[0] != want
        assert hf.distill(student, copy.deepcopy(teacher), batch)[0] == want


def test_routers_of_experts() -> None:
    """Each token has its share of what they add, so that micro-batches of one text add up."""
    config = tf.MixtralConfig(
        **tiny.DECODER, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.7
    )
    torch.manual_seed(0)
    student, teacher = tf.MixtralForCausalLM(config), tiny.build("llama", 2)
    batch = tiny.batch(tiny.rows())
    routers = 0.7 * student(batch["input_ids"]).aux_loss
    whole, _ = hf.distill(student, teacher, batch, **LOSS)
    torch.testing.assert_close(whole - routers, by_hand(student, teacher, batch), rtol=1e-4, atol=0)
    count = hf.normalizer(student, [batch, batch])
    halves = [hf.distill(student, teacher, batch, normalizer=count, **LOSS)[0] for _ in range(2)]
    torch.testing.assert_close(sum(halves), whole)


def test_autocast() -> None:
    student, teacher = tiny.build("llama", 1), tiny.build("llama", 2)
    batch = tiny.batch(tiny.rows())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = hf.distill(student, teacher, batch, **LOSS)
    loss.backward()
    assert student.lm_head.weight.grad is not None and loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), by_hand(student, teacher, batch), rtol=2e-2, atol=0)
