"""What the loss takes, in each of its forms and by each who computes it: found by running its own
code on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fusedkd import LMHead, SparseTeacher, backends, kd_loss
from fusedkd.benchmarks.race.case import DTYPES, Case, Problem
from fusedkd.benchmarks.race.providers import PROVIDERS
from fusedkd.kernels import RowCall, Rows
from fusedkd.plan.watch import Array, Watch

META = torch.device("meta")


class Shapes(backends.CustomRows):
    """A backend that computes nothing: it makes what the real one makes, and notes what that would
    do.

    Args:
        watch: which is told.
        real: whose dtypes a head's chunks have: "triton" or "cpu".
    """

    def __init__(self, watch: Watch, real: str) -> None:
        super().__init__("reference", META)
        self.watch, self.head_dtypes = watch, backends.load(real).head_dtypes

    def rows(self, call: RowCall) -> Rows:
        """Each side is read, the gradient written: what the kernels' bar counts."""
        sides = (call.student, call.teacher, call.grad)
        moved = sum(x.numel() * x.itemsize for x in sides if isinstance(x, Tensor))
        made = call.results()
        self.watch.note(0.0, moved)
        return made

    def empty(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def mm_(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        moved = sum(x.numel() * x.itemsize for x in (out, a, b))
        self.watch.note(2.0 * out.numel() * a.shape[1], moved)

    def scale_(self, grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
        """Where the factor is 1, as it is of a mean, nothing is touched but what is converted."""
        moved = 0 if out is None else grad.numel() * grad.itemsize + out.numel() * out.itemsize
        self.watch.note(0.0, moved)


class Sides(NamedTuple):
    """Shapes of both sides' heads."""

    vocab_size: int
    student: int  # H
    teacher: int
    dtype: torch.dtype
    student_softcap: float | None
    teacher_softcap: float | None
    bias: bool


class Cost(NamedTuple):
    """Of a loss, forward and backward down to the hidden states."""

    peak: int  # bytes above hidden states, weights and labels
    kept: int  # of them what the rest of the backward has beside it: the head's gradient
    table: Array  # as of Watch


@dataclass(frozen=True)
class Setting:
    """How the loss is called."""

    counted: float = 1.0
    real: str = "triton"  # which backend runs
    chunk_bytes: int | None = None
    top_k: int = 64


Loss = Callable[["Tensors", Setting, Watch], Tensor]


class Tensors(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    sides: Sides

    def logits(self) -> tuple[Tensor, Tensor]:
        """As the models make them."""
        with torch.no_grad():
            teacher = F.linear(self.teacher_hidden, self.teacher_weight)
            teacher = _capped(teacher, self.sides.teacher_softcap)
        student = F.linear(self.hidden, self.weight, self.bias)
        return _capped(student, self.sides.student_softcap), teacher

    def heads(self) -> tuple[LMHead, LMHead]:
        softcaps = self.sides[-3:-1]
        student = LMHead(self.hidden, self.weight, self.bias, softcap=softcaps[0])
        return student, LMHead(self.teacher_hidden, self.teacher_weight, softcap=softcaps[1])


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@dataclass(frozen=True)
class Way:
    """One form of the loss.

    Args:
        teacher: what of it is in memory: "whole", its "head", or "nothing".
        peer: a provider of `fusedkd bench`, whose own code runs; with ``dense``, on logits.
    """

    name: str
    what: str
    run: Loss | None = None
    teacher: str = "whole"
    peer: str = ""
    dense: bool = False

    def unavailable(self, sides: Sides) -> str | None:
        """Why it cannot be planned here."""
        if not self.peer:
            return None
        if not self.dense and (sides.student_softcap or sides.teacher_softcap):
            return "takes no softcap"
        return PROVIDERS[self.peer].reason_missing(_case(1, sides))

    def cost(self, tokens: int, sides: Sides, setting: Setting) -> Cost:
        """For so many tokens."""
        with ExitStack() as stack:
            if self.peer:  # which asks for a device that there is
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(FakeTensorMode())
            x = _tensors(tokens, sides, "cpu" if self.peer else "meta")
            leaves = [y for y in (x.hidden, x.weight, x.bias) if y is not None]
            watch = stack.enter_context(Watch())
            self._loss(x, setting, watch).backward()
        hidden, *head = (x.grad for x in leaves)
        assert hidden is not None
        kept = sum(x.numel() * x.itemsize for x in head if x is not None)
        return Cost(watch.peak, kept, watch.table())

    def _loss(self, x: Tensors, setting: Setting, watch: Watch) -> Tensor:
        if self.run is not None:
            return self.run(x, setting, watch)
        case = _case(len(x.labels), x.sides)
        problem = Problem(x.hidden, x.teacher_hidden, x.labels, x.weight, x.teacher_weight)
        if self.dense:
            problem = Problem(*x.logits(), x.labels)
        loss = PROVIDERS[self.peer].prepare(case, problem)()
        assert loss is not None
        return loss


def _case(tokens: int, sides: Sides) -> Case:
    """Forward KL at T = 2, as :func:`_ours`."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == sides.dtype)
    return Case("head", n=tokens, vocab=sides.vocab_size, dtype=dtype, ce_weight=0, device="cuda")


def _tensors(n: int, sides: Sides, device: str) -> Tensors:
    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=sides.dtype, device=device)

    return Tensors(
        made(n, sides.student).requires_grad_(),
        made(sides.vocab_size, sides.student).requires_grad_(),
        made(sides.vocab_size).requires_grad_() if sides.bias else None,
        made(n, sides.teacher),
        made(sides.vocab_size, sides.teacher),
        torch.empty(n, dtype=torch.long, device=device),
        sides,
    )


def _ours(student: Any, teacher: Any, x: Tensors, setting: Setting, watch: Watch) -> Tensor:
    n, backend = len(x.labels), Shapes(watch, setting.real)
    return kd_loss(
        *(student, teacher, x.labels),
        temperature=2.0,
        num_counted=max(1, round(n * setting.counted)),
        chunk_bytes=setting.chunk_bytes,
        backend=backend,  # type: ignore[arg-type]  # as fusedkd.backends.resolve takes it
    )


def _heads(x: Tensors, setting: Setting, watch: Watch) -> Tensor:
    return _ours(*x.heads(), x, setting, watch)


def _dense(x: Tensors, setting: Setting, watch: Watch) -> Tensor:
    return _ours(*x.logits(), x, setting, watch)


def _cached(x: Tensors, setting: Setting, watch: Watch) -> Tensor:
    shape = len(x.labels), min(setting.top_k, x.sides.vocab_size)
    ids = torch.empty(shape, dtype=torch.int32, device=META)
    teacher = SparseTeacher(ids, torch.empty(shape, device=META))
    return _ours(x.heads()[0], teacher, x, setting, watch)


HEADS = "fusedkd, heads"
EAGER = "eager"
WAYS = (
    Way(EAGER, "the formula in torch on both models' logits", peer="eager", dense=True),
    Way("TRL, GKD", "generalized_jsd_loss of TRL's GKDTrainer", peer="gkd", dense=True),
    Way("Liger", "LigerFusedLinearJSDLoss, as if not compiled", peer="liger"),
    Way("TRL, chunked", "ChunkedDivergenceFunction of TRL's DistillationTrainer", peer="trl"),
    Way("fusedkd, logits", "kd_loss of both models' logits", _dense),
    Way(HEADS, "kd_loss of two LMHeads: what `fusedkd distill` does", _heads),
    Way("fusedkd, hidden cached", "the teacher's hidden states from a cache", _heads, "head"),
    Way("fusedkd, top k cached", "its most probable entries from a cache", _cached, "nothing"),
)
