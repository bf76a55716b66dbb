"""The teacher cache, measured: ``python -m fusedkd.benchmarks.cache``.

Times the loss against few entries, and writing beside a large teacher; then trains the demo's
teacher for a while (trained.py), caches the demo's data, and prints bytes per token, the error
of the gradient against the full teacher, the speed of reading and writing, and what a student
learns from the cache beside one that learns from the teacher itself. About twelve minutes on two
cores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from fusedkd import LMHead, SparseTeacher, kd_loss
from fusedkd.cache import Job, Layout, Policy, TeacherCache, build
from fusedkd.cache.files import replace_file
from fusedkd.cache.hidden import GROUP, HiddenLayout
from fusedkd.cache.layout import Answers
from fusedkd.cache.shard import shard_bytes
from fusedkd.cache.writer import Plan, per_shard, write_cache
from fusedkd.teachers import LiveTeacher

from .trained import OnDemo, print_table, seconds

LARGE = 151_936
PARTS = ("rows", "size", "large", "hidden", "speed", "learning", "hidden-learning")

ENTRIES = {
    "cached, top 50, bucket": Policy("top", 50),
    "cached, 50 draws": Policy("sample", 50),
    "cached, 100 draws": Policy("sample", 100),
}
HIDDEN_STATES = {  # of as many numbers as the teacher has
    f"cached, hidden, {form}": Policy(form) for form in ("bf16", "int8")
}


def main() -> None:
    """Measure everything, and print it as tables."""
    parser = argparse.ArgumentParser(prog="python -m fusedkd.benchmarks.cache", description=__doc__)
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--student-steps", type=int, default=450)
    parser.add_argument("--only", choices=PARTS, help="one part")
    args = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as work:
        if args.only in (None, "rows"):
            _rows(console)
        if args.only in (None, "size"):
            _sizes(console, Path(work))
        if args.only in (None, "large"):
            _large(console, Path(work))
        if args.only in (None, "hidden"):
            _rounding(console)
            _hidden(console, Path(work))
        if args.only == "hidden-learning":
            demo = OnDemo(console, Path(work), args.teacher_steps)
            demo.students(args.student_steps, 1.0, HIDDEN_STATES)
        if args.only in (None, "speed", "learning"):
            demo = OnDemo(console, Path(work), args.teacher_steps)
            if args.only != "learning":
                demo.damage()
                demo.speeds()
            if args.only != "speed":
                demo.gradients()
                for temperature in (1.0, 2.0):
                    demo.students(args.student_steps, temperature, ENTRIES | HIDDEN_STATES)


# ---- the loss ----------------------------------------------------------------------------------


def _rows(console: Console, rounds: int = 25) -> None:
    """The loss and its gradient against K entries, beside the same against all logits."""
    generator = torch.Generator().manual_seed(0)
    n, k = 512, 64
    student, teacher = (
        (4 * torch.randn(n, LARGE, generator=generator)).bfloat16() for _ in range(2)
    )
    labels = torch.randint(LARGE, (n,), generator=generator)
    student.requires_grad_()
    top = teacher.float().div(2.0).log_softmax(-1).topk(k)
    sides = {"all logits": teacher, f"{k} entries, bucket": SparseTeacher(top.indices, top.values)}

    def step(side: Any) -> None:
        student.grad = None
        kd_loss(student, side, labels, temperature=2.0, ce_weight=0.5).backward()

    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):  # by turns: a machine that slows down slows down both
        for name, side in sides.items():
            times[name].append(seconds(partial(step, side), 1))
    medians = {name: 1e3 * statistics.median(each[2:]) for name, each in times.items()}
    rows: list[tuple[Any, ...]] = [("teacher", "ms", "of all logits")]
    rows += [(name, ms, f"{ms / medians['all logits']:.2f}") for name, ms in medians.items()]
    print_table(console, f"Forward KL and cross-entropy, {n} x {LARGE:,}, bf16, T = 2", *rows)


# ---- bytes -------------------------------------------------------------------------------------


def _sizes(console: Console, work: Path) -> None:
    """Whole folders, of made-up answers: only draws depend on what is in them."""
    rows: list[tuple[Any, ...]] = [("kept", "temperatures", "sequence length", "bytes per token")]
    for k, temperatures, length in ((50, (1.0, 2.0), 512), (50, (1.0, 2.0), 128),
                                    (64, (1.0,), 512), (128, (1.0, 2.0), 512)):  # fmt: skip
        layout = Layout(Policy("top", k), LARGE, temperatures)
        size = _size(work / "size", layout, length)
        rows.append((layout.policy, "1, 2" if len(temperatures) > 1 else "1", length, size))
    for draws in (50, 100):
        layout = Layout(Policy("sample", draws), LARGE)
        rows.append((layout.policy, "1", "any", f"at most {layout.most_bytes_per_token:.1f}"))
    print_table(console, f"Size at V = {LARGE:,}", *rows)


def _size(folder: Path, layout: Layout, length: int, sequences: int = 128) -> float:
    rng = np.random.default_rng(0)
    plan = Plan([rng.bytes(16) for _ in range(sequences)], [length] * sequences)
    facts = {"teacher": "none", "teacher_hash": None, "tokenizer_hash": "00" * 32, "source": "none",
             "vocab_size": LARGE, "padded_vocab_size": LARGE, "policy": layout.policy,
             "temperatures": layout.temperatures,
             "per_shard": per_shard(plan, layout.most_bytes_per_token)}  # fmt: skip
    write_cache(
        *(folder, plan, facts),
        lambda numbers: (layout.encode(_made_up(rng, layout, length)) for _ in numbers),
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    return size / (length * sequences)


def _made_up(rng: np.random.Generator, layout: Layout, length: int) -> Answers:
    ids = rng.integers(0, layout.vocab_size, (length, layout.k))
    values = -np.sort(8 * rng.random((length, layout.k)), 1)
    odds = rng.normal(2, 1, (length, len(layout.temperatures)))
    return Answers(ids, values, odds, rng.random(length))


def _teacher() -> Qwen2ForCausalLM:
    """Of Qwen2.5-0.5B's shape, in fp32 and with random weights."""
    config = Qwen2Config(
        vocab_size=LARGE,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


def _hidden(console: Console, work: Path, tokens: int = 64, rounds: int = 7) -> None:
    """Hidden states: writing them beside a forward pass to logits, and reading them and the head's
    product beside that."""
    run = LiveTeacher(_teacher())
    head = run({"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
    assert isinstance(head, LMHead)
    sequence = np.arange(tokens)
    ids = torch.as_tensor(sequence)[None]
    rows: list[tuple[Any, ...]] = [("kept", "bytes per token", "writing", "reading, product")]

    def live() -> None:
        with torch.inference_mode():
            run.model(input_ids=ids, use_cache=False)

    for form in ("bf16", "int8"):
        layout = HiddenLayout(Policy(form, head.weight.shape[1]), LARGE)
        facts = {"teacher": "none", "teacher_hash": None, "dtype": "float32",
                 "tokenizer_hash": "00" * 32, "padded_vocab_size": LARGE}  # fmt: skip
        folder = work / form
        build(folder, Job([sequence], layout, facts, 1, head=head),
              lambda batch: run({"input_ids": batch}))  # fmt: skip
        cache = TeacherCache(folder)
        weight = cache.head().weight.T

        def written(layout: HiddenLayout = layout, folder: Path = folder) -> None:
            with torch.inference_mode():
                answers = run({"input_ids": ids})
                assert isinstance(answers, LMHead)
                columns = layout.encode_states(answers.hidden[0])
            data = shard_bytes([b"0" * 16], [tokens], layout.columns, [columns])
            replace_file(folder.with_suffix(".shard"), data)

        def read(cache: TeacherCache = cache, weight: torch.Tensor = weight) -> None:
            _ = cache.states(sequence).float() @ weight

        turns = [tuple(seconds(x, 1) for x in (live, written, read)) for _ in range(rounds)]
        alone, write, product = (statistics.median(x) for x in zip(*turns[1:], strict=True))
        rows.append((form, layout.most_bytes_per_token, f"{write / alone - 1:+.1%}",
                     f"{product / alone:.2f} of a forward pass"))  # fmt: skip
    print_table(console, "Hidden states of a teacher of 494M parameters, fp32", *rows)


def _rounding(console: Console, tokens: int = 2000, width: int = 896, size: int = 4096) -> None:
    """What int8 costs: KL from the exact teacher to what a head makes of kept states; as they are
    kept, and rounded without the rotation. Made-up states, of which some numbers are large, and a
    head whose logits have a deviation of 3."""
    generator = torch.Generator().manual_seed(0)
    weight = 3 * torch.randn(size, width, generator=generator, dtype=torch.float64) / width**0.5
    plain = torch.randn(tokens, width, generator=generator)
    layout = HiddenLayout(Policy("int8", width), size)
    rows: list[tuple[Any, ...]] = [("large numbers", "rotated", "not rotated", "ratio")]
    for many, factor in ((0, 1.0), (4, 10.0), (4, 50.0)):
        scale = torch.ones(width)
        scale[torch.randperm(width, generator=generator)[:many]] = factor
        x = plain * scale
        grouped = x.unflatten(-1, (-1, GROUP))
        step = grouped.abs().amax(-1, keepdim=True) / 127
        plainly = ((grouped / step).round() * step).bfloat16()  # as they are read
        kept = (layout.states(layout.encode_states(x), tokens), plainly)
        exact, ours, rounded = (
            ((y.double().flatten(1) / scale) @ weight.T).log_softmax(-1) for y in (x, *kept)
        )
        with_, without = ((exact.exp() * (exact - y)).sum(-1).mean() for y in (ours, rounded))
        name = f"{many} of {width}, x {factor:g}" if many else "none"
        rows.append((name, f"{with_:.1e}", f"{without:.1e}", f"{with_ / without:.2f}"))
    print_table(console, "int8: KL to the exact teacher, nats", *rows)


def _large(console: Console, work: Path, tokens: int = 256) -> None:
    """What writing costs beside the forward pass of a large teacher."""
    model = _teacher()
    ids = torch.arange(tokens)[None]

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    answer = LiveTeacher(model)
    layout = Layout(Policy("top", 50), LARGE, (1.0, 2.0))
    facts = {"teacher": "none", "teacher_hash": None, "dtype": "float32",
             "tokenizer_hash": "00" * 32, "padded_vocab_size": LARGE}  # fmt: skip

    def cached() -> None:
        job = Job([*ids.numpy()], layout, facts, 1)
        build(work / "large", job, lambda batch: answer({"input_ids": batch}))
        shutil.rmtree(work / "large")

    pairs = [(seconds(forward, 1), seconds(cached, 1)) for _ in range(9)]  # by turns
    alone, both = map(statistics.median, zip(*pairs[1:], strict=True))
    console.print(
        f"writing, teacher of 494M parameters, top 50, T = 1, 2: forward {1e3 * alone / tokens:.2f}"
        f" ms per token, cached {1e3 * both / tokens:.2f}: {both / alone - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
