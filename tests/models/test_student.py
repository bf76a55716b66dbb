"""Students made out of teachers: exact sizes, exact copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from fusedkd.cli import main
from fusedkd.models.layers import layer_pairs, pick_layers
from fusedkd.students.copy import StudentPlan, build_student

pytestmark = pytest.mark.usefixtures("one_thread")

V, LAYERS = 67, 4
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {"num_key_value_heads": 1, **SPECIAL}
BERT: dict[str, Any] = {**SIZES, "max_position_embeddings": 32, "initializer_range": 0.3}


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    makers = {
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**{**BERT, **changes})),
        "bert_classifier": lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**BERT, num_labels=3)
        ),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=V, n_embd=16, n_layer=LAYERS, n_head=2, **SPECIAL)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **GQA)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, **GQA)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, **GQA, head_dim=8)),
        "gemma3": lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                **SIZES, **GQA, head_dim=8, sliding_window=4, sliding_window_pattern=2
            )
        ),
        "modernbert": lambda: tf.ModernBertForMaskedLM(
            tf.ModernBertConfig(**SIZES, **SPECIAL, cls_token_id=1, sep_token_id=2)
        ),
        "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**SIZES, embedding_size=8)),
        "albert_groups": lambda: tf.AlbertForMaskedLM(
            tf.AlbertConfig(**SIZES, embedding_size=8, num_hidden_groups=LAYERS)
        ),
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, **GQA, num_local_experts=LAYERS)
        ),
    }
    model = makers[kind]().eval()
    with torch.no_grad():  # no bias or gain at its usual start, which a wrong copy would share
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


KINDS = [
    "bert", "bert_classifier", "gpt2", "llama", "qwen2", "qwen3", "gemma3", "modernbert", "albert",
    "albert_groups", "mixtral",
]  # fmt: skip


def ids() -> torch.Tensor:
    return torch.randint(3, V, (2, 10), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(ids()).logits


# ---- sizes of the papers' students -------------------------------------------------------------


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("plan", "vocabulary", "parameters"),
    [
        (StudentPlan(6, to="distilbert"), 30_522, 66_362_880),
        (StudentPlan(4, hidden=312, intermediate=1200), 30_522, 14_350_248),  # TinyBERT4
        (StudentPlan(6), 30_522, 66_955_008),  # TinyBERT6
        (StudentPlan(12, to="albert"), 30_000, 11_683_584),
        (StudentPlan(12, to="albert", groups=12), 30_000, 89_650_176),
    ],
)
def test_sizes_of_bert_s_students(plan: StudentPlan, vocabulary: int, parameters: int) -> None:
    with torch.device("meta"):
        teacher = tf.BertModel(tf.BertConfig(vocab_size=vocabulary))
        assert count(build_student(teacher, plan)) == parameters
    assert count(teacher) == 109_482_240 - (30_522 - vocabulary) * 768


def test_size_of_distilgpt2() -> None:
    with torch.device("meta"):
        teacher = tf.GPT2LMHeadModel(tf.GPT2Config())
        assert count(build_student(teacher, StudentPlan(6))) == 81_912_576
    assert count(teacher) == 124_439_808


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3", "albert_groups"])
def test_a_narrower_student_is_one_that_loads_and_learns(kind: str, tmp_path: Path) -> None:
    student = build_student(build(kind), StudentPlan(2, hidden=8, intermediate=12))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)
    assert again.config.num_hidden_layers == 2 and again.config.hidden_size == 8
    student(ids(), labels=ids()).loss.backward()


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_full_depth_is_the_teacher(kind: str) -> None:
    teacher = build(kind)
    student = build_student(teacher, StudentPlan(LAYERS))
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=0)
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert not any(p.data_ptr() in theirs for p in student.parameters())  # a copy, not a view


@pytest.mark.parametrize("kind", ["llama", "gpt2", "modernbert"])
def test_a_copy_in_bf16_rounds_no_more_than_the_teacher(kind: str, tmp_path: Path) -> None:
    """Rotary frequencies stay in fp32, as in a model that is loaded in bf16."""
    build(kind).save_pretrained(tmp_path)
    teacher = type(build(kind)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    student = build_student(teacher, StudentPlan(LAYERS))
    assert student.dtype == torch.bfloat16
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("albert", "modernbert")])
def test_fewer_layers_are_the_teacher_without_the_others(kind: str, tmp_path: Path) -> None:
    teacher = build(kind)
    student = build_student(teacher, StudentPlan(2, layer_map="1,3"))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)  # the config is one that loads
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)
    found = student.state_dict()
    for name, value in teacher.state_dict().items():
        for ours, theirs in ((".0.", ".1."), (".1.", ".3.")):
            if theirs in name and name.replace(theirs, ours, 1) in found and "expert" not in name:
                assert torch.equal(found[name.replace(theirs, ours, 1)], value)
    types = getattr(teacher.config, "layer_types", None)
    if types is not None:
        assert student.config.layer_types == [types[1], types[3]]


def test_what_is_listed_per_layer_is_cut_with_the_layers() -> None:
    teacher = build("gemma3")
    assert len(set(teacher.config.layer_types)) == 2
    student = build_student(teacher, StudentPlan(2, layer_map="first"))
    teacher.model.layers = teacher.model.layers[:2]
    teacher.config.num_hidden_layers = 2
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=0)


def test_distilbert_of_full_depth_gives_bert_s_logits() -> None:
    teacher = build("bert")
    student = build_student(teacher, StudentPlan(LAYERS, to="distilbert"))
    assert isinstance(student, tf.DistilBertForMaskedLM)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-5)
    words = student.distilbert.embeddings.word_embeddings.weight
    assert student.vocab_projector.weight.data_ptr() == words.data_ptr()


@pytest.mark.parametrize("groups", [LAYERS, 1])
def test_albert_gets_bert_s_embeddings_and_layers(groups: int, tmp_path: Path) -> None:
    """At the teacher's width its tables hold all of the teacher's, so hidden states are equal."""
    teacher = build("bert")
    for layer in teacher.bert.encoder.layer if groups == 1 else []:  # equal: the mean is
        layer.load_state_dict(teacher.bert.encoder.layer[0].state_dict())
    plan = StudentPlan(LAYERS, to="albert", groups=groups, embedding=16)
    student = build_student(teacher, plan).eval()
    with torch.no_grad():
        ours, theirs = student.albert(ids())[0], teacher.bert(ids())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    student.save_pretrained(tmp_path)
    again = tf.AlbertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)


def test_a_narrow_table_is_the_best_of_its_rank() -> None:
    teacher = build("bert")
    student = build_student(teacher, StudentPlan(2, to="albert", embedding=6)).double()
    rows = teacher.bert.embeddings.word_embeddings.weight.detach().double()
    rows = rows - rows.mean(-1, keepdim=True)
    table = student.albert.embeddings.word_embeddings.weight.detach()
    lost = torch.linalg.svdvals(rows)[5:].square().sum()
    assert (rows.square().sum() - table.square().sum()).item() == pytest.approx(
        lost.item(), rel=1e-5
    )
    assert table.sum(-1).abs().max() < 1e-5


def test_a_shared_layer_s_gradient_is_the_sum_over_its_applications() -> None:
    shared = build_student(build("bert"), StudentPlan(3, to="albert"))
    config = tf.AlbertConfig.from_dict({**shared.config.to_dict(), "num_hidden_groups": 3})
    unshared = tf.AlbertForMaskedLM(config).eval()
    one = "albert.encoder.albert_layer_groups.0."
    weights = {
        name.replace(one, f"{one[:-2]}{i}."): value
        for name, value in shared.state_dict().items()
        for i in range(3)
    }
    unshared.load_state_dict(weights)
    for model in (shared.eval(), unshared):
        model(ids(), labels=ids()).loss.backward()
    found = {n: p.grad for n, p in unshared.named_parameters()}
    for name, parameter in shared.named_parameters():
        if name.startswith(one):
            expected = sum(found[name.replace(one, f"{one[:-2]}{i}.")] for i in range(3))
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


# ---- maps and mistakes -------------------------------------------------------------------------


def test_maps() -> None:
    assert pick_layers("spaced", 6, 12) == [0, 2, 4, 7, 9, 11]
    assert pick_layers("spaced", 3, 12) == [0, 6, 11]
    assert pick_layers("spaced", 1, 12) == [0]
    assert pick_layers("first", 3, 12) == [0, 1, 2] and pick_layers("last", 2, 12) == [10, 11]
    assert pick_layers("0, 5,5", 3, 6) == [0, 5, 5]
    assert layer_pairs("uniform", 4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert layer_pairs("uniform", 4, 6) == [(1, 2), (2, 3), (3, 5), (4, 6)]
    assert layer_pairs("last", 4, 12) == [(4, 12)]
    assert layer_pairs("3 6 9 12", 4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert layer_pairs("0-0 4-12", 4, 12, first=0) == [(0, 0), (4, 12)]
    for wrong in ("3 6", "0-0", "5-12", "4-13", "", "every", "1-x"):
        with pytest.raises(ValueError, match="layers="):
            layer_pairs(wrong, 4, 12)


@pytest.mark.parametrize(
    ("kind", "plan", "message"),
    [
        ("bert", StudentPlan(5), "layers=5"),
        ("bert", StudentPlan(0), "layers=0"),
        ("bert", StudentPlan(2, "0,4"), "map='0,4'"),
        ("bert", StudentPlan(2, "0,x"), "'x'"),
        ("bert", StudentPlan(2, to="gpt2"), "to='gpt2'"),
        ("bert", StudentPlan(2, hidden=15), "hidden=15"),
        ("bert", StudentPlan(2, to="distilbert", hidden=8), "widths"),
        ("llama", StudentPlan(2, to="distilbert"), "LlamaForCausalLM"),
        ("llama", StudentPlan(2, to="albert"), "LlamaForCausalLM"),
        ("bert", StudentPlan(2, to="albert", groups=3), "groups=3"),
        ("bert", StudentPlan(2, to="albert", embedding=17), "embedding=17"),
        ("modernbert", StudentPlan(2, "last"), "another map"),
    ],
)
def test_mistakes_are_named(kind: str, plan: StudentPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(build(kind), plan)


def test_a_bert_with_another_eps_is_no_distilbert() -> None:
    with pytest.raises(ValueError, match="eps"):
        build_student(build("bert", layer_norm_eps=1e-5), StudentPlan(2, to="distilbert"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("bert").save_pretrained(tmp_path / "teacher")
    command = ["student", "--from", str(tmp_path / "teacher"), "--to", "distilbert", "--layers"]
    out = tmp_path / "student"
    assert main([*command, "2", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    student = tf.AutoModelForMaskedLM.from_pretrained(out)
    assert f"{student.num_parameters():,} parameters" in said and "%" in said
    assert [path.name for path in out.glob("*.bin")] == []
    assert main([*command, "2", "--output", str(out)]) == 2  # not over somebody's files
    assert main([*command, "9", "--output", str(tmp_path / "other")]) == 2
    assert "layers=9" in capsys.readouterr().err
