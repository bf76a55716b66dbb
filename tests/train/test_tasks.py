"""Every task: loss and gradient are those of the two models' own answers, written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from families import assert_same, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd.integrations.transformers import DistillationMixin
from fusedkd.train import DistillationArguments, DistillationTrainer

V, B, L = 67, 3, 8
BERT = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 32}
BART = {"vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24}
BART |= {"decoder_ffn_dim": 24, "max_position_embeddings": 32, "pad_token_id": 1}
BART |= {"decoder_start_token_id": 2}
T5 = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 4}
VIT |= {"intermediate_size": 24, "image_size": 8, "patch_size": 4}
AST = {k: v for k, v in VIT.items() if k != "image_size"}
AST |= {"frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}


def spread(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def bert(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, f"BertFor{kind}")(tf.BertConfig(**BERT, **more))


def seq2seq(name: str, config: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, name)(getattr(tf, config)(**BART, **more))


def whisper() -> Any:
    sizes = {k: v for k, v in BART.items() if k not in ("max_position_embeddings", "pad_token_id")}
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **sizes, num_mel_bins=8, max_source_positions=20, max_target_positions=30,
            pad_token_id=0, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def t5() -> Any:
    return tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(3 if high == V else 0, high, shape)


def texts() -> dict[str, Tensor]:
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": integers(V, B, L), "attention_mask": mask}


def ignored(labels: Tensor) -> Tensor:
    labels[0, :2] = labels[1, 4:] = -100
    return labels


def softmaxes(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    keep = labels != -100
    s, t, labels = s[keep], t[keep], labels[keep]
    kd = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True)
    return kd / len(labels), F.cross_entropy(s, labels)


def sigmoids(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    p, q = t.sigmoid(), s.sigmoid()
    kd = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return kd.mean(), F.binary_cross_entropy_with_logits(s, labels.float())


def numbers(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    s, t = s.squeeze(-1), t.squeeze(-1)
    return F.mse_loss(s, t), F.mse_loss(s, labels)


Case = tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], Callable[..., Any]]


def labelled(inputs: Callable[[], dict[str, Tensor]], labels: Callable[[], Tensor]) -> Any:
    return lambda: {**inputs(), "labels": labels()}


CASES: dict[str, Case] = {
    "sequence": (bert("SequenceClassification", num_labels=3),
                 labelled(texts, lambda: integers(3, B)), softmaxes),
    "multi-label": (bert("SequenceClassification", num_labels=3,
                         problem_type="multi_label_classification"),
                    labelled(texts, lambda: integers(2, B, 3).float()), sigmoids),
    "multi-label, by its labels": (bert("SequenceClassification", num_labels=3),
                                   labelled(texts, lambda: integers(2, B, 3).float()), sigmoids),
    "regression": (bert("SequenceClassification", num_labels=1, problem_type="regression"),
                   labelled(texts, lambda: torch.tensor([0.5, -100.0, 3.0])), numbers),
    "regression, several": (bert("SequenceClassification", num_labels=2,
                                 problem_type="regression"),
                            labelled(texts, lambda: torch.randn(B, 2)), numbers),
    "tokens": (bert("TokenClassification", num_labels=5),
               labelled(texts, lambda: ignored(integers(5, B, L))), softmaxes),
    "choices": (bert("MultipleChoice"),
                lambda: {"input_ids": integers(V, B, 4, L), "labels": integers(4, B)}, softmaxes),
    "recordings": (lambda: tf.ASTForAudioClassification(tf.ASTConfig(**AST)),
                   lambda: {"input_values": torch.randn(B, 16, 8), "labels": integers(4, B)},
                   softmaxes),
    "images": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT)),
               lambda: {"pixel_values": torch.randn(B, 3, 8, 8), "labels": integers(4, B)},
               softmaxes),
    "t5": (t5, labelled(texts, lambda: ignored(integers(V, B, 6))), softmaxes),
    "bart": (seq2seq("BartForConditionalGeneration", "BartConfig"),
             labelled(texts, lambda: ignored(integers(V, B, 6))), softmaxes),
    "mbart": (seq2seq("MBartForConditionalGeneration", "MBartConfig"),
              labelled(texts, lambda: ignored(integers(V, B, 6))), softmaxes),
    "marian": (seq2seq("MarianMTModel", "MarianConfig"),
               labelled(texts, lambda: ignored(integers(V, B, 6))), softmaxes),
    "pegasus": (seq2seq("PegasusForConditionalGeneration", "PegasusConfig"),
                labelled(texts, lambda: ignored(integers(V, B, 6))), softmaxes),
    "m2m100": (seq2seq("M2M100ForConditionalGeneration", "M2M100Config"),
               labelled(texts, lambda: ignored(integers(V, B, 6))), softmaxes),
    "whisper": (whisper, lambda: {"input_features": torch.randn(B, 8, 40),
                                  "labels": ignored(integers(V, B, 6))}, softmaxes),
}  # fmt: skip


class Mine(DistillationMixin, tf.Trainer):
    pass


def arguments(kind: Any, out: Path, **more: Any) -> Any:
    return kind(str(out), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **more)


@pytest.mark.parametrize("host", ["trainer", "mixin"])
@pytest.mark.parametrize("case", CASES)
def test_a_task(case: str, host: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, data, losses = CASES[case]
    student, teacher, batch = spread(make()), spread(make()), data()
    weights = {"kd_weight": 0.7, "ce_weight": 0.3}
    tested: Any
    if host == "trainer":
        args = arguments(DistillationArguments, tmp_path, **weights)
        tested = DistillationTrainer(student, teacher, args)
    else:
        tested = Mine(student, arguments(tf.TrainingArguments, tmp_path))
        tested.distil_from(teacher, **weights)
    items = tested._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = tested.compute_loss(student, dict(batch), num_items_in_batch=items)
    assert (tested._student_head.found is not None) == tested._task.over_tokens
    loss.backward()
    found = gradients(student)
    student.zero_grad()
    outputs = [model(**batch).logits for model in (student, teacher)]
    kd, hard = losses(outputs[0], outputs[1].detach(), batch["labels"])
    (0.7 * kd + 0.3 * hard).backward()
    torch.testing.assert_close(loss, 0.7 * kd + 0.3 * hard, rtol=1e-4, atol=1e-6)
    found = {name: gradient for name, gradient in found.items() if gradient.any()}
    want = {name: gradient for name, gradient in gradients(student).items() if gradient.any()}
    assert_same(found, want, rtol=2e-3, atol=1e-5)


def test_question_answering(tmp_path: Path) -> None:
    """Two distributions over positions: asked for by name."""
    torch.manual_seed(0)
    student, teacher = (spread(bert("QuestionAnswering")()) for _ in range(2))
    places = {"start_positions": torch.tensor([1, 2, L]), "end_positions": torch.tensor([3, 4, 5])}
    batch = {**texts(), **places}
    with pytest.raises(ValueError, match="task='question_answering'"):
        DistillationTrainer(student, teacher, arguments(DistillationArguments, tmp_path))
    args = arguments(DistillationArguments, tmp_path, task="question_answering", ce_weight=1.0)
    tested = DistillationTrainer(student, teacher, args)
    items = tested._get_num_items_in_batch([batch], torch.device("cpu"))
    assert items == 5  # one is beyond the text
    found = tested.compute_loss(student, dict(batch), num_items_in_batch=items)
    with torch.no_grad():
        s, t = student(**texts_of(batch)), teacher(**texts_of(batch))
    stacked = [torch.stack([x.start_logits, x.end_logits], 1) for x in (s, t)]
    labels = torch.tensor([[1, 3], [2, 4], [-100, 5]])
    torch.testing.assert_close(found.detach(), sum(softmaxes(*stacked, labels)))


def texts_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("case", ["sequence", "multi-label", "regression", "tokens", "images"])
def test_training_and_evaluation(case: str, tmp_path: Path) -> None:
    """Perplexity is of language models alone; a regression is judged by its squared error."""
    torch.manual_seed(0)
    make, data, losses = CASES[case]
    student, teacher, batch = spread(make()), spread(make()), data()
    rows = Dataset.from_dict({name: column.tolist() for name, column in batch.items()})
    args = arguments(
        DistillationArguments, tmp_path, max_steps=2, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=B,
    )  # fmt: skip
    tested = DistillationTrainer(
        student, teacher, args, train_dataset=rows, eval_dataset=rows,
        data_collator=tf.default_data_collator,
    )  # fmt: skip
    before = tested.evaluate()
    with torch.no_grad():
        outputs = [model(**batch).logits for model in (student, teacher)]
        kd, hard = losses(*outputs, batch["labels"])
    assert before["eval_loss"] == pytest.approx(float(hard), rel=1e-4)
    assert before["eval_kd"] == pytest.approx(float(kd), rel=1e-3)
    assert "eval_perplexity" not in before
    tested.train()
    assert tested.evaluate()["eval_kd"] < before["eval_kd"]


# ---- who does what -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["NextSentencePrediction", "PreTraining"])
def test_a_head_that_is_not_known(kind: str, tmp_path: Path) -> None:
    student, teacher = bert(kind)(), bert(kind)()
    with pytest.raises(ValueError, match=f"the student is a BertFor{kind}, whose head is none"):
        DistillationTrainer(student, teacher, arguments(DistillationArguments, tmp_path))
    with pytest.raises(ValueError, match=f"the teacher is a BertFor{kind}"):
        DistillationTrainer(bert("MaskedLM")(), teacher, arguments(DistillationArguments, tmp_path))


def test_bodies_and_modules_are_no_students(tmp_path: Path) -> None:
    body = tf.BertModel(tf.BertConfig(**BERT))
    with pytest.raises(ValueError, match="BertModel"):
        DistillationTrainer(body, body, arguments(DistillationArguments, tmp_path))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (bert("MaskedLM"), bert("TokenClassification"), "a masked model, the teacher"),
        (bert("TokenClassification", num_labels=3), bert("TokenClassification", num_labels=4),
         "one set of classes"),
        (bert("SequenceClassification", num_labels=1), bert("SequenceClassification",
         num_labels=1), "num_labels=1"),
        (bert("SequenceClassification", num_labels=3, problem_type="regression"),
         bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
         "problem_type"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(
    student: Callable[[], nn.Module], teacher: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(student(), teacher(), arguments(DistillationArguments, tmp_path))


class Own(tf.BertForMaskedLM):
    """Of somebody's own, known by what it inherits from."""


class Ensemble(nn.Module):
    """The mean of two models' probabilities."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        parts = [m(input_ids, attention_mask=attention_mask).logits for m in self.models]
        mean = torch.stack(parts).softmax(-1).mean(0)
        return {"logits": mean.log()}


def test_teachers_of_one_s_own(tmp_path: Path) -> None:
    """A module without a config, which reads other columns than the student."""
    torch.manual_seed(0)
    config = tf.BertConfig(**BERT)
    student = spread(Own(config))
    teacher = Ensemble(*(spread(tf.BertForMaskedLM(config)) for _ in range(2)))
    args = arguments(DistillationArguments, tmp_path)
    tested = DistillationTrainer(student, teacher, args)
    assert tested._task.name == "masked"
    labels = ignored(integers(V, B, L))
    batch = {**texts(), "token_type_ids": torch.ones(B, L, dtype=torch.long), "labels": labels}
    found = tested.compute_loss(student, dict(batch))
    with torch.no_grad():
        del batch["labels"]
        t = teacher(**texts_of(batch))["logits"]
        want, _ = softmaxes(student(**batch).logits, t, labels)
    torch.testing.assert_close(found.detach(), want)


def test_each_decoder_gets_its_own_inputs(tmp_path: Path) -> None:
    """A Pegasus begins with padding, a BART with the end of text."""
    torch.manual_seed(0)
    student, teacher = spread(CASES["bart"][0]()), spread(CASES["marian"][0]())
    teacher.config.decoder_start_token_id = 5
    tested = DistillationTrainer(student, teacher, arguments(DistillationArguments, tmp_path))
    batch = CASES["bart"][1]()
    found = tested.compute_loss(student, dict(batch))
    with torch.no_grad():
        want, _ = softmaxes(student(**batch).logits, teacher(**batch).logits, batch["labels"])
    torch.testing.assert_close(found.detach(), want, rtol=1e-4, atol=1e-6)


class Typed(tf.LlamaForCausalLM):
    """A decoder that reads token_type_ids, and something for each row."""

    def forward(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        row_values: Any = None,
        inputs_embeds: Any = None,
        **rest: Any,
    ) -> Any:
        embeds = self.model.embed_tokens(input_ids) + token_type_ids[..., None].float()
        embeds = embeds + row_values[:, None, None]
        return super().forward(inputs_embeds=embeds, **rest)


def test_what_the_student_writes_keeps_the_teacher_s_columns(tmp_path: Path) -> None:
    """Columns that only the teacher reads come with on-policy batches, too."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    student, teacher = spread(tf.LlamaForCausalLM(config)), spread(Typed(config))
    labels = integers(V, B, L)
    labels[:, :5] = -100
    types = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3]).expand(B, L)
    batch = {**texts(), "labels": labels, "token_type_ids": types, "row_values": torch.randn(B)}
    batch["attention_mask"][:] = 1
    args = arguments(DistillationArguments, tmp_path, on_policy_share=1.0, on_policy_new_tokens=3)
    tested = DistillationTrainer(student, teacher, args)
    assert {"token_type_ids", "row_values"} <= set(tested._signature_columns)
    (written,), items = tested.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert written["input_ids"][:, :5].equal(batch["input_ids"][:, :5])
    width = written["input_ids"].shape[1]
    assert written["token_type_ids"].tolist() == [[0, 0, 1, 1, 2] + [2] * (width - 5)] * B
    found = tested.compute_loss(student, dict(written), num_items_in_batch=items)
    y = F.pad(written.pop("labels"), (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        t = teacher(**written).logits
        s = student(**texts_of(written)).logits
    torch.testing.assert_close(found.detach(), softmaxes(s, t, y)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("larger", [0, 1])
def test_padding_that_one_model_does_not_know(larger: int, tmp_path: Path) -> None:
    """The everyday line: a padding token is added, and one of the models resized."""
    torch.manual_seed(0)
    pair = [spread(bert("MaskedLM")()) for _ in range(2)]
    pair[larger].resize_token_embeddings(V + 1)
    batch = {**texts(), "labels": ignored(integers(V, B, L))}
    args = arguments(DistillationArguments, tmp_path)
    tested = DistillationTrainer(*pair, args)
    padded = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, V)
    found = tested.compute_loss(pair[0], {**batch, "input_ids": padded})
    with torch.no_grad():
        logits = [model(**texts_of(batch)).logits[..., :V] for model in pair]
    want = softmaxes(*logits, batch["labels"])[0]
    torch.testing.assert_close(found.detach(), want, rtol=1e-4, atol=1e-6)
    padded[0, 0] = V
    with pytest.raises(ValueError, match=f"input_ids holds {V}: the BertForMaskedLM knows {V}"):
        tested.compute_loss(pair[0], {**batch, "input_ids": padded})


def test_an_encoder_decoder_has_answers_at_its_labels_alone(tmp_path: Path) -> None:
    arguments = DistillationArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", kd_tokens="all"
    )
    with pytest.raises(ValueError, match=r"kd_tokens='all'.*encoder-decoder.*'labels'"):
        DistillationTrainer(t5(), t5(), arguments)
