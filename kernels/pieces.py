"""A row in pieces: the merge, and the reference's verbs: plain torch in fp64, for any device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd.distributions.sparse import SparseRows
from fusedkd.divergences import Divergence, measure_term
from fusedkd.kernels import METRICS, Comparison, RowCall, Rows, Statistics
from fusedkd.spec import LossSpec, Transform

INF = float("inf")
# Tensors of a block's size that are alive at once while it is worked on (formula and autograd).
COPIES = 16


def merge(pieces: Sequence[Tensor]) -> Tensor:
    """The statistics (N, len(Statistics)) of whole rows, from those of their pieces in order."""
    each = torch.stack([piece.T for piece in pieces], 1)  # (columns, pieces, N)
    of = Tables.on(each.device)
    exponents = each[of.exponents]
    largest = exponents.amax(1, keepdim=True)
    factors = torch.exp2(exponents - largest.masked_fill(largest == -INF, 0.0))  # -inf: of nothing
    each_scaled = each * F.pad(factors, (0, 0, 0, 0, 0, 1), value=1.0)[of.unit]
    merged = each_scaled.sum(1)
    merged[of.maxima] = each[of.maxima].amax(1)
    merged[of.minima] = each[of.minima].amin(1)
    merged[of.expected] = (each[of.expected] * each_scaled[of.sums]).sum(1) / merged[of.sums]
    tops = each[of.top_of].max(1, keepdim=True).indices  # argmax takes 16 times as long
    merged[of.tops] = each[of.tops].gather(1, tops)[:, 0]
    return merged.T.contiguous()


class Tables(NamedTuple):
    """Which columns are merged how: all that is in none of these is added up."""

    exponents: Tensor
    unit: Tensor  # of every column: which exponent its unit has, or none
    maxima: Tensor
    minima: Tensor
    expected: Tensor  # means, weighted by sums
    sums: Tensor
    tops: Tensor  # what belongs to the piece with the largest of top_of, the first of several
    top_of: Tensor

    @staticmethod
    @functools.cache
    def on(device: torch.device) -> Tables:
        sums = ("student", "unit", "teacher", "outside", "inside")
        exponents = tuple(f"{x}_exponent" for x in sums)
        units = dict.fromkeys(Statistics._fields, len(exponents))
        units |= {x.replace("exponent", "sum"): i for i, x in enumerate(exponents)}
        units |= {"reverse": 0, "student_absent": 0, "forward": 2, "teacher_absent": 2}
        sides = ("student_max", "teacher_max", "outside_max", "only_teacher", "only_student")
        names = (
            exponents,
            (*exponents, *sides),
            ("student_min", "teacher_min"),
            ("student_expected", "teacher_expected"),
            ("student_sum", "teacher_sum"),
            ("student_top", "teacher_top", "teacher_at_top"),
            ("student_max", "teacher_max", "student_max"),
        )
        found = [torch.tensor([Statistics._fields.index(x) for x in of]) for of in names]
        found.insert(1, torch.tensor([units[name] for name in Statistics._fields]))
        return Tables(*(x.to(device) for x in found))


def block_rows(call: RowCall, widest: int, budget: int) -> int:
    """How many rows of ``widest`` columns are worked on at a time, within ``budget`` bytes."""
    return max(1, budget // (widest * 8 * COPIES))


# ---------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """The columns that lie here, in fp64 and after the transforms; one of -inf if none do."""

    s: Tensor  # (N, C)
    t: Tensor | None  # (N, C) of a dense teacher
    inside: Tensor | None  # (N, C) where a sparse one has an id
    log_p: Tensor | None  # (N, C) its log-probabilities, -inf elsewhere


def _piece(call: RowCall) -> _Piece:
    assert call.part is not None
    teacher, spec = call.teacher, call.spec
    s = _columns(call, call.student, spec.student_transform)
    if not isinstance(teacher, SparseRows):
        t = _columns(call, call.teacher_logits, spec.teacher_transform)
        return _Piece(s, t, None, None)
    here = teacher.indices.long() - call.part.offset
    here = torch.where((here >= 0) & (here < call.part.columns), here, s.shape[1])
    nothing = s.new_full((len(s), s.shape[1] + 1), -INF)  # one column more takes in the others
    log_p = nothing.scatter(1, here, teacher.log_probs[:, :-1])[:, :-1]
    inside = torch.zeros_like(nothing, dtype=torch.bool).scatter(1, here, True)[:, :-1]
    return _Piece(s, None, inside, log_p)


def _columns(call: RowCall, x: Tensor, how: Transform) -> Tensor:
    assert call.part is not None
    rows = x.detach().reshape(-1, x.shape[-1])[:, : call.part.columns].double()
    return transform(rows, how) if call.part.columns else rows.new_full((len(rows), 1), -INF)


def transform(logits: Tensor, how: Transform) -> Tensor:
    """After scale and softcap."""
    scaled = logits * how.scale if how.scale != 1 else logits
    return how.softcap * torch.tanh(scaled / how.softcap) if how.softcap else scaled


def observe(call: RowCall) -> Tensor:
    """What is kept of the columns here, (N, len(Statistics)). Sums of gaps are left 0: here every
    divergence is compared."""
    assert call.part is not None
    spec, piece = call.spec, _piece(call)
    s, nothing = piece.s, call.row_scale.new_zeros(len(piece.s), dtype=torch.float64)
    named = dict.fromkeys(Statistics._fields, nothing)
    named |= _softmax("student", s, spec.temperature)
    named |= {x: y for x, y in _softmax("unit", s, 1.0).items() if x in named}
    named["student_top"] = s.argmax(1) + call.part.offset
    if piece.t is not None:
        named |= _softmax("teacher", piece.t, spec.teacher_temperature)
        named["teacher_top"] = piece.t.argmax(1) + call.part.offset
    if piece.inside is not None:
        for side, others in (("outside", piece.inside), ("inside", ~piece.inside)):
            found = _softmax(side, s.masked_fill(others, -INF), spec.temperature)
            named |= {x: y for x, y in found.items() if x in named}
    if call.labels is not None:
        owned, label = _label(call, s)
        named["label"] = torch.where(owned, s.gather(1, label), 0.0)[:, 0]
        if spec.label_smoothing and call.part.columns:
            named["mean"] = s.sum(1, dtype=torch.float64) / spec.vocab_size
    return torch.stack([named[x].to(nothing) for x in Statistics._fields], -1)


def _softmax(side: str, x: Tensor, temperature: float) -> dict[str, Tensor]:
    """The statistics of one side's exponentials, by name."""
    most = x.amax(1, keepdim=True)
    shifted = x - most.masked_fill(most == -INF, 0.0)
    e = (shifted / temperature).exp()
    total = e.sum(1)
    mean = torch.where(e == 0, 0.0, e * shifted).sum(1) / total.masked_fill(total == 0, 1.0)
    top = most[:, 0].double()
    return {
        f"{side}_max": top,
        f"{side}_exponent": top / (temperature * math.log(2)),
        f"{side}_sum": total,
        f"{side}_expected": torch.where(total == 0, 0.0, mean + top),
    }


def _label(call: RowCall, s: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1): whether a row's label lies here, and its column, or any."""
    assert call.part is not None and call.labels is not None
    label = call.labels[:, None] - call.part.offset
    owned = (label >= 0) & (label < call.part.columns)
    return owned, label.clamp(0, s.shape[1] - 1)


class _Normalised(NamedTuple):
    log_p: Tensor  # (N, C)
    log_q: Tensor
    log_q_tail: Tensor  # (N, 1), of all that is no id
    log_q_ids: Tensor  # (N, 1), of all that is one

    def compared(self, tail: str | None) -> Tensor:
        """(N, C) log q as the divergence takes it."""
        return self.log_q - self.log_q_ids if tail == "conditional" else self.log_q


def _normalised(call: RowCall, piece: _Piece, of: Statistics) -> _Normalised:
    spec = call.spec
    log_q = _log_softmax(
        piece.s, of.student_max, of.student_exponent, of.student_sum, spec.temperature
    )
    log_p = piece.log_p
    if piece.t is not None:
        statistics = of.teacher_max, of.teacher_exponent, of.teacher_sum
        log_p = _log_softmax(piece.t, *statistics, spec.teacher_temperature)
    assert log_p is not None
    total = of.student_exponent * math.log(2) + of.student_sum.log()
    tail, ids = (
        torch.where(found == 0, -INF, exponent * math.log(2) + found.log() - total)[:, None]
        for exponent, found in (
            (of.outside_exponent, of.outside_sum),
            (of.inside_exponent, of.inside_sum),
        )
    )
    return _Normalised(log_p, log_q, tail, ids)


def _tail(call: RowCall) -> str | None:
    return call.teacher.tail if isinstance(call.teacher, SparseRows) else None


def _log_softmax(
    x: Tensor, top: Tensor, exponent: Tensor, total: Tensor, temperature: float
) -> Tensor:
    gap = exponent * math.log(2) + total.log() - top / temperature
    return (x - top[:, None]) / temperature - gap[:, None]


def compare(call: RowCall, statistics: Tensor) -> Comparison | None:
    """The sums over the columns here of D and of d D / d log q, which is kept; not the tail's."""
    if not call.spec.kd_scale and not call.metrics:
        return None
    piece = _piece(call)
    known = _normalised(call, piece, Statistics(*statistics.unbind(-1)))
    tail, divergence = _tail(call), call.spec.divergence
    log_q = known.compared(tail)
    value, slope = _pointwise(divergence, known.log_p, log_q)
    if tail == "generalized":
        q = measure_term(divergence) * log_q.exp()
        value, slope = value + q - measure_term(divergence) * known.log_p.exp(), slope + q
    if piece.inside is not None and tail in ("bucket", "generalized", "conditional"):
        value, slope = (x.where(piece.inside, 0.0) for x in (value, slope))
    sums = torch.stack([x.sum(1, dtype=torch.float64) for x in (value, slope)], -1)
    return Comparison(sums, slope)


def _pointwise(divergence: Divergence, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """The contributions to D and their derivatives by log q, entry by entry."""
    with torch.inference_mode(False), torch.enable_grad():
        lq = lq.clone().requires_grad_()
        value = divergence.value(lp.clone() if lp.is_inference() else lp, lq)
        (grad,) = torch.autograd.grad(value.sum(), lq)
    return value.detach(), grad


def finish(call: RowCall, statistics: Tensor, comparison: Comparison | None) -> tuple[Rows, None]:
    """Loss and metrics of the rows, the gradient of the columns here."""
    of, piece = Statistics(*statistics.unbind(-1)), _piece(call)
    known = _normalised(call, piece, of)
    spec, teacher, results = call.spec, call.teacher, call.results()
    kd = slope_sum = torch.zeros_like(of.label)
    if comparison is not None:
        kd, slope_sum = comparison.sums.unbind(-1)
    tail_slope = None
    if isinstance(teacher, SparseRows) and teacher.tail == "bucket" and comparison is not None:
        value, tail_slope = _pointwise(
            spec.divergence, _log_p_tail(teacher, known), known.log_q_tail
        )
        kd, slope_sum = kd + value[:, 0], slope_sum + tail_slope[:, 0]
    if _tail(call) == "generalized":
        kd = kd.clamp(min=0)  # rounding
    ce, kd_scale = _cross_entropy(call, of), _kd_scale(call, of, known, kd)
    loss = torch.zeros_like(kd)
    if spec.kd_scale:
        loss = loss + torch.where(kd_scale == 0, 0.0, kd_scale * kd)
    if spec.ce_weight:
        loss = loss + spec.ce_weight * ce
    if spec.z_loss_weight:
        loss = loss + spec.z_loss_weight * _log_unit(of) ** 2
    counts = call.row_scale != 0
    results.loss.copy_(torch.where(counts, loss * call.row_scale, 0.0))
    if results.metrics is not None:
        columns = _metrics(call, of, known, kd, ce)
        results.metrics.copy_(torch.where(counts[:, None], columns, 0.0))
    if call.grad is not None:
        slopes = None
        if spec.kd_scale and comparison is not None and comparison.kept is not None:
            q = known.compared(_tail(call)).exp()
            slopes = comparison.kept - q * slope_sum[:, None]
            slopes = _outside(slopes, _tail(call), piece, known, tail_slope)
        _write_gradient(call, piece, of, slopes, kd_scale)
    return results, None


def _kd_scale(call: RowCall, of: Statistics, known: _Normalised, kd: Tensor) -> Tensor:
    """(N,) with the row rule's factor."""
    spec, scale = call.spec, torch.full_like(kd, call.spec.kd_scale)
    if spec.row_rule is None or not spec.kd_scale:
        return scale
    p, q = _teacher(call, of, known), _student(spec, of)
    found = {
        "divergence": kd,
        "teacher_entropy": p.entropy,
        "student_entropy": q.entropy,
        "label_log_prob": of.label / spec.temperature - q.log_sum,
        "teacher_top1": p.top1,
        "student_top1": q.top1,
    }
    return scale * spec.row_rule.factor(found)


def _log_p_tail(teacher: SparseRows, known: _Normalised) -> Tensor:
    """(N, 1), where a mass that is rounding counts as none if the student has none."""
    lp = teacher.log_probs[:, -1:]
    noise = (known.log_q_tail == -INF) & (lp.exp() <= teacher.rounding)
    return lp.masked_fill(noise, -INF)


def _log_unit(of: Statistics) -> Tensor:
    """(N,) logsumexp at T = 1."""
    return of.unit_exponent * math.log(2) + of.unit_sum.log()


def _cross_entropy(call: RowCall, of: Statistics) -> Tensor:
    if call.labels is None:
        return torch.full_like(of.label, math.nan)
    smoothing = call.spec.label_smoothing
    ce = _log_unit(of) - (1 - smoothing) * of.label
    return ce - smoothing * of.mean if smoothing else ce  # the mean of a masked row is -inf


def _outside(
    slopes: Tensor, tail: str | None, piece: _Piece, known: _Normalised, tail_slope: Tensor | None
) -> Tensor:
    """(N, C) d D / d (s / T), from grad_v - q_v * sum_u grad_u: the bucket's slope goes to all that
    is no id, and with "conditional" that has none."""
    if tail == "conditional":
        assert piece.inside is not None
        return slopes.where(piece.inside, 0.0)
    if tail_slope is None:
        return slopes
    assert piece.inside is not None
    share = tail_slope * (known.log_q - known.log_q_tail).exp()
    return slopes + torch.where(piece.inside, 0.0, share)


def _write_gradient(
    call: RowCall, piece: _Piece, of: Statistics, slopes: Tensor | None, kd_scale: Tensor
) -> None:
    assert call.grad is not None and call.part is not None
    spec, s = call.spec, piece.s
    grad = torch.zeros_like(s)
    if slopes is not None:
        grad = (kd_scale / spec.temperature)[:, None] * slopes
    if spec.ce_weight or spec.z_loss_weight:
        q = _log_softmax(s, of.student_max, of.unit_exponent, of.unit_sum, 1.0).exp()
        of_z = 2 * spec.z_loss_weight * _log_unit(of) if spec.z_loss_weight else 0 * of.label
        grad = grad + (spec.ce_weight + of_z)[:, None] * q
    if spec.ce_weight:
        owned, label = _label(call, s)
        gap = torch.full_like(s, -spec.label_smoothing / spec.vocab_size)
        gap = gap.scatter_add(1, label, owned.to(gap) * (spec.label_smoothing - 1))
        grad = grad + spec.ce_weight * gap
    by_raw: Tensor | float = spec.student_transform.scale
    if cap := spec.student_transform.softcap:
        by_raw = by_raw * (1 - (s / cap) ** 2)
    scale = call.row_scale[:, None].to(s.dtype)
    grad = torch.where((scale == 0) | (s == -INF), 0.0, scale * grad * by_raw)
    columns = call.part.columns
    call.grad.zero_()
    call.grad[..., :columns] = grad[:, :columns].view(*call.grad.shape[:2], columns)


def _metrics(call: RowCall, of: Statistics, known: _Normalised, kd: Tensor, ce: Tensor) -> Tensor:
    p, q = _teacher(call, of, known), _student(call.spec, of)
    mass = known.log_q_ids[:, 0].exp() if isinstance(call.teacher, SparseRows) else None
    tops = of.student_top, p.top
    return metric_rows(kd, ce, (p.entropy, q.entropy), tops, mass, call.labels)


class _Known(NamedTuple):
    """Of one side, (N,)."""

    entropy: Tensor
    log_sum: Tensor  # of its exponentials
    top: Tensor  # the most probable id, and its probability
    top1: Tensor


def _student(spec: LossSpec, of: Statistics) -> _Known:
    log_sum, heat = of.student_exponent * math.log(2) + of.student_sum.log(), spec.temperature
    entropy, top1 = log_sum - of.student_expected / heat, (of.student_max / heat - log_sum).exp()
    return _Known(entropy, log_sum, of.student_top, top1)


def _teacher(call: RowCall, of: Statistics, known: _Normalised) -> _Known:
    teacher, heat = call.teacher, call.spec.teacher_temperature
    if not isinstance(teacher, SparseRows):
        log_sum = of.teacher_exponent * math.log(2) + of.teacher_sum.log()
        top1 = (of.teacher_max / heat - log_sum).exp()
        return _Known(log_sum - of.teacher_expected / heat, log_sum, of.teacher_top, top1)
    tail = _log_p_tail(teacher, known) if teacher.tail == "bucket" else teacher.log_probs[:, -1:]
    log_p = torch.cat([teacher.log_probs[:, :-1], tail], -1)
    entropy = -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(1)
    ids = F.pad(teacher.indices, (1, 0), value=-1)  # none, where all have no probability
    most, first = F.pad(teacher.log_probs[:, :-1], (1, 0), value=-INF).max(1, keepdim=True)
    top = ids.gather(1, first)[:, 0].double()
    return _Known(entropy, torch.zeros_like(entropy), top, most[:, 0].exp())


def metric_rows(
    kd: Tensor,
    ce: Tensor,
    entropies: tuple[Tensor, Tensor],  # the teacher's and the student's
    tops: tuple[Tensor, Tensor],  # the student's and the teacher's most probable ids
    student_mass: Tensor | None,  # q's on a sparse teacher's ids
    labels: Tensor | None,
) -> Tensor:
    """(N, len(METRICS)) of columns (N,)."""
    unknown = torch.full_like(kd, math.nan)
    student_right, teacher_right = (
        unknown if labels is None else (top == labels).to(kd.dtype) for top in tops
    )
    named = {
        "kd": kd,
        "ce": ce,
        "teacher_entropy": entropies[0],
        "student_entropy": entropies[1],
        "top1_agreement": (tops[0] == tops[1]).to(kd.dtype),
        "student_accuracy": student_right,
        "teacher_accuracy": teacher_right,
        "student_mass": unknown if student_mass is None else student_mass,
    }
    return torch.stack([named[name] for name in METRICS], dim=-1)
