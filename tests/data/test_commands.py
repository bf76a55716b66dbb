"""The commands that read data: the same rows for the same flags, and one sentence for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import CHATML, MOVING, ONE, TWO, assistant, llama, tokenizer, user

from fusedkd.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, student/, plain/ (a tokenizer without a template), chat.jsonl, text.jsonl."""
    root = tmp_path_factory.mktemp("disk")
    own = tokenizer(CHATML)
    for seed, name in enumerate(("teacher", "student")):
        llama(seed).save_pretrained(root / name)
        own.save_pretrained(root / name)
    tokenizer(None).save_pretrained(root / "plain")
    rows = [{"messages": [*ONE, user("x" * i), assistant("y" * (1 + i % 3))]} for i in range(12)]
    for name, made in {
        "chat": rows,
        "text": [{"text": f"text {i} " * 9} for i in range(12)],
        "prompts": [{"prompt": f"ask {i}"} for i in range(12)],
        "alone": [{"messages": ONE[:1]}],
        "wrong": [{"messages": [{"role": "user"}]}],
        "empty": [{"messages": []}],
        "other": [{"question": "a"}],
    }.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)) + "\n")
    (root / "moving.jinja").write_text(MOVING)
    (root / "broken.jinja").write_text("{% for m in messages %}")
    return root


def words(disk: Path, command: str, out: Path | None = None, data: str = "chat") -> list[str]:
    flags = ["--data", str(disk / f"{data}.jsonl"), "--max_length", "100"]
    if command == "data":
        return ["data", "--tokenizer", str(disk / "student"), *flags]
    teacher = ["--teacher", str(disk / "teacher")]
    if command == "cache":
        return ["cache", *teacher, *flags, "--output", str(out), "--device", "cpu", "--top-k", "9"]
    return [
        *("distill", *teacher, "--student", str(disk / "student"), *flags),
        *("--output_dir", str(out), "--max_steps", "1", "--use_cpu", "true", "--report_to", "none"),
        *("--disable_tqdm", "true", "--save_strategy", "no", "--backend", "reference"),
        *("--per_device_train_batch_size", "3", "--on_policy_new_tokens", "4"),
    ]


def test_rows_are_shown_as_models_see_them(disk: Path, capsys: Any) -> None:
    assert main([*words(disk, "data"), "--samples", "1", "--eval_share", "0"]) == 0
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\\n\n[[hello\\n\nyou<|im_end|>\\n\n]]<|im_start|>user" in said
    table = {
        a.strip(): b.strip()
        for _, a, b, _ in (r.split("│") for r in said.splitlines() if r.count("│") == 3)
    }
    assert table["rows"] == "12" and table["packing"] == "none" and "%" in table["with a label"]
    more = ["--tokens", "--packing", "flatten", "--samples", "1"]
    assert main([*words(disk, "data"), *more]) == 0
    said = capsys.readouterr().out
    assert any(line.split()[:3] == ["0", "5", "<|im_start|>"] for line in said.splitlines())
    assert "yes" in said and "rows of up to 100" in said


def test_help_teaches(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    said = capsys.readouterr().out
    assert "fusedkd data --tokenizer ./student --data chat.jsonl" in said and "--packing" in said


@pytest.mark.parametrize("packing", ["none", "flatten", "blocks"])
def test_conversations_are_distilled(packing: str, disk: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([*words(disk, "distill", tmp_path), "--packing", packing]) == 0
    said = capsys.readouterr()
    assert said.out.count("of the tokens carry a label") == 1
    assert "steps" in said.out
    own = tokenizer(None)
    saved = type(own).from_pretrained(tmp_path)
    assert saved.chat_template == CHATML


@pytest.mark.parametrize(
    ("data", "packing"), [("chat", "flatten"), ("prompts", "none"), ("text", "none")]
)
def test_students_write_from_prompts(data: str, packing: str, disk: Path, tmp_path: Path) -> None:
    argv = [*words(disk, "distill", tmp_path, data), "--on_policy_share", "1"]
    assert main([*argv, "--packing", packing]) == 0


def test_a_stream_is_distilled(disk: Path, tmp_path: Path, capsys: Any) -> None:
    argv = [*words(disk, "distill", tmp_path), "--data_streaming"]
    for more in ([], ["--packing", "flatten"], ["--eval_data", str(disk / "chat.jsonl")]):
        assert main([*argv, *more]) == 0
        assert "a stream, whose first 12 rows" in capsys.readouterr().out


def test_one_cache_serves_rows_however_they_are_packed(
    disk: Path, tmp_path: Path, capsys: Any
) -> None:
    cache = tmp_path / "cache"
    assert main([*words(disk, "cache", cache), "--packing", "flatten"]) == 0
    argv = words(disk, "distill", tmp_path / "out")
    argv[1:3] = ["--teacher_cache", str(cache)]
    losses = []
    for packing in ("none", "flatten"):
        assert main([*argv, "--packing", packing, "--per_device_train_batch_size", "12"]) == 0
        losses.append(json.loads((tmp_path / "out" / "distillation.json").read_text()))
    assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=1e-4)
    assert losses[0]["eval_kd"] == pytest.approx(losses[1]["eval_kd"], rel=1e-4)
    capsys.readouterr()
    for other in (["--train_on", "all"], ["--max_length", "60"], ["--packing", "blocks"]):
        code = main([*argv, *other])
        said = capsys.readouterr().err
        assert (code == 0) == ("--train_on" in other), said  # the ids are the same
        assert code == 0 or "not in the cache" in said


MISTAKES: list[tuple[str, str, list[str], str]] = [
    ("data", "chat", ["--tokenizer", "{}/plain"], "plain has no chat template"),
    ("data", "chat", ["--tokenizer", "./nowhere"], "./nowhere"),
    ("data", "chat", ["--chat_template", "./none.jinja"], "--chat_template ./none.jinja"),
    ("data", "chat", ["--chat_template", "{}/moving.jinja"], "--train_on last"),
    ("data", "chat", ["--chat_template", "{}/broken.jinja"], "--data"),
    ("data", "chat", ["--packing", "tight"], "--packing tight"),
    ("data", "chat", ["--train_on", "x"], "--train_on x"),
    ("data", "chat", ["--max_length", "x"], "--max_length (--block_size)"),
    ("data", "chat", ["--block_size", "1"], "--max_length (--block_size) 1"),
    ("data", "chat", ["--samples", "-1"], "--samples -1"),
    ("data", "chat", ["--data_weights", "1", "2"], "--data_weights has 2"),
    ("data", "chat", ["--data_streaming", "maybe"], "--data_streaming maybe"),
    ("data", "chat", ["--text_column", "body"], "--text_column body"),
    ("data", "chat", ["--max_length", "5"], "no row has an answer"),
    ("data", "alone", [], "no row has an answer"),
    ("data", "wrong", [], "is no message"),
    ("data", "empty", [], "empty conversation"),
    ("data", "other", [], "expected input_ids, messages, prompt"),
    ("data", "nowhere", [], "nowhere.jsonl does not exist"),
    ("data", "chat", ["--dat", "x"], "--dat: not a flag; did you mean '--data'?"),
    ("distill", "chat", ["--max_steps", "-1", "--data_streaming"], "expected --max_steps"),
    ("distill", "chat", ["--data_streaming", "--eval_share", "0.1"], "expected --eval_data"),
    ("distill", "text", ["--block_size", "500"], "128 positions"),
    ("distill", "prompts", [], "expected --on_policy_share 1"),
    ("distill", "chat", ["--eval_data", "{}/prompts.jsonl"], "--eval_data: no token carries"),
    ("data", "chat", ["--data_num_proc", "0"], "--data_num_proc 0"),
    ("distill", "chat", ["--on_policy_share", "1", "--train_on", "all"], "--train_on all"),
    ("distill", "chat", ["--on_policy_share", "1", "--packing", "blocks"], "--packing blocks"),
    ("distill", "chat", ["--data", "{}/text.jsonl", "{}/chat.jsonl"], "for such a mixture"),
    ("distill", "chat", ["--packing", "flatten", "--terms", "attention_mse"], "--packing flatten"),
    (
        "distill",
        "chat",
        ["--on_policy_share", "1", "--on_policy_new_tokens", "99"],
        "128 positions",
    ),
    ("cache", "chat", ["--packing", "tight"], "--packing tight"),
    ("cache", "chat", ["--data_streaming"], "--data_streaming: not a flag"),
]


@pytest.mark.parametrize(("command", "data", "more", "said"), MISTAKES)
def test_mistakes_get_one_sentence(
    command: str, data: str, more: list[str], said: str, disk: Path, tmp_path: Path, capsys: Any
) -> None:
    argv = [*words(disk, command, tmp_path, data), *(word.format(disk) for word in more)]
    assert main(argv) == 2
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"fusedkd {command}: ") and said in last and "Traceback" not in err


def test_a_tokenizer_is_asked_for(disk: Path, capsys: Any) -> None:
    assert main(["data", "--data", str(disk / "chat.jsonl")]) == 2
    assert "--tokenizer is missing" in capsys.readouterr().err
    assert main(["data", "--student", str(disk / "student")]) == 2
    assert "--data is missing" in capsys.readouterr().err
    both = ["--student", str(disk / "student"), "--teacher", str(disk / "teacher")]
    assert main(["data", *both, "--data", str(disk / "chat.jsonl"), "--samples", "0"]) == 0


def test_two_turns_are_two_answers(disk: Path, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": TWO}]))
    argv = ["data", "--tokenizer", str(disk / "student"), "--data", str(path)]
    assert main(argv) == 0
    assert capsys.readouterr().out.count("[[") == 2
    assert main([*argv, "--train_on", "last"]) == 0
    assert capsys.readouterr().out.count("[[") == 1


@pytest.mark.parametrize("packing", ["none", "flatten", "blocks"])
def test_a_teacher_that_is_asked_elsewhere(
    packing: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sequences go out, vLLM's answers come back, and a run asks for nothing else."""
    flags = ["--packing", packing, "--eval_share", "0.2"]
    blocks = tmp_path / "blocks.jsonl"
    assert main([*words(disk, "data"), *flags, "--output", str(blocks)]) == 0
    asked = [json.loads(line)["prompt_token_ids"] for line in blocks.read_text().splitlines()]
    assert len(asked) == len(set(map(tuple, asked))) > 1
    assert f"{len(asked)} sequences" in capsys.readouterr().out
    model = llama(0).eval()
    with (tmp_path / "answers.jsonl").open("w") as answers:
        for ids in reversed(asked):
            with torch.no_grad():
                top = model(torch.tensor([ids])).logits[0].log_softmax(-1).topk(5)
            steps = [
                dict(zip(*map(torch.Tensor.tolist, pair), strict=True))
                for pair in zip(top.indices, top.values, strict=True)
            ]
            row = {"prompt_token_ids": ids, "prompt_logprobs": [None, *steps[:-1]]}
            answers.write(json.dumps(row) + "\n")
    cache = ["--tokenizer", str(disk / "teacher"), "--output", str(tmp_path / "cache")]
    assert main(["cache", "import", str(tmp_path / "answers.jsonl"), *cache]) == 0
    run = words(disk, "distill", tmp_path / "out")
    run[1:3] = ["--teacher_cache", str(tmp_path / "cache")]
    assert main([*run, *flags, "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    streamed = [*words(disk, "data"), "--data_streaming", "--output", str(blocks)]
    assert main(streamed) == 2 and "has no end" in capsys.readouterr().err
