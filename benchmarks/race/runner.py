"""Groups of cases, measured together: check, race, memory, bars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .case import Case, Problem, make_problem
from .check import Truth, refuse_if_wrong
from .formulas import is_independent
from .memory import peak_extra
from .provider import FLOOR, OURS, Provider
from .providers import PROVIDERS
from .results import BarResult, GroupResult, Row
from .timing import Contestant, race, spread

OWN_FORMULA = (
    "no formula in benchmarks/race/formulas.py, so eager is fusedkd's Divergence.value under "
    "autograd, and so is the truth, at fp64"
)


@dataclass(frozen=True)
class Bar:
    """A promise of the project: ``value(result)`` is at most, or at least, ``limit``."""

    label: str
    value: Callable[[GroupResult], float | None]
    limit: float
    at_most: bool = True
    unit: str = "x"


@dataclass(frozen=True)
class Group:
    """What is raced in one set of rounds: every provider on every case."""

    title: str
    cases: tuple[Case, ...]
    providers: tuple[str, ...]
    bars: tuple[Bar, ...] = ()
    timed: bool = True
    memory: bool = False


@dataclass(frozen=True)
class Effort:
    rounds: int
    budget: float  # seconds a provider may spend on a case, beyond three rounds


def ticks(group: Group, effort: Effort) -> int:
    """Steps of the progress bar."""
    rows = len(group.cases) * len(group.providers)
    return rows * ((2 + effort.rounds) * group.timed + group.memory)


def run_group(group: Group, effort: Effort, tick: Callable[[], None]) -> GroupResult:
    pairs = [(case, PROVIDERS[name]) for case in group.cases for name in group.providers]
    rows = [Row(dataclasses.asdict(case), case.label, p.name) for case, p in pairs]
    for row, (case, provider) in zip(rows, pairs, strict=True):
        row.reason = provider.reason_missing(case)
        row.note = None if is_independent(case) else f"{case.divergence}: {OWN_FORMULA}"
    ready = [(row, *pair) for row, pair in zip(rows, pairs, strict=True) if row.reason is None]
    if group.timed:
        _race(group, ready, effort, tick)
    if group.memory:
        for row, case, provider in ready:
            if not provider.bare:
                row.peak_bytes, row.memory_reason = peak_extra(case, provider.name)
            tick()
    result = GroupResult(group.title, rows)
    result.bars = [BarResult(**{**vars(bar), "value": bar.value(result)}) for bar in group.bars]
    return result


Ready = list[tuple[Row, Case, Provider]]


def _race(group: Group, ready: Ready, effort: Effort, tick: Callable[[], None]) -> None:
    problems = _Problems(group.cases)
    _check(ready, problems, tick)
    entries = []
    for row, case, provider in ready:
        if row.reason is None:
            problem = problems.of(case)
            forward = provider.prepare(case, problem)
            entries.append((row, Contestant(case, problem, forward, provider.name == FLOOR)))
    threads = torch.get_num_threads()
    try:
        race([c for _, c in entries], effort.rounds, effort.budget, tick)
    finally:
        torch.set_num_threads(threads)
    for row, contestant in entries:
        _fill(row, contestant)
    floors = {row.label: row.total_ms for row, _ in entries if row.provider == FLOOR}
    for row, _ in entries:
        row.floor_ms = floors.get(row.label)


def _check(ready: Ready, problems: _Problems, tick: Callable[[], None]) -> None:
    truths: dict[Case, Truth] = {}
    verdicts = {}
    for row, case, provider in ready:
        tick()
        if provider.bare:
            continue
        # N and threads do not change what 16 rows are checked for
        key = case.but(n=min(case.n, 16), threads=None, inplace=False)
        if (key, provider.name) not in verdicts:
            if key not in truths:
                truths = {key: Truth(case.but(inplace=False), problems.of(case))}
            try:
                verdicts[key, provider.name] = truths[key].check(provider)
            except Exception as error:  # a peer's crash is its row's result
                if provider.name == OURS:
                    raise
                row.reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                continue
            refuse_if_wrong(provider, case, verdicts[key, provider.name])
        verdict = verdicts[key, provider.name]
        row.loss_error, row.grad_error = verdict.loss_error, verdict.grad_error
        row.verdict = verdict.word


def _fill(row: Row, contestant: Contestant) -> None:
    row.reason = contestant.failed
    samples = contestant.samples
    if not samples or contestant.failed:
        return
    row.samples = len(samples)
    row.total_ms, row.p10_ms, row.p90_ms = spread([s.total for s in samples])
    row.forward_ms = spread([s.forward for s in samples])[0]
    row.host_ms = spread([s.host for s in samples])[0]


class _Problems:
    """One set of tensors, all labelled, for all cases that differ in rows, threads or loss only."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.most = max(case.n for case in cases)
        self.made: dict[tuple[object, ...], Problem] = {}

    def of(self, case: Case) -> Problem:
        sizes = (case.hidden_student, case.hidden_teacher) if case.form == "head" else ()
        key = (case.form, case.vocab, case.dtype, case.device, *sizes)
        if key not in self.made:
            self.made[key] = make_problem(case.but(n=self.most, counted=1.0))
        return self.made[key].with_case(case)


def restricted(groups: list[Group], names: Sequence[str] | None) -> list[Group]:
    """The groups with only the providers asked for; a group that loses all of them is dropped."""
    if names is None:
        return groups
    kept = [
        dataclasses.replace(g, providers=tuple(p for p in g.providers if p in names))
        for g in groups
    ]
    return [group for group in kept if group.providers]
