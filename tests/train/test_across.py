"""Students whose tokenizer is not their teacher's."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import words
from datasets import Dataset
from tokenizer_kinds import byte_level, texts
from two_tokenizers import llama, loss_and_gradients, other, rows, small, trainer

from fusedkd import kd_loss
from fusedkd.alignment import Retelling, shared_vocabulary
from fusedkd.cli import main
from fusedkd.errors import UserError
from fusedkd.train import DistillationArguments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(beta=0.3)"])
def test_of_identical_tokenizers_shared_kl_is_kd_loss(tmp_path: Path, divergence: str) -> None:
    tokenizer = small()
    models = llama(300), llama(300, seed=1)
    data = rows(tokenizer)
    settings = {"divergence": divergence, "temperature": 2.0, "seed": 3}
    plain, across = (
        loss_and_gradients(
            trainer(tmp_path, *models, tokenizer, tokenizer, data, **settings, **more)
        )
        for more in ({}, {"cross_tokenizer": "shared_kl"})
    )
    assert torch.equal(plain[0], across[0])
    for ours, theirs in zip(plain[1], across[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_permuted_vocabulary_changes_nothing(tmp_path: Path) -> None:
    """The teacher's ids are others, its rows and embeddings likewise."""
    tokenizer = small()
    student, teacher = llama(300), llama(300, seed=1)
    data = rows(tokenizer)
    plain = loss_and_gradients(trainer(tmp_path, student, teacher, tokenizer, tokenizer, data))

    about = json.loads(tokenizer.backend_tokenizer.to_str())
    moved = random.Random(0).sample(range(300), 300)
    about["model"]["vocab"] = {t: moved[i] for t, i in about["model"]["vocab"].items()}
    for entry in about["added_tokens"]:
        entry["id"] = moved[entry["id"]]
    about["added_tokens"].sort(key=lambda entry: entry["id"])
    inner = type(tokenizer.backend_tokenizer).from_str(json.dumps(about))
    other = tf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    with torch.no_grad():
        for weight in (teacher.model.embed_tokens.weight, teacher.lm_head.weight):
            weight[moved] = weight.clone()
    made = trainer(tmp_path, student, teacher, tokenizer, other, data, cross_tokenizer="shared_kl")
    assert len(made._teacher_side._ids[0]) == 300
    loss, grads = loss_and_gradients(made)
    torch.testing.assert_close(loss, plain[0])
    for ours, theirs in zip(grads, plain[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_both_against_the_formulas(tmp_path: Path) -> None:
    """From dense logits in fp64, row by row and span by span."""
    ours, theirs = small(), other()
    student, teacher = llama(len(ours)), llama(len(theirs), seed=1)
    made = trainer(
        tmp_path, student, teacher, ours, theirs, rows(ours), cross_tokenizer="both",
        alm_weight=0.7, kd_weight=0.4, ce_weight=0.2, divergence="reverse_kl", alm_temperature=3.0,
    )  # fmt: skip
    loss, _ = loss_and_gradients(made)
    batch = next(iter(made.get_train_dataloader()))
    ids = shared_vocabulary(ours, theirs)
    retelling = Retelling(ours, theirs)
    total, count = torch.zeros((), dtype=torch.float64), 0
    spans = 0
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        own = row[mask.bool()]
        told = retelling(own.tolist())
        with torch.no_grad():
            s = student(own[None]).logits[0].double()
            t = teacher(torch.tensor([told.ids])).logits[0].double()
        count += len(own) - 1
        log_s = s.log_softmax(-1)[:-1].gather(1, own[1:, None])[:, 0]
        log_t = t.log_softmax(-1)[:-1].gather(1, torch.tensor(told.ids)[1:, None])[:, 0]
        total = total - 0.2 * log_s.sum()
        pairs = zip(told.student_spans.tolist(), told.teacher_spans.tolist(), strict=True)
        for (a, b), (c, d) in pairs:
            if not a or not c:
                continue
            spans += 1
            q, p = log_s[a - 1 : b - 1].sum() / 3, log_t[c - 1 : d - 1].sum() / 3
            kl = p.exp() * (p - q) - p.expm1() * ((-p.expm1()).log() - (-q.expm1()).log())
            q_rows, p_rows = s[a - 1][ids[0]], t[c - 1][ids[1]]
            kd = kd_loss(q_rows[None], p_rows[None], divergence="reverse_kl")
            total = total + 0.7 * 3 * kl + 0.4 * kd
    assert spans > 50
    torch.testing.assert_close(loss.double(), total / count, rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", ["alm", "shared_kl", "both"])
def test_trains_and_evaluates(tmp_path: Path, kind: str) -> None:
    ours, theirs = small(), other()
    made = trainer(
        tmp_path, llama(len(ours)), llama(len(theirs), seed=1), ours, theirs, rows(ours),
        cross_tokenizer=kind, max_steps=8, logging_steps=4, learning_rate=0.02,
    )  # fmt: skip
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    for name in {"alm": ["alm"], "shared_kl": ["kd"], "both": ["alm", "kd"]}[kind]:
        assert after[f"eval_{name}"] < 0.9 * before[f"eval_{name}"]
        assert any(name in log for log in made.state.log_history)
    assert "eval_loss" in after and "eval_teacher_loss" not in after


@pytest.mark.parametrize("kind", ["alm", "shared_kl"])
def test_a_step_does_not_depend_on_how_it_is_cut_up(tmp_path: Path, kind: str) -> None:
    ours, theirs = small(), other()
    found = []
    for size, steps in ((4, 1), (1, 4)):
        made = trainer(
            tmp_path, llama(len(ours)), llama(len(theirs), seed=1), ours, theirs, rows(ours),
            cross_tokenizer=kind, per_device_train_batch_size=size, max_steps=1, logging_steps=1,
            gradient_accumulation_steps=steps, max_grad_norm=1e9,
        )  # fmt: skip
        made.train()
        log = made.state.log_history[0]
        found.append((log["loss"], log["grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_labels_of_prompts_do_not_count(tmp_path: Path) -> None:
    """Spans count whose tokens all have a label."""
    ours, theirs = small(), other()
    data = rows(ours, 2)
    hidden = [[-100] * 12 + row[12:] for row in data["labels"]]
    masked = Dataset.from_dict({"input_ids": data["input_ids"], "labels": hidden})
    models = llama(len(ours)), llama(len(theirs), seed=1)
    whole, part = (
        trainer(tmp_path, *models, ours, theirs, x, cross_tokenizer="alm").evaluate()
        for x in (data, masked)
    )
    assert whole["eval_alm"] != part["eval_alm"]
    none = [[-100] * len(row) for row in hidden]
    nothing = Dataset.from_dict({"input_ids": data["input_ids"], "labels": none})
    made = trainer(tmp_path, *models, ours, theirs, nothing, cross_tokenizer="both")
    loss, grads = loss_and_gradients(made)
    assert loss == 0 and all((g == 0).all() for g in grads)


# ---- rows of one tokenizer, read to another ----


def test_a_row_that_begins_and_ends_within_characters() -> None:
    ours, theirs = small(), other()
    ids = ours("🙂 def x🙂")["input_ids"]
    told = Retelling(ours, theirs)(ids[2:-2])  # its first and last tokens are half a character
    assert theirs.decode(told.ids, skip_special_tokens=True) == "def x"
    tokens = [ours.convert_ids_to_tokens(ids[2:-2][a:b]) for a, b in told.student_spans.tolist()]
    assert tokens[0][0] in ("Ġ", "Ġdef") and tokens[-1] == ["x"]


def test_a_row_with_half_a_character_inside() -> None:
    ours, theirs = small(), other()
    ids = ours("ab🙂cd ef")["input_ids"]
    del ids[ids.index(ours.convert_tokens_to_ids("Ļ"))]  # F0 9F .. 82
    told = Retelling(ours, theirs)(ids)
    pairs = zip(told.student_spans.tolist(), told.teacher_spans.tolist(), strict=True)
    said = [(ours.decode(ids[a:b]), theirs.decode(told.ids[c:d])) for (a, b), (c, d) in pairs]
    assert len(said) > 2 and all(a.strip() == b.strip() for a, b in said)


def test_the_space_before_a_text_is_not_read_out() -> None:
    ours, theirs = other(), small()
    told = Retelling(ours, theirs)(ours("def x")["input_ids"])
    assert theirs.decode(told.ids) == "def x"


def test_words_are_read_by_their_text() -> None:
    ours = words.tokenizer()
    told = Retelling(ours, small())(ours("w1 w22 [SEP] w3")["input_ids"])
    assert small().decode(told.ids) == "w1 w22<|endoftext|>w3"
    assert len(told.student_spans) == 4


def test_only_what_is_in_a_span_is_asked_of_the_teacher(tmp_path: Path) -> None:
    ours, theirs = small(), other()
    models = llama(len(ours)), llama(len(theirs), seed=1)
    made = trainer(tmp_path, *models, ours, theirs, rows(ours), cross_tokenizer="alm")
    collator = pickle.loads(pickle.dumps(made.data_collator))  # as for a worker
    batch = collator([made.train_dataset[n] for n in range(4)])
    _, read = made._teacher_side.take(batch)
    answers = made._teacher_side(read)
    within = {
        (n, at)
        for n, row in enumerate(answers.teacher_spans.tolist())
        for a, b in row
        for at in range(a, b)
        if a >= 0
    }
    assert {tuple(x) for x in (answers.labels != -100).nonzero().tolist()} == within


def test_special_tokens_become_those_of_the_same_role() -> None:
    ours, theirs = small(), other()
    eos = ours.eos_token_id
    told = Retelling(ours, theirs)([*ours("ab")["input_ids"], eos, *ours("c")["input_ids"]])
    tokens = theirs.convert_ids_to_tokens(told.ids)
    assert tokens[0] == "<s>" and "</s>" in tokens
    spans = told.student_spans.tolist()
    at = len(ours("ab")["input_ids"])
    assert [at, at + 1] in spans  # the end of a text is told, too
    place = tokens.index("</s>")
    assert told.teacher_spans.tolist()[spans.index([at, at + 1])] == [place, place + 1]


def test_a_template_of_the_students_own_is_in_no_span() -> None:
    ours, theirs = byte_level(300, eos_token="<|e|>", cls_token="<|u|>"), other()
    ours.add_special_tokens({"additional_special_tokens": ["<|im|>"]})
    ids = ours("<|im|>hello<|im|>you")["input_ids"]
    told = Retelling(ours, theirs)(ids)
    template = [n for n, i in enumerate(ids) if ours.convert_ids_to_tokens(i) == "<|im|>"]
    assert len(template) == 2
    pairs = zip(told.student_spans.tolist(), told.teacher_spans.tolist(), strict=True)
    for (a, b), (c, d) in pairs:
        assert not any(a <= n < b for n in template)
        assert ours.decode(ids[a:b]).strip() == theirs.decode(told.ids[c:d]).strip()
    assert "im" in theirs.decode(told.ids)


def test_a_teacher_that_reads_less() -> None:
    ours, theirs = small(), other()
    ids = ours(texts()[0][:200])["input_ids"]
    whole, cut = (Retelling(ours, theirs, most)(ids) for most in (None, 20))
    assert len(cut.ids) == 20 and cut.ids == whole.ids[:20]
    assert cut.teacher_spans.max() <= 20 and len(cut.teacher_spans) < len(whole.teacher_spans)


# ---- what a user may get wrong ----


def test_tokenizers_that_differ_name_the_flag(tmp_path: Path) -> None:
    ours, theirs = small(), byte_level(320)
    with pytest.raises(UserError, match=r"the tokenizers differ.*--cross_tokenizer alm"):
        trainer(tmp_path, llama(300), llama(320), ours, theirs, rows(ours))
    with pytest.raises(ValueError, match="--cross_tokenizer alm"):
        trainer(tmp_path, llama(300), llama(2000), ours, None, rows(ours))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cross_tokenizer": "uld"}, "cross_tokenizer='uld': expected one of alm, shared_kl, both"),
        ({"cross_tokenizer": "alm", "terms": ["cosine"]}, "with terms"),
        ({"cross_tokenizer": "alm", "kd_tokens": "all"}, "with kd_tokens='all'"),
        ({"cross_tokenizer": "alm", "label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"cross_tokenizer": "alm", "alm_form": "js"}, "alm_form='js'"),
        ({"cross_tokenizer": "alm", "alm_temperature": 0.0}, "alm_temperature=0.0"),
        ({"cross_tokenizer": "shared_kl", "schedules": ["alm_weight=linear:0"]}, "alm_weight"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistillationArguments(output_dir=str(tmp_path), report_to="none", **settings)


def test_no_tokenizer_of_the_teachers(tmp_path: Path) -> None:
    ours = small()
    with pytest.raises(ValueError, match="teacher_processing_class"):
        trainer(tmp_path, llama(300), llama(300), ours, None, rows(ours), cross_tokenizer="alm")


def test_a_batch_that_was_made_elsewhere(tmp_path: Path) -> None:
    ours = small()
    made = trainer(tmp_path, llama(300), llama(300), ours, ours, rows(ours), cross_tokenizer="alm")
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"make it with trainer.data_collator"):
        made.compute_loss(made.model, {"input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match="--packing blocks or none"):
        made.data_collator.collate = lambda x: {"input_ids": ids, "position_ids": ids}
        made.data_collator([])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = small(), other()
    ours.pad_token = ours.eos_token
    for name, tokenizer, seed in (("student", ours, 0), ("teacher", theirs, 1)):
        llama(len(tokenizer), seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("".join(texts()[:3]), encoding="utf-8")
    command = [
        "distill", "--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student"),
        "--data", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "out"),
        "--block_size", "64", "--max_steps", "2", "--use_cpu", "true", "--report_to", "none",
        "--disable_tqdm", "true", "--logging_steps", "1",
    ]  # fmt: skip
    assert main(command) == 2
    assert "--cross_tokenizer alm" in capsys.readouterr().err
    across = [*command, "--cross_tokenizer", "both", "--schedules", "alm_weight=linear:0"]
    assert main(across) == 0
    assert "1 x ALM + 1 x forward_kl over the shared vocabulary" in capsys.readouterr().out
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path / "out")) == len(ours)
