"""Random calls of kd_loss: any form, dtype, layout and keyword, by a seed."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from oracle import Case, table_value, tensors
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, divergences

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = (1, 2, 3, 5, 8, 16, 17, 31, 33, 48, 63, 64, 65, 70)
LARGE = (127, 129, 255, 257, 1025)
LAYOUTS = ("plain", "plain", "rows", "columns", "leading", "vocabulary", "expanded", "steps")


def random_divergence(rng: random.Random, tame: bool = False) -> divergences.Divergence:
    """Any divergence with parameters from its whole range; ``tame`` keeps the powers of p and q
    positive, for temperatures at which a negative one passes any number's range."""
    name = rng.choice(divergences.names())
    unit = rng.uniform(0.02, 0.98)
    if name == "alpha":
        others = [rng.uniform(-0.7, -0.1), rng.uniform(1.1, 1.7)]
        return divergences.alpha(unit if tame else rng.choice([unit, *others]))
    if name == "alpha_beta":
        a, b = rng.uniform(0.1, 1.2), rng.uniform(0.1, 1.2)
        if not tame and rng.random() < 0.3:
            a, b = rng.choice([(a, -0.4 * a), (-0.4 * b, b)])
        return divergences.alpha_beta(a, b)
    count = len(divergences.make(name).params)
    try:
        return divergences.make(name, *[unit] * count)
    except ValueError:  # a newer divergence with another range: its defaults
        return divergences.make(name)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, as a view of other strides."""
    if layout == "rows" and x.dim() > 1:  # like logits[..., :-1, :]
        return torch.cat([x, torch.full_like(x[..., :1, :], math.nan)], -2)[..., :-1, :]
    if layout == "columns":
        nan = x.new_full((*x.shape[:-1], 3), math.nan)
        return torch.cat([nan, x, nan], -1)[..., 3:-3]
    if layout == "leading" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "vocabulary" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "steps":
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]
    return x.contiguous()


def _maybe_expanded(x: Tensor, layout: str) -> Tensor:
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand_as(x)
    return _laid_out(x, layout)


class _Maker:
    """Draws a Case from a seed."""

    def __init__(self, seed: int, device: torch.device, most: int) -> None:
        self.rng, self.device = random.Random(seed), device
        self.generator = torch.Generator().manual_seed(seed)
        rng = self.rng
        self.v = rng.choice(SMALL if rng.random() < 0.9 else LARGE)
        while True:
            self.leading = tuple(rng.randint(1, 6) for _ in range(rng.choice([0, 1, 1, 2, 2, 3])))
            if math.prod(self.leading) <= most:
                break
        self.extreme = rng.random() < 0.15
        self.spread = 1.0 if self.extreme else rng.choice([0.3, 1.0, 3.0, 6.0])
        self.dtype = rng.choice(DTYPES)
        self.padded = rng.random() < 0.3

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def side(self, dtype: torch.dtype, like: Tensor | None) -> tuple[Tensor | LMHead, str]:
        rng = self.rng
        columns = self.v + (rng.choice([0, 1, 3, 9]) if self.padded else 0)

        def finish(x: Tensor) -> Tensor:
            return x.to(dtype).to(self.device)

        if rng.random() < 0.55:
            x = self.normal(*self.leading, columns) * self.spread
            if like is not None and like.shape == x.shape and rng.random() < 0.3:
                x = like.double().cpu() + 0.01 * x  # a student that is nearly right
            layout = rng.choice(LAYOUTS)
            return _maybe_expanded(finish(x), layout), layout
        width = rng.randint(1, 24)
        layout = rng.choice(LAYOUTS)
        hidden = finish(self.normal(*self.leading, width))
        weight = finish(self.normal(columns, width) * self.spread / width**0.5)
        weight = _laid_out(weight, rng.choice(("plain", "plain", "vocabulary", "columns")))
        bias = finish(self.normal(columns)) if rng.random() < 0.4 else None
        ids = None
        if rng.random() < 0.2:  # rows of a larger weight, in any order
            more = columns + rng.randint(0, 5)
            weight, ids = (
                finish(self.normal(more, width) * self.spread / width**0.5),
                torch.randperm(more, generator=self.generator)[:columns].to(self.device),
            )
            bias = None if bias is None else finish(self.normal(more))
        return LMHead(
            _maybe_expanded(hidden, layout),
            weight,
            bias,
            logit_scale=rng.choice([1.0, 1.0, 0.125, 1.7]),
            softcap=rng.choice([None, None, 3.0, 30.0]),
            ids=ids,
        ), layout

    def keywords(self) -> dict[str, Any]:
        rng = self.rng
        temperature = rng.choice([1.0, 2.0, rng.uniform(0.5, 5)])
        if self.extreme:
            temperature = rng.choice([0.01, 0.1, 50.0, 1000.0])
        options: dict[str, Any] = {
            # fp16 has no range to spare for gradients of 1e5 either
            "divergence": random_divergence(rng, self.extreme or self.dtype == torch.float16),
            "temperature": temperature,
            "kd_weight": rng.choice([1.0, 1.0, 0.0, rng.uniform(0, 2)]),
            "scale_by_t2": rng.random() < 0.7,
            "reduction": rng.choice(["mean", "mean", "sum", "none"]),
        }
        if rng.random() < 0.25 and not self.extreme:
            options["teacher_temperature"] = rng.uniform(0.5, 4)
        if options["reduction"] != "none" and rng.random() < 0.3:
            number = rng.uniform(0.5, 20)
            options["normalizer"] = rng.choice([number, torch.tensor(number, device=self.device)])
        if self.padded:
            options["vocab_size"] = self.v
        if rng.random() < 0.5:
            options["chunk_bytes"] = rng.choice([1, 300, 2000])
        if rng.random() < 0.4:
            w = torch.rand(self.leading, generator=self.generator) * 2
            w = w * (torch.rand(self.leading, generator=self.generator) < 0.7)
            kind = rng.choice([torch.float32, torch.float64, torch.int64, torch.bool])
            options["token_weights"] = w.to(kind).to(self.device)
        return options

    def labels(self, keywords: dict[str, Any]) -> Tensor | None:
        rng = self.rng
        if rng.random() < 0.2:
            return None
        keywords["ce_weight"] = rng.choice([0.0, 1.0, rng.uniform(0, 2)])
        keywords["label_smoothing"] = rng.choice([0.0, 0.0, 0.1, rng.random()])
        keywords["ignore_index"] = rng.choice([-100, -100, -1, 0, self.v - 1, self.v // 2])
        y = torch.randint(self.v, self.leading, generator=self.generator)
        ignored = torch.rand(self.leading, generator=self.generator) < 0.25
        return torch.where(ignored, keywords["ignore_index"], y).to(self.device)


def random_case(seed: int, device: torch.device, most: int = 12) -> Case:
    """A call with at most ``most`` tokens."""
    make = _Maker(seed, device, most)
    rng = make.rng
    teacher_dtype = make.dtype if rng.random() < 0.7 else rng.choice(DTYPES)
    teacher, _ = make.side(teacher_dtype, None)
    like = teacher if isinstance(teacher, Tensor) else None
    student, layout = make.side(make.dtype, like)
    keywords = make.keywords()
    labels = make.labels(keywords)
    named = tensors(student)
    wanted = [name for name in named if rng.random() < 0.75] or [rng.choice(list(named))]
    for name in wanted:
        named[name].requires_grad_()
    if isinstance(student, Tensor):
        keywords["inplace"] = layout == "plain" and rng.random() < 0.3
    if rng.random() < 0.3:
        keywords["z_loss_weight"] = rng.choice([1e-4, rng.uniform(0, 0.5)])
    shape = make.leading if keywords["reduction"] == "none" else ()
    upstream = make.normal(*shape).to(device) if rng.random() < 0.7 else None
    return Case(student, teacher, labels, keywords, upstream, wanted, layout)


def sparse_case(seed: int, device: torch.device, most: int = 12, tail: str = "") -> Case:
    """The same call with a teacher of some entries per token: any ids, in any order, padded."""
    case, rng = random_case(seed, device, most), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    leading = next(iter(tensors(case.student).values())).shape[:-1]
    v = case.keywords.get("vocab_size") or _columns(case.student)
    k = rng.randint(0, min(v - 1, 20))  # something is left for the tail
    if tail and rng.random() < 0.1:
        k = min(v, 70)  # perhaps all of it
    lp = torch.randn(*leading, v, generator=generator, dtype=torch.float64) * rng.choice([1, 3, 6])
    lp = lp.log_softmax(-1)
    ids = torch.rand(lp.shape, generator=generator).argsort(-1)[..., :k]
    if rng.random() < 0.6:
        ids = ids.gather(-1, lp.gather(-1, ids).argsort(-1, descending=True))
    padding = torch.rand(ids.shape, generator=generator) < rng.choice([0.0, 0.2])
    lp = torch.where(padding, math.nan, lp.gather(-1, ids)).to(rng.choice(DTYPES)).to(device)
    ids = torch.where(padding, -1, ids).to(rng.choice([torch.int64, torch.int32])).to(device)
    tails = ["bucket", "bucket"]
    if tail:  # a token without entries has nothing to be conditional on
        tails = [tail if k and not padding.all(-1).any() else "generalized"]
    elif math.isfinite(table_value(case.keywords["divergence"])):
        tails += ["drop"] if padding.any() or not k else ["drop", "renormalize"]
    case.teacher = SparseTeacher(ids, lp, rng.choice(tails))
    return case


def _columns(side: Tensor | LMHead) -> int:
    if isinstance(side, Tensor):
        return side.shape[-1]
    return side.weight.shape[0] if side.ids is None else side.ids.numel()
