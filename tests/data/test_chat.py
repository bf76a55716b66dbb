"""Conversations: labels where TRL and the templates' authors have them, and no token that the
template does not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from byte_llama import build
from chats import (
    CHATML,
    DANGLING,
    MISTRAL,
    MOVING,
    ONE,
    SYSTEM,
    TEMPLATES,
    TWO,
    assistant,
    tokenizer,
    user,
)
from datasets import Dataset

from fusedkd.data.chat import Chat

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(chat: Chat, messages: Any, **how: Any) -> list[str]:
    """The runs of tokens that carry a label, as text."""
    ids, labels = chat(messages, **how)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = []
    for before, label in zip([-100, *labels], labels, strict=False):
        if label != -100:
            runs = runs if before != -100 else [*runs, []]
            runs[-1].append(label)
    return [chat.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "phi3"])
def test_labels_are_those_of_trl(name: str, tmp_path: Path) -> None:
    """Of its own trainer, which puts a template with markers in the place of the model's."""
    own = tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    conversations = [ONE, [user("a"), assistant("b" * 9)], SYSTEM]
    if name != "qwen3":  # which drops thoughts that TRL's keeps
        conversations += [TWO, DANGLING]
    config = trl.SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    theirs = trl.SFTTrainer(
        build(0),
        config,
        train_dataset=Dataset.from_list([{"messages": m} for m in conversations]),
        processing_class=tokenizer(own.chat_template),
    )
    marked = tokenizer((TEMPLATES / f"{name}_training.jinja").read_text())
    for messages, row in zip(conversations, theirs.train_dataset, strict=True):
        for ours in (own, marked):
            assert Chat(ours)(messages) == (row["input_ids"], row["labels"])


def test_masks_written_out() -> None:
    """Of ChatML and Mistral's, whose ids are written here, too."""
    chat = Chat(tokenizer(CHATML))
    convert = chat.tokenizer.convert_tokens_to_ids
    ids, labels = chat([user("a"), assistant("b"), user("c"), assistant("d")])
    words = ["<|im_start|>", *"userĊa", "<|im_end|>", "Ċ", "<|im_start|>", *"assistantĊ"]
    again = ["<|im_start|>", *"userĊc", "<|im_end|>", "Ċ", "<|im_start|>", *"assistantĊ"]
    ends = ["<|im_end|>", "Ċ"]
    assert ids == convert([*words, "b", *ends, *again, "d", *ends])
    none = [-100]
    assert labels == [
        *(none * len(words) + convert(["b", *ends])),
        *(none * len(again) + convert(["d", *ends])),
    ]
    ids, labels = Chat(tokenizer(MISTRAL, eos_token="</s>"))(
        [user("a"), assistant("b"), user("c"), assistant("d")]
    )
    words, again = ["<s>", "[INST]", *"ĠaĠ", "[/INST]"], ["[INST]", *"ĠcĠ", "[/INST]"]
    assert ids == convert([*words, *"Ġb", "</s>", *again, *"Ġd", "</s>"])
    assert labels == [
        *(none * len(words) + convert([*"Ġb", "</s>"])),
        *(none * len(again) + convert([*"Ġd", "</s>"])),
    ]


@pytest.mark.parametrize("conversation", [ONE, TWO, SYSTEM, DANGLING])
@pytest.mark.parametrize("template", [CHATML, "qwen3", "llama3", "gemma3", "phi3"])
def test_the_text_is_the_templates_and_answers_are_labelled(
    template: str, conversation: Any
) -> None:
    if "{" not in template:
        template = (TEMPLATES / f"{template}.jinja").read_text()
    chat = Chat(tokenizer(template))
    ids, _ = chat(conversation)
    rendered = chat.tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
    assert ids == rendered and ids.count(chat.tokenizer.bos_token_id) <= 1
    answers = [m["content"].strip() for m in conversation if m["role"] == "assistant"]
    runs = labelled(chat, conversation)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        said, _, after = run.partition(answer)
        assert said.strip() in ("", "<think>\n\n</think>") and after.strip() in (
            *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end|>\n<eos>"),
        )
    assert labelled(Chat(chat.tokenizer, "last"), conversation) == runs[-1:]
    everything = Chat(chat.tokenizer, "all")(conversation)
    assert everything == (ids, ids)


def test_earlier_thoughts_that_the_template_drops_leave_the_answer() -> None:
    chat = Chat(tokenizer((TEMPLATES / "qwen3.jinja").read_text()))
    thought = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d")]
    assert labelled(chat, thought) == [
        "b<|im_end|>\n",
        "<think>\n\n</think>\n\nd<|im_end|>\n",
    ]


def test_tools_are_passed_on_and_calls_are_labelled() -> None:
    chat = Chat(tokenizer((TEMPLATES / "qwen3.jinja").read_text()))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"x": 1, "y": None}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    messages = [
        *(user("1+1"), {"role": "assistant", "content": "", "tool_calls": [call]}),
        *({"role": "tool", "content": "2"}, assistant("two")),
    ]
    for given in (tools, '[{"type": "function", "function": {"name": "add"}}]'):
        ids, _ = chat(messages, given)
        text = chat.tokenizer.decode(ids)
        assert '<tools>\n{"type": "function", "function": {"name": "add"' in text
        first, last = labelled(chat, messages, tools=given)
        assert '"name": "add"' in first and first.endswith("</tool_call><|im_end|>\n")
        assert last == "<think>\n\n</think>\n\ntwo<|im_end|>\n"


def test_a_prompt_carries_no_label_even_where_it_holds_an_answer() -> None:
    for template in (CHATML, (TEMPLATES / "qwen3_training.jinja").read_text()):
        chat = Chat(tokenizer(template))
        assert len(labelled(chat, TWO)) == 2
        assert len(labelled(chat, TWO, first=3)) == 1


def test_other_spellings_of_a_conversation() -> None:
    chat = Chat(tokenizer(CHATML))
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello\nyou"}]
    parts = [user("hi"), {"role": "assistant", "content": [{"type": "text", "text": "hello\nyou"}]}]
    empty = [{**message, "tool_calls": None, "name": None} for message in ONE]
    assert chat(sharegpt) == chat(ONE) == chat(json.dumps(ONE)) == chat(empty)
    template = CHATML.replace("m.content ", "m.content if m.content is string else 'x' ")
    assert Chat(tokenizer(template))(parts)[0]


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, ONE, "no chat template.*--chat_template"),
        (MOVING, [user("a"), assistant("b"), user("c"), assistant("d")], "differently.*--train_on"),
        (CHATML, [], "empty conversation"),
        (CHATML, [assistant("b")], "begins with the assistant"),
        (CHATML, "hello", "expected JSON"),
        (CHATML, 7, "no conversation"),
        (CHATML, ["a"], "no conversation"),
        (CHATML, [{"role": "user"}], "no message"),
        (CHATML, [{"content": "a"}], "no message"),
        (CHATML, [{"role": "user", "content": 7}], "no message"),
        (CHATML, [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "no message"),
    ],
)
def test_what_is_no_conversation_is_named(template: str | None, messages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Chat(tokenizer(template))(messages)
