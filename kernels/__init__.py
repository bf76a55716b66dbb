"""The contract between :mod:`fusedkd.autograd` and the backends: rows in, losses and gradients out.

A backend is a module (or package) here. It knows nothing of heads, chunks, reductions or autograd.
One verb is all that a loss needs, on rows that are whole:

    ``rows(call: RowCall) -> Rows``

**A row.** With p the teacher's softmax at ``spec.teacher_temperature`` and q the student's at
``spec.temperature``, both after the transforms of ``spec`` and over ``spec.vocab_size`` entries,

    loss = row_scale * (kd_scale * D(p, q) + ce_weight * CE + z_loss_weight * lse^2)

A term whose factor is 0 is left out (0 * inf does not arise). CE is torch's, at T = 1, with
``label_smoothing``; lse is the logsumexp of the student's logits, at T = 1, and NaN where there is
none above -inf. Where ``kd_scale`` is not 0 ``spec.row_rule`` is one more factor on D, a
constant made of the row's statistics (:mod:`fusedkd.row_rules`), NaN where D is; metrics are
without it. Rows of ``row_scale`` 0 do not count: nothing of them is read, their loss, metrics and
gradient are 0 even if they hold NaN. The gradient is d loss / d student, rounded once to its own
dtype; 0 in padding columns, in rows that do not count and where the student's logit is -inf. The
edges (-inf, q = 0 < p) are written down in :mod:`fusedkd.divergences`.

**A sparse teacher** has K entries a row, checked, sorted and completed by
:func:`~fusedkd.distributions.sparse.canonical`. With the tail "bucket", D compares K + 1
categories: the ids, and all else, of which q has the sum over the entries that are no ids (without
cancellation, however small) and p the last column; that category's d D / d log q goes to the
entries outside in proportion to their q, and where the student has none above -inf there, a tail
with p <= ``rounding`` counts as 0. With the other tails D compares the whole vocabulary, with p = 0
at entries that are no ids; f is finite there. The teacher's entropy is that of its K or K + 1
numbers p; its top is the first largest of the K, or none, which agrees with nothing, where all are
-inf.

**Arithmetic** is in the type of ``row_scale`` (fp64 if either side's logits are fp64, else fp32) or
wider; gaps to a sparse teacher are formed in fp64. Bitwise repeatable, no host synchronisation on a
GPU, and no compilation for other numbers in ``spec``, but for the few that have kernels of their
own there: temperatures of 1 and 2, and JSD's beta of 1/2.

**A row in pieces**, in columns of a vocabulary or on the ranks of a group, takes four verbs, of
which each piece sees ``call.part``; what is merged is the same for all pieces, and bitwise so:

    ``observe(call) -> Tensor`` (N, len(:class:`Statistics`)) of the columns here
    ``merge([...]) -> Tensor`` the statistics of whole rows, as :func:`fusedkd.kernels.pieces.merge`
    ``compare(call, merged) -> Comparison | None``: the columns' share in D, where that takes the
        rows' normalisers; the pieces' sums are added up in order. None, for all pieces alike, where
        the statistics say all
    ``finish(call, merged, comparison) -> (Rows, again)``: whole rows' loss and metrics, and the
        gradient of the columns here. ``again`` (N,) bool or None: rows that fp32 cannot carry (p
        and q hardly meet) and that were left out; all pieces go through them once more, with
        ``Part.exact``. The same on every piece

``block_rows(call, widest, budget)``: how many rows of so many columns such verbs take at a time.

**Single tokens**, without a teacher, have two verbs of their own: :mod:`fusedkd.kernels.tokens`.

**A call in one operation** a backend may have for contiguous logits, where a small call's many
steps cost more than its rows: ``reduced(spec)``, of a ``spec`` whose vocabulary is all columns,
gives

    ``compute(student, teacher, labels, gradient) -> (loss, grad or None) | None``

with one loss, reduced by "mean" or "sum" over the rows whose label is not ``ignore_index``. None
where one of their labels is out of range (on a GPU that is an assertion: nothing waits for it), or
in place of ``compute``, for what the backend has no such operation.

Beside rows a backend has what a head's chunks are made with:

``scale_(grad, factor, out=None)``: multiply ``grad`` (B, T, C) or any contiguous tensor in place by
``factor`` (a 0-d tensor, or (N,) contiguous, one per row), touching no memory where the factor is
1, without asking the host. With ``out``, contiguous and of the same shape, the product goes there,
rounded to its dtype, and ``grad`` stays as it is.

``mm_(out, a, b, accumulate=False)``: ``out = a @ b (+ out)`` for 2-D tensors of any strides, summed
in fp32 at least; ``out``'s dtype is not narrower than that of ``a`` and ``b``.

``empty(shape, *, dtype, device) -> Tensor``: as ``torch.empty``; for gradients and chunks, which
are large.

``head_dtypes(dtype) -> (logits, gradient)``: for operands of ``dtype``, the dtypes in which a
head's chunk of logits and its gradient are held. Logits wider than ``dtype`` keep the divergence
from being computed on rounded numbers.

``unavailable() -> str | None``: why this backend cannot run here, or None when it can.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedkd.distributions.sparse import SparseRows
from fusedkd.spec import METRIC_COLUMNS as METRICS
from fusedkd.spec import LossSpec

__all__ = ["METRICS", "Comparison", "Part", "RowCall", "Rows", "Statistics"]


class Part(NamedTuple):
    """Which columns of a longer row lie here."""

    offset: int  # the vocabulary's id of the first of them
    columns: int  # how many, perhaps none; those behind them are padding
    exact: bool = False  # in fp64 throughout: the rows of ``again``


class RowCall(NamedTuple):
    """N = B T rows; row n = b T + t. A tuple, for small calls feel what a dataclass costs."""

    # (B, T, C) raw logits, before the transforms, each side fp64, fp32, bf16 or fp16 on its own;
    # last stride 1, the others arbitrary (0 for expanded). Columns from spec.vocab_size on: padding
    student: Tensor
    teacher: Tensor | SparseRows | None  # (B, T, C'), as the student's; None: kd_scale is 0
    # (N,) int64 contiguous, in range wherever row_scale is not 0; None: ce_weight is 0
    labels: Tensor | None
    row_scale: Tensor  # (N,) contiguous: weight of the token over the normaliser
    spec: LossSpec
    grad: Tensor | None  # (B, T, C), last stride 1, perhaps the student; None: no gradient wanted
    metrics: bool  # whether to compute them
    part: Part | None = None  # None: whole rows, for ``rows``

    def of(self, rows: slice | Tensor, part: Part) -> RowCall:
        """Some rows, in pieces, of a call with B = 1; those of chosen indices are a copy."""
        if isinstance(self.teacher, SparseRows):
            teacher: Tensor | SparseRows = self.teacher.part(rows)
        else:
            teacher = self.teacher_logits[:, rows]
        return self._replace(
            student=self.student[:, rows],
            teacher=teacher,
            labels=None if self.labels is None else self.labels[rows],
            row_scale=self.row_scale[rows],
            grad=None if self.grad is None else self.grad[:, rows],
            part=part,
        )

    @property
    def teacher_logits(self) -> Tensor:
        """A dense teacher's. Without one the student's: a term of weight 0 may read anything."""
        assert not isinstance(self.teacher, SparseRows)
        return self.student if self.teacher is None else self.teacher

    def results(self) -> Rows:
        """Memory for them, to be written to."""
        shape = (self.row_scale.numel(), len(METRICS))
        metrics = self.row_scale.new_empty(shape) if self.metrics else None
        return Rows(self.row_scale.new_empty(shape[:1]), metrics)


class Rows(NamedTuple):
    """What a backend returns, in the type of ``row_scale``."""

    loss: Tensor  # (N,)
    # (N, len(METRICS)): raw divergence, raw CE, entropies of p and q in nats, arg-max agreement and
    # accuracies as 0 or 1 (the first index wins a tie). CE and accuracies are NaN without labels
    metrics: Tensor | None

    def put(self, rows: slice | Tensor, results: Rows) -> None:
        """Write what came of some of the rows."""
        self.loss[rows] = results.loss
        if self.metrics is not None and results.metrics is not None:
            self.metrics[rows] = results.metrics


class Statistics(NamedTuple):
    """What is kept of the columns that lie here, and then of whole rows: a monoid.

    Each is (N,) fp64; together, in this order, they are the columns of ``observe``'s result. Sums
    of exponentials, and all that is weighted by them, are in units of ``2 ** exponent``, and -inf
    is the exponent of a sum of nothing. What a backend has no use for is 0.
    """

    student_max: Tensor  # largest logit after the transform
    student_exponent: Tensor
    student_sum: Tensor  # of exp(s / T)
    unit_exponent: Tensor
    unit_sum: Tensor  # of exp(s)
    teacher_max: Tensor
    teacher_exponent: Tensor
    teacher_sum: Tensor  # of exp(t / T_teacher), of a dense teacher
    outside_max: Tensor
    outside_exponent: Tensor
    outside_sum: Tensor  # of exp(s / T) where a sparse teacher has no id
    inside_exponent: Tensor
    inside_sum: Tensor  # and where it has one
    forward: Tensor  # sums of gaps t - s, weighted by either side's exponentials, over the columns
    reverse: Tensor  # where the gap is finite; in whatever units the backend likes
    teacher_absent: Tensor  # sum of the teacher's exponentials where the student has -inf
    student_absent: Tensor  # and the other way round
    only_teacher: Tensor  # the largest of the teacher's logits there
    only_student: Tensor
    student_expected: Tensor  # mean logit under the softmax, for the entropy
    teacher_expected: Tensor
    mean: Tensor  # sum of s over the vocabulary's size, for label smoothing
    label: Tensor  # s at the label, 0 where that lies elsewhere
    student_top: Tensor  # the id of the largest logit, the first one of several
    teacher_top: Tensor
    teacher_at_top: Tensor  # t at student_top
    student_min: Tensor  # smallest logits, or a bound below them
    teacher_min: Tensor


class Comparison(NamedTuple):
    """What a divergence says of the columns here, or of whole rows."""

    sums: Tensor  # (N, 2) fp64: D, and the sum of d D / d log q; without a sparse teacher's tail
    kept: Tensor | None  # what ``finish`` of the same backend wants to find again
