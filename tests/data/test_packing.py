"""What becomes of rows: whole ones, blocks, or several in one row that stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from chats import CHATML, assistant, tokenizer, user
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from words import SIZES, V, bert, gpt2, llama

from fusedkd.data.packing import best_fit, collator
from fusedkd.data.rows import Encoder, encode
from fusedkd.data.text import default_packing, pack
from fusedkd.errors import UserError
from fusedkd.models.columns import spans
from fusedkd.models.positions import check_keeps_apart, check_length, most_positions
from fusedkd.train import DistillationArguments, DistillationTrainer
from fusedkd.train.on_policy import OnPolicy

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.lists(st.integers(0, 20), max_size=40))
@settings(deadline=None, max_examples=50)
def test_best_fit_puts_every_row_into_one_bin(lengths: list[int]) -> None:
    bins = best_fit(lengths, 20)
    assert sorted(place for members in bins for place in members) == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in members) for members in bins]
    assert all(total <= 20 for total in sums)
    # no two bins fit into one, which a first fit would have done, too
    assert sum(total <= 10 for total in sums if total) <= 1


def conversations(n: int = 12) -> Dataset:
    rows = [[user("ab" * (i % 4)), assistant("cd" * (1 + i % 3))] for i in range(n)]
    return Dataset.from_list([{"messages": row} for row in rows])


def test_conversations_are_whole_unless_it_is_asked_for() -> None:
    reader = tokenizer(CHATML)
    start = reader.convert_tokens_to_ids("<|im_start|>")
    whole = pack(conversations(), reader, 200)
    assert len(whole) == 12 and all(row["input_ids"][0] == start for row in whole)
    flat = pack(conversations(), reader, 90, "flatten")
    apart = [list(row["input_ids"]) for row in whole]
    for row in flat:
        assert len(row["input_ids"]) <= 90
        begins = [n for n, place in enumerate(row["position_ids"]) if place == 0]
        for a, b in zip(begins, [*begins[1:], None], strict=True):
            apart.remove(row["input_ids"][a:b])
            assert row["labels"][a] == -100
    assert not apart and len(flat) < 12
    cut = pack(conversations(), reader, 64, "blocks")
    assert {len(row["input_ids"]) for row in cut} == {64}
    joined = [token for row in whole for token in row["input_ids"]]
    assert [t for row in cut for t in row["input_ids"]] == joined[: len(cut) * 64]


def test_what_is_cut_by_default() -> None:
    assert default_packing(["text"]) == default_packing(["input_ids"]) == "blocks"
    for columns in (["messages"], ["prompt", "completion"], ["prompt"], ["input_ids", "labels"]):
        assert default_packing(columns) == "none"


def test_long_rows_are_truncated_and_those_without_an_answer_left_out() -> None:
    reader = tokenizer(CHATML)
    long = [[user("a" * 99), assistant("b")], [user("a"), assistant("b" * 99)]]
    data = Dataset.from_list([{"messages": row} for row in long])
    rows = pack(data, reader, 60)
    assert [len(row) for row in rows["input_ids"]] == [60]
    assert rows[0]["labels"][-1] == rows[0]["input_ids"][-1] != -100
    with pytest.raises(ValueError, match="no row has an answer"):
        pack(data, reader, 10)


# ---- several sequences in one row --------------------------------------------------------------

MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=12, sliding_window=8)
    ),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_flattened_loss_and_gradient_are_those_of_padded_rows(
    name: str, attention: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    lengths, generator = [9, 3, 14, 5], torch.Generator().manual_seed(1)
    ids = [torch.randint(5, V, (n,), generator=generator).tolist() for n in lengths]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    # eager attention and Gemma's norms compute in fp32, whatever the model is in
    kind = torch.float64 if attention == "sdpa" else torch.float32
    close = 1e-12 if attention == "sdpa" and name != "gemma3" else 1e-5
    student, teacher = (MODELS[name]().to(kind).eval() for _ in range(2))
    for model in (student, teacher):
        model.set_attn_implementation(attention)
        check_keeps_apart("student", model)
    found = []
    for packing in ("none", "flatten"):
        rows = pack(data, None, 20, packing)
        args = DistillationArguments(
            str(tmp_path), use_cpu=True, report_to="none", divergence="jsd", ce_weight=0.5,
            backend="reference", save_strategy="no",
        )  # fmt: skip
        batcher = collator(packing, tokenizer(None))
        trainer = DistillationTrainer(
            student, teacher, args, train_dataset=rows, data_collator=batcher
        )
        batch = batcher([dict(row) for row in trainer.train_dataset])
        assert ("attention_mask" in batch) == (packing == "none")
        student.zero_grad()
        loss = trainer.compute_loss(student, batch)
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in student.parameters()]))
    (padded, ours), (flat, theirs) = found
    assert flat == pytest.approx(padded, rel=close)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= close * a.norm()


SMALL = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2}
READ_ON = {
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SMALL, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=24)
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**SMALL)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**SMALL, n_head=2)),
}


@pytest.mark.parametrize("model", READ_ON.values(), ids=READ_ON)
def test_models_that_read_on_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"--packing flatten: the student .*: expected"):
        check_keeps_apart("student", model())


# ---- lengths -----------------------------------------------------------------------------------


def test_positions_that_a_model_has() -> None:
    assert most_positions(gpt2().config) == most_positions(llama().config) == 64
    assert most_positions(tf.RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert most_positions(tf.BloomConfig()) is None
    check_length("student", bert().config, 64)
    with pytest.raises(ValueError, match=r"--max_length \(--block_size\).*65.*teacher has 64"):
        check_length("teacher", bert().config, 65)


# ---- prompts -----------------------------------------------------------------------------------


def written_prompts(rows: Dataset, packing: str, length: int = 200) -> list[list[int]]:
    reader = tokenizer(CHATML)
    packed = pack(rows, reader, length, packing)
    batch = collator(packing, reader)([dict(row) for row in packed])
    prompts, mask = OnPolicy(1.0, 6, 4, 1.0).prompts(batch, 0)
    return sorted(row[there.bool()].tolist() for row, there in zip(prompts, mask, strict=True))


@pytest.mark.parametrize("packing", ["none", "flatten"])
def test_prompts_are_what_comes_before_the_last_answer(packing: str) -> None:
    several = [
        [user("a"), assistant("b")],
        [user("ccc"), assistant("d"), user("e"), assistant("f")],
        [{"role": "system", "content": "g"}, user("h"), assistant("i" * 9)],
    ]
    rows = Dataset.from_list([{"messages": row} for row in several])
    reader = tokenizer(CHATML)
    expected = [
        reader.apply_chat_template(row[:-1], add_generation_prompt=True)["input_ids"]
        for row in several
    ]
    assert written_prompts(rows, packing) == sorted(expected)
    pairs = Dataset.from_dict({"prompt": ["ab", "ddd"], "completion": ["c", "ef"]})
    expected = [reader("ab")["input_ids"], reader("ddd")["input_ids"]]
    assert written_prompts(pairs, packing) == sorted(expected)
    alone = Dataset.from_list([{"prompt": row[:-1]} for row in several])
    prompts = [reader.apply_chat_template(r[:-1], add_generation_prompt=True) for r in several]
    assert written_prompts(alone, packing) == sorted(p["input_ids"] for p in prompts)


def test_plain_text_keeps_its_first_tokens() -> None:
    rows = Dataset.from_list([{"text": "abcdefghijklmnop"}, {"text": "abc"}])
    reader = tokenizer(CHATML)
    for packing in ("none", "flatten"):
        assert written_prompts(rows, packing) == sorted(
            reader(text)["input_ids"] for text in ("abcdef", "ab")
        )


def test_the_encoder_reads_what_has_no_tokenizer() -> None:
    rows = encode(Dataset.from_dict({"input_ids": [[1, 2, 3]]}), Encoder(None))
    assert rows[0]["labels"] == [1, 2, 3] and rows[0]["length"] == 3


def test_models_without_room_are_refused_before_training() -> None:
    from fusedkd.data.arguments import DataArguments
    from fusedkd.train.fits import check_fits

    flags = DataArguments(data=["x"], max_length=80)
    rows = Dataset.from_dict({"input_ids": [[5] * 80], "labels": [[5] * 80]})
    with pytest.raises(UserError, match="80 tokens, but the student has 64"):
        check_fits(rows, {"student": llama()}, flags)
    flat = Dataset.from_dict({**rows.to_dict(), "position_ids": [[*range(40), *range(40)]]})
    check_fits(flat, {"student": llama(), "teacher": gpt2()}, flags)


def test_spans_are_the_sequences_of_a_row() -> None:
    """Padding on either side; packed rows, also one cut off at its beginning."""
    ids = torch.zeros(2, 6, dtype=torch.int64)

    def found(**columns: list[list[int]]) -> list[list[list[int]]]:
        batch = {"input_ids": ids, **{name: torch.tensor(x) for name, x in columns.items()}}
        return [[span.tolist() for span in spans(batch, row)] for row in range(2)]

    assert found() == [[[0, 1, 2, 3, 4, 5]]] * 2
    masks = [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert found(attention_mask=masks) == [[[2, 3, 4, 5]], []]
    places = [[0, 1, 2, 0, 0, 1], [4, 5, 0, 1, 2, 3]]
    assert found(position_ids=places) == [[[0, 1, 2], [3], [4, 5]], [[0, 1], [2, 3, 4, 5]]]
    assert found(position_ids=places, attention_mask=masks) == [[[2], [3], [4, 5]], []]
