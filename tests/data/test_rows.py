"""Documents of each kind to ids and labels: where a text begins and ends, and what carries a
label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from byte_llama import build
from chats import CHATML, ONE, TWO, assistant, tokenizer, user
from datasets import Dataset
from tokenizers import processors

from fusedkd.data.text import pack

pytestmark = pytest.mark.usefixtures("one_thread")


def reader(template: str | None = None, single: str = "<s> $A") -> Any:
    """A tokenizer that puts tokens around a text by itself, as Llama's does."""
    found = tokenizer(template)
    ids = [(token, found.convert_tokens_to_ids(token)) for token in ("<s>", "<eos>")]
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=ids
    )
    return found


def text(row: dict[str, Any], own: Any) -> tuple[str, str]:
    """All of a row, and what of it carries a label."""
    there = [label for label in row["labels"] if label != -100]
    return own.decode(row["input_ids"]), own.decode(there)


def rows(data: list[dict[str, Any]], own: Any, **how: Any) -> list[tuple[str, str]]:
    return [text(row, own) for row in pack(Dataset.from_list(data), own, 200, **how)]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A <eos>"])
def test_texts_begin_and_end_once(single: str) -> None:
    own = reader(single=single)
    begin = "<s>" if "<s>" in single else ""
    for said in ("ab", "ab<eos>", f"{begin}ab"):
        for packing in ("none", "flatten"):
            whole = f"{begin}ab<eos>"
            got, labelled = rows([{"text": said}], own, packing=packing)[0]
            # the first token of a flattened row is nobody's next one
            assert got == whole and labelled == (whole if packing == "none" else text_after(whole))
        joined = rows([{"text": "ab"}, {"text": "c<eos>"}], own)
        assert joined == [("ab<eos>c<eos>",) * 2]


def text_after(whole: str) -> str:
    return whole.removeprefix("<s>") if whole.startswith("<s>") else whole[1:]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A <eos>"])
def test_completions_carry_the_labels_and_end_once(single: str) -> None:
    own = reader(single=single)
    begin = "<s>" if "<s>" in single else ""
    for end in ("", "<eos>"):
        pair = {"prompt": "Größe? ", "completion": f"ja 🙂{end}"}
        assert rows([pair], own) == [(f"{begin}Größe? ja 🙂<eos>", "ja 🙂<eos>")]
        whole = f"{begin}Größe? ja 🙂<eos>"
        assert rows([pair], own, train_on="all") == [(whole, whole)]
    prompt = rows([{"prompt": "Größe? "}], own)
    assert prompt == [(f"{begin}Größe? ", "")]


def test_completions_of_messages() -> None:
    own = reader(CHATML)
    pair = {"prompt": TWO[:3], "completion": TWO[3:]}
    whole = own.apply_chat_template(TWO, tokenize=False)
    assert rows([pair], own) == [(whole, "no<|im_end|>\n")]
    assert rows([{"messages": TWO}], own)[0][1] == " ja 🙂 <|im_end|>\nno<|im_end|>\n"
    assert rows([{"messages": TWO}], own, train_on="last")[0][1] == "no<|im_end|>\n"
    assert rows([{"messages": TWO}], own, train_on="all") == [(whole, whole)]
    assert rows([{"prompt": ONE[:1]}], own) == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "")
    ]
    for mixed in ({"prompt": "a", "completion": ONE[1:]}, {"prompt": ONE[:1], "completion": "b"}):
        with pytest.raises(ValueError, match="both as text or both as messages"):
            rows([mixed], own)


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_completions_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    own = reader(CHATML)
    pairs = [("ab", "cd"), ("Größe ", "ja 🙂"), ("e", "f<eos>")]
    if kind == "messages":
        pairs = [([user(a)], [assistant(b)]) for a, b in pairs]  # type: ignore[misc]
    data = Dataset.from_list([{"prompt": a, "completion": b} for a, b in pairs])
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=9, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    if kind == "messages":
        config.max_length = 60
    theirs = trl.SFTTrainer(build(0), config, train_dataset=data, processing_class=reader(CHATML))
    ours = pack(data, own, config.max_length)
    assert ours["input_ids"] == theirs.train_dataset["input_ids"]
    assert ours["labels"] == theirs.train_dataset["labels"]


def test_rows_without_an_answer_are_left_out() -> None:
    own = reader(CHATML)
    system = [{"role": "system", "content": "be brief"}]
    data = [{"messages": system}, {"messages": ONE}, {"messages": ONE[:1]}]
    assert len(rows(data, own)) == 1
    with pytest.raises(ValueError, match="no row has an answer"):
        rows([{"messages": system}], own)
    assert rows(
        [
            {"input_ids": [84, 85], "labels": [84, -100]},
            {"input_ids": [84, 85], "labels": [-100, 85]},
        ],
        own,
    ) == [("ab", "b")]


def test_masks_of_rows_that_were_tokenized_before() -> None:
    own = reader(CHATML)
    ids = own("abcde")["input_ids"]  # with <s>
    masks = {"completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [0, 0, 1, 0, 1, 1]}
    assert rows([{"input_ids": ids, **masks}], own) == [("<s>abcde", "bde")]
    padded = {"input_ids": [0, *ids], "attention_mask": [0, 1, 1, 1, 1, 1, 1]}
    assert rows([padded], own) == [("<s>abcde", "<s>abcde")]
    assert rows([{**padded, "labels": [-100] * 5 + ids[-2:]}], own) == [("<s>abcde", "de")]
    with pytest.raises(ValueError, match="7 input_ids and 6 completion_mask"):
        rows([{"input_ids": [0, *ids], **masks}], own)


def test_a_prompt_is_never_cut() -> None:
    own = reader(CHATML)
    prompts = [{"prompt": ONE[:1]}, {"prompt": [user("x" * 300)]}]
    assert [text for text, _ in rows(prompts, own)] == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": 7}, "expected text"),
        ({"messages": 7}, "no conversation"),
        ({"messages": []}, "empty conversation"),
        ({"prompt": 7, "completion": "a"}, "prompt and completion"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "3 input_ids and 2 labels"),
    ],
)
def test_rows_of_the_wrong_kind_are_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rows([row], reader(CHATML))
