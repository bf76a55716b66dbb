"""Conversations that each side's own chat template writes."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import CHATML, TEMPLATES
from chats import tokenizer as of_bytes
from teacher_server import TeacherServer, model_log_probs
from tokenizer_kinds import byte_level, sentencepiece, texts
from two_tokenizers import llama, loss_and_gradients, trainer

from fusedkd.alignment import Retelling, align, alm_loss, byte_offsets
from fusedkd.cache import TeacherCache
from fusedkd.cli import main
from fusedkd.data.text import load_documents
from fusedkd.data.two_templates import CONVERSATION, Reading, written
from fusedkd.teachers import ServedTeacher, Service

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = (
    "{{ bos_token }}{% for m in messages %}### {{ m.role | capitalize }}: {{ m.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}### Assistant: {% endif %}"
)
Pairs = list[tuple[tuple[int, int], tuple[int, int]]]


def student() -> Any:
    made = byte_level(340, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template, made.pad_token = CHATML, "<|im_end|>"
    return made


def teacher() -> Any:
    made = sentencepiece(500)
    made.chat_template = PLAIN
    return made


def turns(seed: int, count: int = 4) -> list[dict[str, str]]:
    """Texts that begin like a template's own words, with spaces around them, and emojis."""
    dice = random.Random(seed)
    said = []
    for n in range(count):
        text = texts()[dice.randrange(5)][(start := dice.randrange(3000)) : start + 40]
        text = dice.choice(["user", "assistant\n", "🙂 ", "  ", ""]) + text
        said.append(
            {
                "role": ("user", "assistant")[n % 2],
                "content": (text if text.strip() else "w") + dice.choice(["", " "]),
            }
        )
    return said


def row(messages: Any) -> str:
    return json.dumps({"messages": messages})


def ids_of(tokenizer: Any, messages: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])


# ---- the truth, slowly ----


def pieces(messages: Any, side: str) -> list[tuple[str, int | None]]:
    """What the two templates write, and which byte of the texts each piece begins with."""
    found: list[tuple[str, int | None]] = [("<s>", None)] if side == "teacher" else []
    at = 0
    for m in messages:
        content = m["content"]
        if side == "student":
            found += [(f"<|im_start|>{m['role']}\n", None), (content, at), ("<|im_end|>\n", None)]
        else:
            first = at + len(content.encode()) - len(content.lstrip().encode())
            head = f"### {m['role'].capitalize()}: "
            found += [(head, None), (content.strip(), first), ("\n", None)]
        at += len(content.encode())
    return found


def slow_offsets(tokenizer: Any, messages: Any, side: str) -> list[tuple[int, int]]:
    parts = pieces(messages, side)
    text = "".join(part for part, _ in parts)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bytes_: list[int | None] = []  # of the texts, by byte of the rendering
    for part, at in parts:
        size = len(part.encode())
        bytes_ += [None] * size if at is None else list(range(at, at + size))
    edges = {}
    start = 0
    for n, (part, _) in enumerate(parts):
        for b in range(start, start + len(part.encode())):
            edges[b] = n
        start += len(part.encode())
    found = []
    for a, b in byte_offsets(tokenizer, text, ids).tolist():
        covered = bytes_[a:b]
        inside = covered and None not in covered and edges[a] == edges[b - 1]
        found.append((covered[0], covered[-1] + 1) if inside else (-1, -1))
    return found


def slow_spans(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> Pairs:
    """Every run of tokens, none of them outside, by the bytes that it covers; of those that both
    have, the ones within which no other lies."""

    def runs(offsets: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
        found = {}
        for i in range(len(offsets)):
            for j in range(i, len(offsets)):
                if offsets[j][0] < 0 or (j > i and offsets[j][0] != offsets[j - 1][1]):
                    break
                found.setdefault((offsets[i][0], offsets[j][1]), (i, j + 1))
        return found

    a, b = runs(ours), runs(theirs)
    both = sorted(a.keys() & b.keys())
    least = [x for x in both if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in both)]
    return [(a[x], b[x]) for x in least]


def pairs_of(student_spans: torch.Tensor, teacher_spans: torch.Tensor) -> Pairs:
    spans = zip(student_spans.tolist(), teacher_spans.tolist(), strict=True)
    return [(tuple(x), tuple(y)) for x, y in spans]  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(12))
def test_spans_against_the_truth(seed: int) -> None:
    ours, theirs = student(), teacher()
    messages = turns(seed)
    a, b = (
        slow_offsets(tokenizer, messages, side)
        for tokenizer, side in ((ours, "student"), (theirs, "teacher"))
    )
    assert written("student", ours, messages).offsets.tolist() == [list(x) for x in a]
    assert written("teacher", theirs, messages).offsets.tolist() == [list(x) for x in b]
    told = Reading(ours, theirs)(ids_of(ours, messages), row(messages))
    assert told.ids == ids_of(theirs, messages)
    expected = slow_spans(a, b)
    assert pairs_of(told.student_spans, told.teacher_spans) == expected and len(expected) > 10


def test_stretches_that_begin_and_end_elsewhere() -> None:
    """What is outside of a text takes bytes with it: nothing stands for these."""
    found = align(
        torch.tensor([(0, 3), (-1, -1), (9, 12)]), torch.tensor([(0, 5), (5, 9), (9, 12)])
    )
    assert pairs_of(*found) == [((2, 3), (2, 3))]
    dice = random.Random(0)
    for _ in range(200):
        sides = []
        for _ in range(2):
            cuts = sorted({0, 20, *(dice.randrange(21) for _ in range(9))})
            parts = list(pairwise(cuts))
            sides.append([(-1, -1) if dice.random() < 0.25 else part for part in parts])
        found = align(*(torch.tensor(side) for side in sides))
        assert pairs_of(*found) == slow_spans(*sides), sides


@pytest.mark.parametrize(("ours_most", "theirs_most"), [(40, 50), (30, 999), (999, 30)])
def test_rows_that_are_cut(ours_most: int, theirs_most: int) -> None:
    ours, theirs = student(), teacher()
    messages = turns(3)
    ids = ids_of(ours, messages)
    whole = Reading(ours, theirs)(ids, row(messages))
    cut = Reading(ours, theirs, theirs_most)(ids[:ours_most], row(messages))
    assert cut.ids == whole.ids[:theirs_most]
    expected = [
        pair
        for pair in pairs_of(whole.student_spans, whole.teacher_spans)
        if pair[0][1] <= ours_most and pair[1][1] <= theirs_most
    ]
    assert pairs_of(cut.student_spans, cut.teacher_spans) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace("m.content }}", "m.content.split('</think>')[-1] | trim }}"), "w1 ok"),
        (
            CHATML.replace(
                "{{ m.content }}",
                "{% if loop.last %}<think>\n{% if '</think>' in m.content %}"
                "{{ m.content.split('</think>')[0] }}{% endif %}\n</think>\n\n"
                "{% endif %}{{ m.content.split('</think>')[-1].lstrip() }}",
            ),
            "w1 ok",
        ),
    ],
)
def test_thoughts_that_a_template_writes_its_own_way(template: str, said: str) -> None:
    ours, theirs = student(), teacher()
    ours.chat_template = template
    messages = [
        {"role": "user", "content": "say w1"},
        {"role": "assistant", "content": "<think>hm</think>\n\nw1 ok"},
    ]
    ids = ids_of(ours, messages)
    told = Reading(ours, theirs)(ids, row(messages))
    last = "".join(ours.decode(ids[a:b]) for a, b in told.student_spans.tolist())
    assert last.endswith(said)


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_the_texts_are_found_in_everybodys_templates(path: Path) -> None:
    said = ["hi user", "assistant says\n", "more?", "ok 🙂"]
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)
    ]
    tokenizer = of_bytes(path.read_text())
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template's own, about messages that have to be lists
        return
    if said[0] not in text:  # likewise
        with pytest.raises(ValueError, match="writes no message's text"):
            written("student", tokenizer, messages)
        return
    ids, offsets = written("student", tokenizer, messages)
    inside = [i for i, (start, _) in zip(ids, offsets.tolist(), strict=True) if start >= 0]
    assert tokenizer.decode(inside).replace("\n", "") == "".join(said).replace("\n", "")


def test_without_two_templates_a_row_is_read_by_its_bytes() -> None:
    ours, theirs = student(), teacher()
    messages = turns(1)
    ids = ids_of(ours, messages)
    expected = Retelling(ours, theirs)(ids)
    assert Reading(ours, theirs)(ids).ids == expected.ids
    theirs.chat_template = None
    assert Reading(ours, theirs)(ids, row(messages)).ids == expected.ids
    theirs.chat_template = ours.chat_template
    assert Reading(ours, theirs)(ids, row(messages)).ids == expected.ids


@pytest.mark.parametrize(
    ("template", "spoilt", "said"),
    [
        (PLAIN.replace("| trim", "| upper"), 0, "the teacher's chat template does not write"),
        (PLAIN, 1, "its tokens are not those that the student's chat template makes"),
    ],
)
def test_what_cannot_be_told(template: str, spoilt: int, said: str) -> None:
    ours, theirs = student(), teacher()
    theirs.chat_template = template
    messages = turns(2)
    with pytest.raises(ValueError, match=said):
        Reading(ours, theirs)(ids_of(ours, messages)[spoilt:], row(messages))


# ---- runs ----


def chats(folder: Path) -> Path:
    path = folder / "chats.jsonl"
    lines = [json.dumps({"messages": turns(n, 2)}) for n in range(4)]
    path.write_text("\n".join(lines))
    return path


def test_the_loss_against_the_formula(tmp_path: Path) -> None:
    """Rows as the commands make them; a model, its server and its cache."""
    from fusedkd.data.arguments import DataArguments
    from fusedkd.data.loading import load_rows

    ours, theirs = student(), teacher()
    models = llama(len(ours)), llama(len(theirs), seed=1)
    flags = DataArguments(data=[str(chats(tmp_path))], eval_share=0.0, max_length=200)
    flags.conversations = True
    data = load_rows(flags, ours).train
    assert data.column_names == ["input_ids", "labels", CONVERSATION]
    settings = {"cross_tokenizer": "alm", "alm_temperature": 2.0}
    loss, _ = loss_and_gradients(trainer(tmp_path, *models, ours, theirs, data, **settings))
    total, labels, spans = 0.0, 0, 0
    for example in data:
        told = json.loads(example[CONVERSATION])["messages"]
        other = ids_of(theirs, told)
        with torch.no_grad():
            logs = [
                model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                for model, ids in zip(models, (example["input_ids"], other), strict=True)
            ]
        s, t = (
            torch.cat([torch.zeros(1), x[range(len(ids) - 1), ids[1:]]])
            for x, ids in zip(logs, (example["input_ids"], other), strict=True)
        )
        both = slow_spans(
            slow_offsets(ours, told, "student")[: len(s)], slow_offsets(theirs, told, "teacher")
        )
        counted = [p for p in both if all(x != -100 for x in example["labels"][slice(*p[0])])]
        pairs = (torch.tensor([p[n] for p in counted]).view(-1, 2).long() for n in (0, 1))
        total += 2.0 * alm_loss(s, t, *pairs, threshold_temperature=2.0, reduction="sum").item()
        labels += sum(x != -100 for x in example["labels"][1:])
        spans += len(counted)
    assert spans > 20
    assert loss.item() == pytest.approx(total / labels, rel=1e-4)

    reading = Reading(ours, theirs)
    asked = [reading(x["input_ids"], x[CONVERSATION]).ids for x in data]
    cache = TeacherCache.build(tmp_path / "cache", models[1], theirs, asked, actual=True)
    with TeacherServer(model_log_probs(models[1]), theirs) as server:
        service = Service.at(server.url, top_k=0, ahead=0)
        served = ServedTeacher(service, theirs, tmp_path / "answers")
        for side in (cache, served):
            made = trainer(tmp_path, models[0], side, ours, theirs, data, **settings)
            assert loss_and_gradients(made)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_from_the_command_line(tmp_path: Path) -> None:
    ours, theirs = student(), teacher()
    for name, tokenizer, seed in (("student", ours, 0), ("teacher", theirs, 1)):
        llama(len(tokenizer), seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    data = ["--data", str(chats(tmp_path)), "--eval_share", "0.25", "--max_length", "200"]
    distill = [
        "distill", *data, "--student", str(tmp_path / "student"), "--cross_tokenizer", "alm",
        "--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true",
        "--report", "none",
    ]  # fmt: skip
    here = ["--teacher", str(tmp_path / "teacher")]
    cache = ["--student_tokenizer", str(tmp_path / "student"), "--hidden", "bf16"]
    assert main(["cache", *here, *data, *cache, "--output", str(tmp_path / "cache")]) == 0
    # every row is there as the teacher's template writes it
    found = TeacherCache(tmp_path / "cache")
    rows = load_documents([tmp_path / "chats.jsonl"])["messages"]
    assert all(found.find(ids_of(theirs, messages)) is not None for messages in rows)
    for name, side in {
        "live": here,
        "cached": ["--teacher_cache", str(tmp_path / "cache"), "--teacher_tokenizer", here[1]],
    }.items():
        assert main([*distill, *side, "--output_dir", str(tmp_path / name)]) == 0
