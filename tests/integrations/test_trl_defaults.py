"""The drop-ins in TRL's own defaults (bf16, gradient checkpointing, models by path, generation) and
its ULD. No network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import byte_llama as tiny
import pytest
import torch
import transformers as tf
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trl.experimental import gkd, gold

from fusedkd.integrations import trl as ours
from fusedkd.integrations.transformers import DistillationMixin

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = Dataset.from_list([{"prompt": "prompts"[i % 4 :]} for i in range(8)])
# of each trainer its module in TRL, its config, its data, and what keeps it from writing more than
# the models have positions for
HOSTS: dict[str, Any] = {
    "GKDTrainer": (gkd, gkd.GKDConfig, tiny.conversations(), "max_new_tokens"),
    "GOLDTrainer": (gold, gold.GOLDConfig, tiny.conversations(), "max_completion_length"),
    "DistillationTrainer": (trl, trl.DistillationConfig, PROMPTS, "max_completion_length"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Student and teacher as people have them, with their tokenizer."""
    found = []
    for seed in (1, 2):
        path = str(tmp_path_factory.mktemp("model"))
        tiny.build(seed).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        found.append(path)
    return found


def train(module: Any, name: str, paths: Any, out: Path, **options: Any) -> Any:
    """A trainer that has made one step, all but its output and its length by default."""
    _, config, data, length = HOSTS[name]
    args = config(
        str(out),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=1,
        **{length: 5},
        **options,
    )
    trainer = getattr(module, name)(
        *paths, args=args, train_dataset=data, processing_class=tiny.tokenizer()
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", HOSTS)
def test_defaults(name: str, paths: list[str], tmp_path: Path) -> None:
    trainer = train(ours, name, paths, tmp_path)
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    if name != "DistillationTrainer":
        assert trainer._student_head.found and trainer._teacher_side.head


@pytest.mark.parametrize(
    "student, teacher", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")]
)
@pytest.mark.parametrize("name", HOSTS)
def test_defaults_are_trls(
    name: str, student: str, teacher: str, paths: list[str], tmp_path: Path
) -> None:
    """Off policy, where TRL counts the tokens that it trains on."""
    found = []
    for module in (ours, HOSTS[name][0]):
        options: dict[str, Any] = {"model_init_kwargs": {"dtype": student}}
        options |= {"teacher_model_init_kwargs": {"dtype": teacher}}  # which TRL writes into
        options |= {"lmbda": 0.0} if name != "DistillationTrainer" else {}
        log = train(module, name, paths, tmp_path, **options).state.log_history[0]
        found.append([log["loss"], log["grad_norm"]])
    assert found[0] == pytest.approx(found[1], rel=2e-2)


class Sft(DistillationMixin, trl.SFTTrainer):
    pass


def test_sft_trainer_with_the_mixin(paths: list[str], tmp_path: Path) -> None:
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = trl.SFTConfig(str(tmp_path), **options, logging_steps=1, max_steps=1)
    data = Dataset.from_list([{"text": "some words"}, {"text": "a few more of them"}])
    trainer = Sft(paths[0], args, train_dataset=data)
    assert args.bf16 and args.gradient_checkpointing
    student, teacher = (tf.AutoModelForCausalLM.from_pretrained(path) for path in paths)
    trainer.distil_from(teacher)
    trainer.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch.pop("labels")[:, 1:]
    lq, lp = (model(**batch).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    want = (lp.exp() * (lp - lq)).sum(-1)[labels != -100].mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want.item(), rel=2e-2)
    args.loss_type = "dft"
    with pytest.raises(ValueError, match=r"loss_type='dft'.*expected 'nll'"):
        trainer.distil_from(teacher)


@pytest.mark.parametrize("kind", ["gkd", "gold"])
@pytest.mark.parametrize("how", ["compiled", "resized", "experts"])
def test_other_models_are_trls(how: str, kind: str, tmp_path: Path) -> None:
    make, module = tiny.TRAINERS[kind]
    options: dict[str, Any] = {"lmbda": 0.0, "seed": 3}
    if how == "compiled":
        options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    found = []
    for host in (ours, module):
        models = [tiny.build(1), tiny.build(2)]
        if how == "experts":
            torch.manual_seed(0)
            small = {"num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": tiny.V}
            shape = {k: getattr(models[1].config, k) for k in ("hidden_size", "intermediate_size")}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
            models[0] = tf.MixtralForCausalLM(tf.MixtralConfig(**small, **shape, **heads))
        trainer = make(host, tmp_path, *models, **options)
        for model in models if how == "resized" else ():  # after construction
            model.resize_token_embeddings(tiny.V + 3)
        trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], rel=1e-4)


# ---- ULD -----------------------------------------------------------------------------------------


def other_tokenizer(path: str) -> int:
    """One that merges, saved; its size."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["answers ask answers"] * 3, learn)
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, chat_template=tiny.tokenizer().chat_template
    )
    made.save_pretrained(path)
    return len(made)


@pytest.mark.parametrize("hybrid", [False, True])
def test_uld_is_a_mean_over_a_step(hybrid: bool, tmp_path: Path) -> None:
    """TRL's in one micro-batch, and the same in two, where TRL's is twice as large."""
    size, found = other_tokenizer(str(tmp_path)), {}
    options: dict[str, Any] = {"lmbda": 0.0, "max_steps": 1, "learning_rate": 0.0, "seed": 3}
    options |= {"use_uld_loss": True, "teacher_tokenizer_name_or_path": str(tmp_path)}
    options |= {"uld_use_hybrid_loss": hybrid}
    for module, steps in ((gold, 1), (ours, 1), (ours, 2), (ours, 4)):
        teacher = tiny.build(2)
        teacher.resize_token_embeddings(size)
        trainer = tiny.gold_trainer(
            *(module, tmp_path, tiny.build(1), teacher),
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
            **options,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        # its parts are logged for the last row of each micro-batch only
        part = log["matched_loss"] if hybrid else 0.0
        found[module is gold, steps] = [log["loss"], log["grad_norm"]], part
    want, matched = found.pop((True, 1))
    for numbers, part in found.values():
        assert numbers == pytest.approx(want, rel=1e-3)
        assert part == pytest.approx(matched, rel=0.2)
