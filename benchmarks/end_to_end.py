"""A whole training step: a small Llama student under a Llama teacher, with fusedkd and with logits;
and of `DistillationTrainer` on chat data, where a quarter of the tokens counts.

Each measurement is a process of its own, for its memory's sake.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from fusedkd import LMHead, kd_loss
from fusedkd.train import DistillationArguments, DistillationTrainer

from .child import ChildFailed, in_child
from .peak import peak, reset_peak
from .race.case import DTYPES, IGNORE, Case, native_dtype
from .race.formulas import plain_loss
from .race.timing import spread

TIMEOUT = 240  # seconds


@dataclass(frozen=True)
class Step:
    """A distillation step: AdamW on ``batch`` sequences of ``length`` random tokens."""

    loss: str  # "fusedkd", "eager", or "trainer": fusedkd's, with its loop around the step
    vocab: int
    batch: int = 4
    length: int = 128
    limit: int = 0  # bytes for the largest batch; 0: do not look for it
    steps: int = 3
    counted: float = 1.0  # share of the tokens with a label
    device: str = "cpu"


VOCABULARIES = (32000, 151936)
CHAT = 0.25  # prompts, templates and padding are the rest
MOST = 64  # sequences: larger batches are not tried


def run(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """Step time, memory and tokens per second, and the largest batch within the limit."""
    limit, device = int(options.memory_limit * 2**30), options.device
    results = []
    for vocab in VOCABULARIES:
        kinds = [Step(loss, vocab, limit=limit, device=device) for loss in ("fusedkd", "eager")]
        chat = Step("trainer", vocab, length=512, steps=7, device=device)
        for step in (*kinds, chat, replace(chat, counted=CHAT)):
            with console.status(f"end to end: {step.loss}, vocabulary {vocab:,}"):
                results.append(_in_child(step))
    return results


def _in_child(step: Step) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = in_child(measure, asdict(step), timeout=TIMEOUT)
    except ChildFailed as error:
        raise ValueError(f"--end-to-end: the step {step}: {error}") from error
    return answer


def print_steps(console: Console, results: list[dict[str, Any]], limit: float) -> None:
    table = Table(title="A training step, end to end")
    heads = ["vocabulary", "loss", "tokens", "counted", "step ms", "tokens/s", "peak memory"]
    for head in [*heads, f"largest batch in {limit:g} GiB"]:
        table.add_column(head, justify="right")
    for r in results:
        table.add_row(
            *(f"{r['vocab']:,}", r["loss"], f"{r['batch']} x {r['length']}", f"{r['counted']:.0%}"),
            *(f"{r['step_ms']:,.0f}", f"{r['tokens_per_s']:,.0f}"),
            *(f"{r['peak_bytes'] / 2**20:,.0f} MiB", _batch(r)),
        )
    console.print(table)
    dtype = native_dtype(results[0]["device"])
    console.print(
        f"  [dim]Student 4 x 256, teacher 6 x 512, {dtype}, KL (T = 2) + CE, AdamW. Peak memory: "
        "of a step, above models and optimizer state.[/dim]",
        highlight=False,
    )


def _batch(result: dict[str, Any]) -> str:
    if result["largest_batch"] is None:
        return ""
    more = " or more" if result["largest_batch"] == MOST else ""
    return f"{result['largest_batch']} x {result['length']}{more}"


def _llama(layers: int, width: int, step: Step) -> Any:
    config = LlamaConfig(
        vocab_size=step.vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(step.device, DTYPES[native_dtype(step.device)])


def _losses(step: Step) -> Callable[..., torch.Tensor]:
    """(student, teacher, ids) -> loss, from hidden states and heads or from full logits."""
    case = Case(n=step.batch * step.length, vocab=step.vocab)

    def fused(s: LlamaForCausalLM, t: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = t.model(ids).last_hidden_state
        student = LMHead(s.model(ids).last_hidden_state[:, :-1], s.lm_head.weight)
        teacher = LMHead(hidden[:, :-1], t.lm_head.weight)
        return kd_loss(student, teacher, ids[:, 1:], temperature=2.0, ce_weight=1.0)

    def eager(s: LlamaForCausalLM, t: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = t(ids).logits[:, :-1].flatten(0, 1)
        student = s(ids).logits[:, :-1].flatten(0, 1)
        return plain_loss(student, teacher, ids[:, 1:].flatten(), case, torch.float32)

    return fused if step.loss == "fusedkd" else eager


class _Trainer:
    """The models and their optimizer; what a step takes."""

    def __init__(self, step: Step) -> None:
        torch.manual_seed(0)
        self.step = step
        self.student, self.teacher = _llama(4, 256, step), _llama(6, 512, step)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, fused=True)
        self.loss_of = _losses(step)
        self.time(1)  # optimizer state and the runtime's own memory are there afterwards

    def time(self, batch: int) -> float:
        step = self.step
        ids = torch.randint(0, step.vocab, (batch, step.length), device=step.device)
        begin = time.perf_counter()
        self.loss_of(self.student, self.teacher, ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if step.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def peak(self, batch: int) -> int:
        before = reset_peak(self.step.device)
        self.time(batch)
        return peak(self.step.device) - before


def _largest(trainer: _Trainer, limit: int) -> int:
    """The largest batch whose measured peak stays within ``limit``.

    Peak memory is all but a straight line in the batch: two small steps predict where it crosses
    the limit, and steps there settle it. Every answer was run; none is extrapolated.
    """
    peaks = {batch: trainer.peak(batch) for batch in (1, 4)}
    slope = max((peaks[4] - peaks[1]) / 3, 1.0)
    guess = max(1, min(MOST, int(1 + (limit - peaks[1]) / slope)))
    for _ in range(5):
        if guess not in peaks:
            peaks[guess] = trainer.peak(guess)
        fits = peaks[guess] <= limit
        following = guess + (1 if fits else -1)
        if not 1 <= following <= MOST or following in peaks:
            break
        guess = following
    return max((batch for batch, size in peaks.items() if size <= limit), default=0)


class _Clock(TrainerCallback):
    """Milliseconds of each step, and the peak memory of the last one."""

    def __init__(self, step: Step) -> None:
        self.device, self.times, self.bytes = step.device, list[float](), 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self.before = reset_peak(self.device)
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append((time.perf_counter() - self.begin) * 1e3)
        if state.global_step == state.max_steps:
            self.bytes = peak(self.device) - self.before


def _host_steps(step: Step) -> tuple[list[float], int]:
    """Milliseconds of each step of a `DistillationTrainer` as its users start it, and peak memory.
    A warm-up step comes before, the one whose memory is measured last."""
    torch.manual_seed(0)
    steps, clock = step.steps + 2, _Clock(step)
    ids = torch.randint(0, step.vocab, (steps * step.batch, step.length))
    labels = ids.clone()
    labels[:, : step.length - round(step.counted * step.length)] = IGNORE  # the answer comes last
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationArguments(
            output_dir=folder,
            per_device_train_batch_size=step.batch,
            max_steps=steps,
            temperature=2.0,
            kd_weight=1.0,
            ce_weight=1.0,
            use_cpu=step.device == "cpu",
            bf16=native_dtype(step.device) == "bf16",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        models = _llama(4, 256, step), _llama(6, 512, step)
        DistillationTrainer(*models, arguments, train_dataset=rows, callbacks=[clock]).train()
    return clock.times[1:-1], clock.bytes


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """A :class:`Step`'s fields and what was measured of it, in the process that is measured."""
    step, largest = Step(**fields), None
    if step.loss == "trainer":
        times, most = _host_steps(step)
    else:
        trainer = _Trainer(step)
        most = trainer.peak(step.batch)
        times = [trainer.time(step.batch) for _ in range(step.steps)]
        largest = _largest(trainer, step.limit) if step.limit else None
    median, low, high = spread(times)
    return {
        **fields,
        "step_ms": median,
        "step_p10_ms": low,
        "step_p90_ms": high,
        "tokens_per_s": step.batch * step.length / median * 1e3,
        "peak_bytes": most,
        "largest_batch": largest,
    }
