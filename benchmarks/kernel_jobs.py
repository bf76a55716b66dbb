"""Every Triton kernel that a launch can choose, as the launchers would have it compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedkd import divergences
from fusedkd.kernels.triton import (
    config,
    largest,
    launches,
    ops,
    programs,
    sparse,
    sparse_ops,
    token_ops,
    tokens,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# student, teacher, gradient; the last is a head's chunk (ops.head_dtypes)
DTYPES = {
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "fp32": (FP32, FP32, FP32),
    "head": (FP32, FP32, BF16),
}
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
# Every launch of the table, but of the pieces only one count: it enters a kernel as the length of
# one tiny load.
LAUNCHES = tuple(entry.launch(1, 262144, 132) for entry in launches.TABLE)
TAILS = ("", "bucket", "drop")
# parameters that have kernels of their own
OTHERS = {"jsd(0.1)": divergences.jsd(0.1)}
FLAGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "all": {"metrics": True, "transformed_s": True, "transformed_t": True},
    "part": {"part": True, "metrics": True},  # of a row's columns
}
# Stages without a divergence: of one token's log-probability, with "all" the entropy beside it.
TOKEN_KERNELS = {
    "token statistics": tokens.statistics_kernel,
    "token gradient": tokens.gradient_kernel,
}
ALONE = TOKEN_KERNELS | {"top k": largest.top_kernel}


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    target: str
    dtype: str
    divergence: str
    launch: config.Launch
    stage: str
    flags: str = "plain"
    tail: str = ""  # "bucket" or "drop": against a teacher of K entries; "": against a dense one

    @property
    def backend(self) -> str:
        """ "cuda" or "hip"."""
        return TARGETS[self.target].backend


def jobs(targets: Sequence[str], dtypes: Sequence[str], flags: Sequence[str]) -> Iterator[Job]:
    """Every kernel that a launch can choose."""
    for target, dtype in itertools.product(targets, dtypes):
        if dtype != "head":  # scales one tensor
            yield Job(target, dtype, "-", config.SCALE, "scale")
        whole = [flag for flag in flags if flag != "part"]
        for flag, launch, stage in itertools.product(whole, LAUNCHES, TOKEN_KERNELS):
            yield Job(target, dtype, "-", launch, stage, flag)
        names = (*divergences.names(), *OTHERS)
        for name, flag, launch in itertools.product(names, flags, LAUNCHES):
            for tail in TAILS[: 1 if name in OTHERS else None]:
                for stage in stages_of(dtype, name, flag, launch, tail):
                    yield Job(target, dtype, name, launch, stage, flag, tail)


def sample() -> list[Job]:
    """Few of them, but every divergence in every stage, and every target with every dtype and
    all flags: then the divergence, the launch and the stage go round."""
    chosen = [
        Job("sm_90", "bf16", name, launch, stage)
        for name in (*divergences.names(), *OTHERS)
        for launch in LAUNCHES[3 if name in OTHERS else 2 :]
        for stage in config.stages(_variant("bf16", name, "plain"), launch)
    ]
    chosen += [
        Job("sm_90", "bf16", name, launches.JOINT, "joint")
        for name in ("forward_kl", "jsd", "alpha")
    ]
    # against K entries: every way through the sweeps (closed or not, bucket or not)
    chosen += [
        Job("sm_90", "bf16", name, launch, stage, "plain", tail)
        for name, tail in (("forward_kl", "bucket"), ("jsd", "bucket"), ("total_variation", "drop"))
        for launch in LAUNCHES[2:]
        for stage in stages_of("bf16", name, "plain", launch, tail)
    ]
    # the one that needs the most registers
    chosen.append(Job("sm_100", "head", "forward_kl", LAUNCHES[2], "statistics", "all"))
    chosen += [
        Job("sm_90", "bf16", name, LAUNCHES[3], stage, "part")
        for name, stage in (("forward_kl", "statistics"), ("jsd", "middle"), ("jsd", "gradient"))
    ]
    chosen += [
        Job("sm_90", "bf16", "jsd", LAUNCHES[3], stage, "part", "bucket")
        for stage in stages_of("bf16", "jsd", "part", LAUNCHES[3], "bucket")
    ]
    turn = itertools.product(TARGETS, DTYPES, ("plain", "all"))
    for i, (target, dtype, flag) in enumerate(turn):
        name = divergences.names()[i % len(divergences.names())]
        launch = LAUNCHES[i % len(LAUNCHES)]
        for tail in ("", TAILS[1 + i % 2])[: 1 + (i % 3 == 0)]:
            stages = stages_of(dtype, name, flag, launch, tail)
            chosen.append(
                Job(target, dtype, name, launch, stages[i // 4 % len(stages)], flag, tail)
            )
        if i % 8 in (1, 6):  # of each target the larger kernel with all, the smaller for a head
            stage = "token gradient" if flag == "all" else "token statistics"
            chosen.append(Job(target, dtype, "-", LAUNCHES[i // 8], stage, flag))
        if flag == "plain" and dtype != "head":
            chosen.append(Job(target, dtype, "-", config.SCALE, "scale"))
    return chosen


def _variant(dtype: str, divergence: str, flags: str, tail: str = "") -> config.Variant:
    variant = config.Variant(*DTYPES[dtype], divergence, **FLAGS[flags])
    if tail:
        return variant._replace(teacher=variant.student, transformed_t=False)
    made = OTHERS.get(divergence) or divergences.make(divergence)
    return variant._replace(divergence=ops.dense_name(made))


def stages_of(
    dtype: str, divergence: str, flags: str, launch: config.Launch, tail: str
) -> tuple[str, ...]:
    variant = _variant(dtype, divergence, flags, tail)
    if tail:
        return sparse_ops.stages(variant, launch, sparse_ops.tail_of(tail))
    return config.stages(variant, launch)


def sweeps(job: Job) -> bool:
    """Whether a kernel of one stage walks its row: of a part's ids alone, none is to be walked."""
    if not job.tail or job.stage != "middle":
        return True
    variant = _variant(job.dtype, job.divergence, job.flags, job.tail)
    return sparse_ops.outside(variant, sparse_ops.tail_of(job.tail))


def source(job: Job) -> ASTSource:
    """What the launcher would hand to Triton's compiler."""
    if job.stage == "scale":
        return _scale_source(job)
    if job.stage in ALONE:
        return _token_source(job)
    variant = _variant(job.dtype, job.divergence, job.flags, job.tail)
    kernel, constants = _kernel(job, variant)
    plan = constants["plan"]
    if not plan.metrics:
        constants["metrics"] = None
    if not plan.ce:
        constants["labels"] = None
    if job.stage == "whole":
        constants |= {"partial": None, "sums": None}
    if job.stage != "joint" and not job.tail:
        constants["arrived"] = None
    acc = "fp64" if plan.acc == tl.float64 else "fp32"
    pointers = dict.fromkeys(("row_scale", "loss", "metrics"), f"*{acc}") | {"log_probs": "*fp64"}
    pointers |= {
        "labels": "*i64",
        "indices": "*i32",
        "partial": "*fp64",
        "sums": "*fp64",
        "arrived": "*i32",
    }
    pointers["id_logits"] = f"*{NAMES[variant.student]}"
    for name in ("student", "teacher", "grad"):
        pointers[name] = f"*{NAMES[getattr(variant, name)]}"
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        kind = "constexpr" if name in constants else pointers.get(name)
        signature[name] = kind or parameter.annotation_type
    return ASTSource(kernel, signature, constants)


def _kernel(job: Job, variant: config.Variant) -> tuple[Any, dict[str, Any]]:
    """The kernel and its constants, as the launchers have them."""
    if job.tail:
        of = (variant, job.launch, job.stage, sparse_ops.tail_of(job.tail), job.backend)
        return sparse.sparse_kernel, sparse_ops.constants(*of)
    return programs.row_kernel, {"plan": plan_of(job)}


def plan_of(job: Job) -> config.Plan | None:
    """Of a row kernel."""
    if job.tail or job.stage in ("scale", *ALONE):
        return None
    variant = _variant(job.dtype, job.divergence, job.flags)
    return config.plan(variant, job.launch, job.stage, job.backend)


def _scale_source(job: Job) -> ASTSource:
    dtype = DTYPES[job.dtype][0]
    signature = {p.name: p.annotation_type for p in programs.scale_kernel.params}
    signature |= {"x": f"*{NAMES[dtype]}", "factor": "*fp32", "plan": "constexpr"}
    constants = {"plan": config.scale_plan(dtype, job.backend)}
    return ASTSource(programs.scale_kernel, signature, constants)


def _token_source(job: Job) -> ASTSource:
    (student, _, grad), more = DTYPES[job.dtype], job.flags != "plain"
    written = grad if job.stage == "token gradient" else None
    kind = token_ops.Kind(
        student, written, more, transformed=job.flags == "all", aligned=True,
        top=job.stage == "top k",
    )  # fmt: skip
    constants: dict[str, Any] = {"plan": token_ops.plan(kind, job.launch, job.backend)}
    if written is not None and not more:
        constants["linear"] = None
    pointers = {"logits": student, "grad": grad, "counts": torch.uint8, "tokens": torch.int64}
    pointers |= {"ids": torch.int64, "keys": torch.int64, "columns_found": torch.int32}
    names = NAMES | {torch.uint8: "u8", torch.int64: "i64", torch.int32: "i32"}
    signature = {}
    for p in ALONE[job.stage].params:
        of = f"*{names[pointers[p.name]]}" if p.name in pointers else p.annotation_type or "*fp64"
        signature[p.name] = "constexpr" if p.name in constants else of
    return ASTSource(ALONE[job.stage], signature, constants)
