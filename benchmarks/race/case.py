"""What is measured: a case, and the tensors it is measured on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedkd import divergences
from fusedkd.divergences import Divergence

IGNORE = -100

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# fp16 cannot hold q - p over thousands of tokens; like everybody, multiply the loss first.
LOSS_SCALE = {"bf16": 1.0, "fp16": 2.0**12, "fp32": 1.0}

LOGIT_STD = 2.5  # a trained model's logits have a spread of 2 to 4


@dataclass(frozen=True)
class Case:
    """One point of the axes. Plain numbers and strings, so that a child process can be sent it."""

    form: str = "dense"  # logits, or "head": hidden states and output projections
    divergence: str = "forward_kl"  # a name, or a name with parameters: "jsd(beta=0.3)"
    n: int = 512
    vocab: int = 151936
    dtype: str = "bf16"
    temperature: float = 2.0
    kd_weight: float = 1.0
    ce_weight: float = 1.0
    mode: str = "train"  # forward + backward, or "eval": forward without gradients
    frozen: bool = False  # the student's head has no gradient
    counted: float = 1.0  # share of the rows with a label; the others carry IGNORE
    reduction: str = "mean"  # or "none": a loss per row, whose mean is then taken
    inplace: bool = False
    hidden_student: int = 896
    hidden_teacher: int = 1536
    chunk_bytes: int | None = None
    threads: int | None = None  # None: as torch chooses
    device: str = "cpu"

    @property
    def kd_scale(self) -> float:
        """T^2 keeps the size of the soft gradient as T changes (Hinton et al. 2015)."""
        return self.kd_weight * self.temperature**2

    @property
    def n_counted(self) -> int:
        return int(counts(self.n, self.counted).sum())

    @property
    def divergence_object(self) -> Divergence:
        return divergences.make(self.divergence)

    @property
    def label(self) -> str:
        loss = self.divergence if self.kd_weight else ""
        loss += (" + CE" if loss else "CE") if self.ce_weight else ""
        parts = [self.form, self.dtype, f"{self.n:,} x {self.vocab:,}", loss]
        if self.kd_weight:
            parts.append(f"T={self.temperature:g}")
        if self.form == "head":
            parts.append(f"H={self.hidden_student}/{self.hidden_teacher}")
        parts += [f"{self.counted:.0%} counted"] if self.counted < 1 else []
        parts += [f"reduction={self.reduction}"] if self.reduction != "mean" else []
        parts += [word for word in ("frozen", "inplace") if getattr(self, word)]
        parts += ["eval"] if self.mode == "eval" else []
        parts += [f"{self.threads} threads"] if self.threads else []
        return ", ".join(parts)

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def counts(n: int, share: float) -> Tensor:
    """(n,) bool: which rows count, spread evenly. The first always does."""
    position = (torch.arange(n, dtype=torch.float64) * share).floor()
    return position.diff(prepend=position.new_tensor([-1.0])) > 0


def native_dtype(device: str) -> str:
    """Half precision where it is multiplied natively. On other CPUs torch's bf16 product is a plain
    loop, 5 to 30 times as slow as fp32: nobody trains in it, and nothing can be compared with it.
    """
    return "bf16" if device != "cpu" or torch.cpu._is_avx512_bf16_supported() else "fp32"


@dataclass(frozen=True, eq=False)
class Problem:
    """The inputs of a case: (N, V) logits, or (N, H) hidden states and (V, H) weights."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    student_weight: Tensor | None = None
    teacher_weight: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is wanted for."""
        both = (self.student, self.student_weight)
        return [x for x in both if x is not None and x.requires_grad]

    def with_case(self, case: Case) -> Problem:
        """The first rows of the same tensors: with a gradient where the case wants one, with a
        label where a row counts."""
        train = case.mode == "train"
        weight = self.student_weight
        if weight is not None:
            weight = weight.detach().requires_grad_(train and not case.frozen)
        labels = self.labels[: case.n]
        counted = counts(case.n, case.counted).to(labels.device)
        return Problem(
            student=self.student.detach()[: case.n].requires_grad_(train),
            teacher=self.teacher[: case.n],
            labels=labels.masked_fill(~counted, IGNORE),
            student_weight=weight,
            teacher_weight=self.teacher_weight,
        )


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Random inputs; the teacher of dense cases agrees with the student in part, as it would."""
    dtype, device = DTYPES[case.dtype], case.device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        out = torch.empty(*shape, dtype=dtype, device=device)
        return out.normal_(0, std, generator=generator)

    labels = torch.randint(0, case.vocab, (case.n,), device=device, generator=generator)
    if case.form == "dense":
        student = normal(case.n, case.vocab, std=LOGIT_STD)
        teacher = normal(case.n, case.vocab, std=LOGIT_STD / 2)
        for rows in range(0, case.n, 64):  # by blocks: no temporary of the whole size
            teacher[rows : rows + 64].add_(student[rows : rows + 64], alpha=0.8)
        return Problem(student, teacher, labels).with_case(case)
    s, t = case.hidden_student, case.hidden_teacher
    problem = Problem(
        student=normal(case.n, s, std=1.0),
        teacher=normal(case.n, t, std=1.0),
        labels=labels,
        student_weight=normal(case.vocab, s, std=LOGIT_STD / s**0.5),
        teacher_weight=normal(case.vocab, t, std=LOGIT_STD / t**0.5),
    )
    return problem.with_case(case)
