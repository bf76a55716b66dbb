"""The teacher cache on the demo's teacher and data: the part of cache.py that trains."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table

from fusedkd import SparseTeacher, kd_loss
from fusedkd.cache import Policy, TeacherCache, build, verify
from fusedkd.cache.of_model import job_of
from fusedkd.demo.corpus import corpus
from fusedkd.demo.run import LOSSES, Demo, Setting
from fusedkd.distributions.sparse import TAILS
from fusedkd.teachers import LiveTeacher


class OnDemo:
    """The demo's teacher, trained for a while, and caches of the demo's data."""

    def __init__(self, console: Console, work: Path, steps: int) -> None:
        disable_progress_bars()
        self.console, self.work, self.setting = console, work, Setting()
        size = self.setting
        text = corpus(size)
        self.demo = Demo(size, text, work, console)
        self.learn = partial(self.demo.experiment.train, data=text.transfer)
        self.teacher = self.demo.model(*size.teacher)
        run = self.demo.train("teacher", self.teacher, steps)
        console.print(f"teacher: {steps} steps, held-out loss {run.eval_loss:.3f}")
        self.answer = LiveTeacher(self.teacher.eval().requires_grad_(False))
        self.tokenizer = text.tokenizer
        self.rows = [*text.transfer["input_ids"], *text.held_out["input_ids"]]
        self.held_out = text.held_out.with_format("torch")["input_ids"][:32]
        self.tokens = sum(map(len, self.rows))

    def cache(
        self,
        policy: Policy,
        temperatures: tuple[float, ...] = (1.0,),
        rows: list[list[int]] | None = None,
        name: str = "all",
    ) -> TeacherCache:
        """Made where it is not there yet."""
        folder = self.work / f"{name} {policy} {temperatures}"
        rows = self.rows if rows is None else rows
        job = job_of(self.answer, self.tokenizer, rows, policy, temperatures, name="demo")
        build(folder, job, lambda ids: self.answer({"input_ids": ids}))
        return TeacherCache(folder)

    def damage(self, times: int = 200) -> None:
        """Single bytes anywhere, one at a time."""
        folder = self.cache(Policy("sample", 50)).folder
        chance, noticed = random.Random(0), 0
        files = sorted(folder.iterdir())
        for path in chance.choices(files, [f.stat().st_size for f in files], k=times):
            whole = path.read_bytes()
            place = chance.randrange(len(whole))
            changed = bytes([whole[place] ^ chance.randrange(1, 256)])
            path.write_bytes(whole[:place] + changed + whole[place + 1 :])
            noticed += any(path.name in line for line in verify(folder)[1])
            path.write_bytes(whole)
        self.console.print(f"damaged bytes noticed by verify: {noticed} of {times}")

    def speeds(self) -> None:
        """Tokens per second, in the same minute."""
        blocks = torch.tensor(self.rows[:128])
        rows: list[tuple[Any, ...]] = [("what", "us per token", "tokens per second", "ratio")]
        forward = seconds(lambda: self._forward(blocks)) / blocks.numel()
        rows.append(("teacher's forward with logits", 1e6 * forward, 1 / forward, ""))
        for policy, temperatures in ((Policy("top", 50), (1.0,)), (Policy("top", 50), (1.0, 2.0)),
                                     (Policy("sample", 50), (1.0,))):  # fmt: skip
            both = seconds(lambda p=policy, t=temperatures: self._write(p, t)) / blocks.numel()
            name = f"the same, cached: {policy}, {len(temperatures)} T"
            rows.append((name, 1e6 * both, 1 / both, f"{both / forward:.2f} of the forward"))
        student = self.demo.model(*self.setting.student)
        step = self.learn(
            "student", student, steps=12, teacher=self.teacher, loss=LOSSES["kd"]
        ).seconds_per_step
        step /= self.setting.batch * self.setting.block
        rows.append(("student's training step, live teacher", 1e6 * step, 1 / step, ""))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for policy in (Policy("top", 50), Policy("sample", 50)):
            cache = self.cache(policy)
            read = seconds(lambda c=cache: [c.get(ids, 1.0) for ids in self.rows[:256]])
            read /= 256 * self.setting.block
            name = f"reading on one core: {policy}"
            rows.append((name, 1e6 * read, 1 / read, f"{step / read:.1f} x the student's rate"))
        torch.set_num_threads(threads)
        print_table(self.console, "Speed, best of 3", *rows)

    @torch.inference_mode()
    def _forward(self, blocks: torch.Tensor) -> None:
        for batch in blocks.split(8):
            self.teacher(input_ids=batch, use_cache=False)

    def _write(self, policy: Policy, temperatures: tuple[float, ...]) -> None:
        shutil.rmtree(self.cache(policy, temperatures, self.rows[:128], "part").folder)

    def gradients(self) -> None:
        """Rms over tokens and entries, of d loss / d logits of a student that has learnt a bit,
        against the full teacher's; 100 draws take about the bytes of the top 50."""
        student = self.demo.model(*self.setting.student)
        self.demo.train("plain", student, 40)
        with torch.no_grad():
            teacher = self.teacher(input_ids=self.held_out).logits
            logits = student.eval()(input_ids=self.held_out).logits
        truth = _gradient(logits, teacher)
        scale = truth.square().mean().sqrt().item()
        outside = self.cache(Policy("top", 50), (1.0, 2.0)).tail_masses()
        self.console.print("the teacher's mass outside its top 50 at T = 1 and 2:", *outside)
        rows: list[tuple[Any, ...]] = [("kept", "tail", "bytes per token", "rms error", "relative")]
        for policy, tails in ((Policy("top", 50), TAILS),
                              (Policy("sample", 100), ("drop",)),
                              (Policy("sample", 50), ("drop",))):  # fmt: skip
            cache = self.cache(policy)
            size = _bytes(cache) / self.tokens
            for tail in tails:
                error = _gradient(logits, self._sparse(cache, tail)) - truth
                rms = error.square().mean().sqrt().item()
                rows.append((policy, tail, size, rms, f"{rms / scale:.2%}"))
        print_table(self.console, "Gradient of forward KL against the full teacher", *rows)

    def _sparse(self, cache: TeacherCache, tail: str) -> SparseTeacher:
        targets = [cache.get(ids.numpy(), 1.0) for ids in self.held_out]
        width = max(target.ids.shape[1] for target in targets)
        pads = [((0, 0), (0, width - t.ids.shape[1])) for t in targets]
        ids = [np.pad(t.ids, p, constant_values=-1) for t, p in zip(targets, pads, strict=True)]
        logs = [
            np.pad(t.log_probs, p, constant_values=-np.inf)
            for t, p in zip(targets, pads, strict=True)
        ]
        return SparseTeacher(
            torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(logs)), tail
        )

    def students(self, steps: int, temperature: float, kept: dict[str, Policy]) -> None:
        """Hinton's mix, as in the demo: 0.8 KL, 0.2 CE; of the live teacher, then of caches."""
        rows: list[tuple[Any, ...]] = [
            ("teacher", "held-out loss", "of the live one's", "ms per step")
        ]
        caches = {name: self.cache(policy, (temperature,)) for name, policy in kept.items()}
        sides: dict[str, Any] = {"live": self.teacher, **caches}
        losses: list[float] = []
        for name, side in sides.items():
            watch = self.learn(
                *(name, self.demo.model(*self.setting.student)),
                steps=steps,
                teacher=side,
                loss={**LOSSES["kd"], "temperature": temperature},
                evaluations=self.setting.evaluations,
            )
            losses.append(watch.curve[-1][2])
            change = f"{losses[-1] / losses[0] - 1:+.2%}"
            rows.append((name, losses[-1], change, 1e3 * watch.seconds_per_step))
        print_table(self.console, f"Students, {steps} steps, T = {temperature:g}", *rows)


def _bytes(cache: TeacherCache) -> int:
    return sum(file.bytes for file in cache.manifest.shards)


def _gradient(logits: torch.Tensor, teacher: Any) -> torch.Tensor:
    leaf = logits.detach().clone().requires_grad_()
    loss = kd_loss(leaf, teacher, reduction="sum", backend="reference")
    return torch.autograd.grad(loss, leaf)[0]


def print_table(console: Console, title: str, *rows: tuple[Any, ...]) -> None:
    """Rows of cells, the first one the header."""
    table = Table(*map(str, rows[0]), title=title, title_justify="left")
    for row in rows[1:]:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The best of so many times."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
