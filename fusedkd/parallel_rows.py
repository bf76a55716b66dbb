"""Rows of which each rank of a group has some columns: the mathematics of
:mod:`fusedkd.parallel`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fusedkd.backends import CustomRows
from fusedkd.distributions.sparse import SparseRows
from fusedkd.divergences import Divergence
from fusedkd.kernels import METRICS, RowCall, Rows
from fusedkd.spec import LossSpec, Transform

__all__ = ["COPIES", "SpreadRows"]

INF = float("inf")
# Tensors of a piece's size that are alive at once while it is worked on (formula and autograd).
COPIES = 16


class _Entries(NamedTuple):
    """A sparse teacher's entries among the columns here."""

    log_probs: Tensor  # (n, C), -inf where there is no entry
    inside: Tensor  # (n, C), where there is one
    rows: SparseRows  # all of them


class SpreadRows(CustomRows):
    """The rows of :mod:`fusedkd.kernels` where each rank of ``group`` has columns from ``offset``
    on, of which the first ``live`` count."""

    def __init__(
        self, name: str | None, device: torch.device, group: Any, offset: int, live: int, step: int
    ) -> None:
        super().__init__(name, device)
        self.group, self.offset, self.live, self.step = group, offset, live, step

    def rows(self, call: RowCall) -> Rows:
        # the loop over chunks hands over one b of (B, T, C) at a time
        student, teacher, labels, row_scale, spec, grad, metrics = call
        if not isinstance(teacher, SparseRows):
            teacher = call.teacher_logits[0]
        loss = torch.zeros_like(row_scale)
        found = row_scale.new_zeros(len(row_scale), len(METRICS))
        sparse = isinstance(teacher, SparseRows)
        step = max(1, self.step // 2) if sparse else self.step  # which is in fp64
        for start in range(0, len(row_scale), step):
            rows = slice(start, start + step)
            part = teacher.part(rows) if isinstance(teacher, SparseRows) else teacher[rows]
            y = None if labels is None else labels[rows]
            scale = row_scale[rows].double() if sparse else row_scale[rows]
            piece = _Piece(self, student[0, rows], part, y, scale, spec)
            loss[rows] = piece.loss.to(loss.dtype)
            if metrics:
                found[rows] = piece.metrics().to(found.dtype)
            if grad is not None:  # last: it may lie in the logits' memory
                made = piece.gradient()
                grad[0, rows] = 0
                grad[0, rows, : self.live] = made[:, : self.live].to(grad.dtype)
        return Rows(loss, found if metrics else None)

    def columns(self, x: Tensor, transform: Transform, dtype: torch.dtype) -> Tensor:
        """Those of (n, C) that count here; where there are none, one without probability."""
        if not self.live:
            return x.new_full((len(x), 1), -INF, dtype=dtype)
        logits = x[:, : self.live].to(dtype)
        scaled = logits * transform.scale if transform.scale != 1 else logits
        cap = transform.softcap
        return cap * torch.tanh(scaled / cap) if cap else scaled

    def reduce(self, parts: list[Tensor], op: Any = dist.ReduceOp.SUM) -> list[Tensor]:
        """(n, 1) columns, merged over the ranks in one call."""
        merged = torch.cat(parts, 1)
        dist.all_reduce(merged, op, group=self.group)
        return list(merged.split(1, 1))


class _Piece:
    """Some rows: their loss, and the gradient and metrics that follow from the same statistics.

    All statistics are (n, 1); whatever is (n, C) has this rank's columns. Rows that do not count
    are computed and dropped, so that no rank asks its device which they are.
    """

    def __init__(
        self,
        ranks: SpreadRows,
        student: Tensor,
        teacher: Tensor | SparseRows,
        labels: Tensor | None,
        row_scale: Tensor,
        spec: LossSpec,
    ) -> None:
        self.ranks, self.spec, self.scale = ranks, spec, row_scale[:, None]
        self.s = ranks.columns(student, spec.student_transform, row_scale.dtype)
        self.t, self.entries = None, None
        if isinstance(teacher, SparseRows):
            self.entries = self._entries(teacher)
        else:
            self.t = ranks.columns(teacher, spec.teacher_transform, row_scale.dtype)
        self.labels = labels
        if labels is not None:
            here = labels[:, None] - ranks.offset
            self.owned = (here >= 0) & (here < ranks.live)
            self.label = here.clamp(0, self.s.shape[1] - 1)
        self._statistics()
        self._divergence()
        self._cross_entropy()
        self.loss = self._loss()

    def _entries(self, rows: SparseRows) -> _Entries:
        """What of a sparse teacher lies here. One column more takes in what does not."""
        n, width = self.s.shape
        here = rows.indices.long() - self.ranks.offset
        here = torch.where((here >= 0) & (here < self.ranks.live), here, width)
        nothing = self.s.new_full((n, width + 1), -INF)
        spread = nothing.scatter(1, here, rows.log_probs[:, :-1])[:, :width]
        inside = torch.zeros_like(nothing, dtype=torch.bool).scatter(1, here, True)[:, :width]
        return _Entries(spread, inside, rows)

    @property
    def bucket(self) -> bool:
        return self.entries is not None and self.entries.rows.tail == "bucket"

    def _statistics(self) -> None:
        """Maxima, then sums of exponentials. The student's at its temperature and at 1."""
        s, spec, y = self.s, self.spec, self.labels
        outside = s.masked_fill(self.entries.inside, -INF) if self.entries else None
        other = self.t if outside is None else outside
        assert other is not None
        self.top_s, top = self.ranks.reduce([_maximum(s), _maximum(other)], dist.ReduceOp.MAX)
        self.top_t = top
        shift = top if outside is None else top.masked_fill(top == -INF, 0.0)
        heat = spec.teacher_temperature if outside is None else spec.temperature
        parts = [
            ((s - self.top_s) / spec.temperature).exp(),
            (s - self.top_s).exp(),
            ((other - shift) / heat).exp(),
        ]
        if y is not None:
            parts.append(torch.where(self.owned, s.gather(1, self.label), 0.0))
            # what label smoothing adds up
            parts.append(
                s[:, : self.ranks.live] if spec.label_smoothing else s.new_zeros(len(s), 1)
            )
        sums = self.ranks.reduce([part.sum(1, keepdim=True) for part in parts])
        self.norm_q, self.norm_1, norm, *self.label_sums = sums
        self.lq = (s - self.top_s) / spec.temperature - self.norm_q.log()
        if outside is None:
            self.lp = (other - shift) / heat - norm.log()
        else:
            assert self.entries is not None
            self.lp = self.entries.log_probs
            self.lq_tail = norm.log() + (shift - self.top_s) / spec.temperature - self.norm_q.log()

    def _divergence(self) -> None:
        """D and the sum of d D / d log q, with the tail as one category more."""
        value, self.g = pointwise(self.spec.divergence, self.lp, self.lq)
        if self.entries is not None and self.bucket:
            value = value.where(self.entries.inside, 0.0)
            self.g = self.g.where(self.entries.inside, 0.0)
        parts = [value, self.g, _entropy_terms(self.lp), _entropy_terms(self.lq)]
        sums = self.ranks.reduce([part.sum(1, keepdim=True) for part in parts])
        self.kd, self.g_sum, self.entropy_p, self.entropy_q = sums
        if self.entries is None:
            return
        rows = self.entries.rows
        self.entropy_p = _entropy_terms(rows.log_probs).sum(1, keepdim=True)
        if self.bucket:
            lp = rows.log_probs[:, -1:]
            noise = (self.lq_tail == -INF) & (lp.exp() <= rows.rounding)
            tail, self.g_tail = pointwise(
                self.spec.divergence, lp.masked_fill(noise, -INF), self.lq_tail
            )
            self.kd, self.g_sum = self.kd + tail, self.g_sum + self.g_tail

    def _cross_entropy(self) -> None:
        self.ce = torch.full_like(self.kd, float("nan"))
        if self.labels is not None:
            of_label, everything = self.label_sums
            smoothing = self.spec.label_smoothing
            norm = self.top_s + self.norm_1.log()
            self.ce = norm - (1 - smoothing) * of_label
            if smoothing:
                self.ce = self.ce - smoothing / self.spec.vocab_size * everything

    def _loss(self) -> Tensor:
        loss = torch.zeros_like(self.kd)
        if self.spec.kd_scale:
            loss = loss + self.spec.kd_scale * self.kd
        if self.spec.ce_weight:
            loss = loss + self.spec.ce_weight * self.ce
        return torch.where(self.scale != 0, loss * self.scale, 0.0)[:, 0]

    def gradient(self) -> Tensor:
        """d loss / d raw logits (n, C)."""
        spec, grad = self.spec, torch.zeros_like(self.s)
        if spec.kd_scale:
            gap = self.g - self.lq.exp() * self.g_sum
            if self.entries is not None and self.bucket:
                share = (self.lq - self.lq_tail).exp()
                gap = gap + torch.where(self.entries.inside, 0.0, self.g_tail * share)
            grad = grad + spec.kd_scale / spec.temperature * gap
        if spec.ce_weight:
            smoothing = spec.label_smoothing
            gap = (self.s - self.top_s).exp() / self.norm_1 - smoothing / spec.vocab_size
            hit = self.owned.to(gap) * (smoothing - 1)
            grad = grad + spec.ce_weight * gap.scatter_add(1, self.label, hit)
        grad = self.scale * grad * _slope(self.s, spec.student_transform)
        return torch.where((self.scale == 0) | (self.s == -INF), 0.0, grad)

    def metrics(self) -> Tensor:
        """The rows' (n, 7)."""
        best_s, best_t = self._best()
        unknown = torch.full_like(self.kd, float("nan"))
        right = [unknown, unknown]
        if self.labels is not None:
            right = [(best == self.labels[:, None]).to(self.kd) for best in (best_s, best_t)]
        agree = (best_s == best_t).to(self.kd)
        rows = [self.kd, self.ce, self.entropy_p, self.entropy_q, agree, *right]
        return torch.where(self.scale != 0, torch.cat(rows, 1), 0.0)

    def _best(self) -> list[Tensor]:
        """The most probable id of both sides, the first one where several are."""
        first_s = self._first(self.s, self.top_s)
        if self.t is not None:
            return self.ranks.reduce([first_s, self._first(self.t, self.top_t)], dist.ReduceOp.MIN)
        (best_s,) = self.ranks.reduce([first_s], dist.ReduceOp.MIN)
        assert self.entries is not None
        rows = self.entries.rows
        ids = F.pad(rows.indices.long(), (0, 1), value=-1)  # the tail is no id
        lp = torch.cat([rows.log_probs[:, :-1], torch.full_like(self.kd, -INF)], 1)
        best_t = ids.gather(1, lp.argmax(1, keepdim=True))
        return [best_s, best_t.where(_maximum(lp) > -INF, -1)]

    def _first(self, x: Tensor, top: Tensor) -> Tensor:
        value, index = _maximum(x), x.argmax(1, keepdim=True)
        return torch.where(value == top, index + self.ranks.offset, 2**62)


def pointwise(divergence: Divergence, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """The contributions to D and their derivatives by log q, entry by entry."""
    with torch.inference_mode(False), torch.enable_grad():
        lq = lq.clone().requires_grad_()
        value = divergence.value(lp.clone() if lp.is_inference() else lp, lq)
        (grad,) = torch.autograd.grad(value.sum(), lq)
    return value.detach(), grad


def _maximum(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True)


def _entropy_terms(log_probs: Tensor) -> Tensor:
    return -torch.where(log_probs == -INF, 0.0, log_probs.exp() * log_probs)


def _slope(s: Tensor, transform: Transform) -> Any:
    """d s / d raw, where s is after the transform."""
    return transform.scale * (1 - (s / transform.softcap) ** 2 if transform.softcap else 1.0)
