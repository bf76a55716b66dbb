"""The backends, and the contract between them and :mod:`fusedkd.autograd`.

A backend is a sub-package or module here with seven functions. It knows nothing of chunks,
reductions or autograd; it turns rows of logits into rows of loss and gradient.

``rows(student, teacher, labels, row_scale, spec, grad, metrics) -> (loss, metric_rows)``

* ``student`` (B, T, C), ``teacher`` (B, T, C'): raw logits (before ``spec.student_transform`` and
  ``spec.teacher_transform``), each fp64, fp32, bf16 or fp16 on its own, last stride 1, the other
  strides arbitrary (0 for expanded, anything for sliced). Row n = b T + t. Only the first
  ``spec.vocab_size`` columns count.
* ``labels`` (N,) int64 contiguous with N = B T, or None: then there is no cross-entropy and
  ``spec.ce_weight`` is 0. In range wherever ``row_scale`` is not 0; anything elsewhere.
* ``row_scale`` (N,) contiguous, in the accumulation type (fp64 if either side's logits are fp64,
  else fp32): weight of the token over the normaliser. Exactly 0 marks a row that does not count:
  nothing of it is read, its loss, metrics and gradient are 0 even if it holds NaN.
* ``spec``: a :class:`fusedkd.spec.LossSpec`. Per row, with p the teacher's softmax at
  ``teacher_temperature`` and q the student's at ``temperature``, both after the transforms: ``loss
  = row_scale * (kd_scale * D(p, q) + ce_weight * CE)``, where a term whose factor is 0 is left out
  (0 * inf does not arise) and CE is torch's, at T = 1, with ``label_smoothing`` over ``vocab_size``
  entries.
* ``grad`` (B, T, C) or None (no gradient wanted, and none is computed): receives d loss / d
  student, rounded once to its own dtype; 0 in padding columns, dropped rows and where the student's
  logit is -inf. Last stride 1. May be the student tensor itself.
* ``metrics``: whether to compute ``metric_rows`` (N, 7), columns ``fusedkd.spec.METRIC_COLUMNS``:
  raw divergence, raw CE, entropies of p and q in nats, arg-max agreement and accuracies as 0 / 1
  (first index wins a tie). CE and the accuracies are NaN without labels. 0 in dropped rows. None
  when not asked for.
* Returns ``loss`` (N,) in the accumulation type. Arithmetic is in the accumulation type throughout.
  Bitwise repeatable, no host synchronisation, no recompilation for other numbers in ``spec``.

``sparse_rows(student, teacher, labels, row_scale, spec, grad, metrics) -> (loss, metric_rows)``

The same for a teacher of K entries per row. ``teacher`` is a
:class:`fusedkd.distributions.sparse.SparseRows` that has been checked, sorted and completed:

* ``indices`` (N, K) int32 ids below ``spec.vocab_size``, ascending and distinct in a row, behind
  them ``fusedkd.distributions.sparse.PADDING``; contiguous, K may be 0.
* ``log_probs`` (N, K + 1) log p in fp64, -inf at padding. The last column is the tail's, -inf
  unless ``tail`` is "bucket". Gaps are formed in fp64.
* With ``tail`` "bucket", D compares K + 1 categories: the ids, and all else, of which q has
  the sum over the entries that are no ids (without cancellation, however small) and p the last
  column. That category's d D / d log q goes to the entries outside in proportion to their q. Where
  the student has no entry above -inf outside the ids, a tail with p <= ``rounding`` counts as 0.
* Otherwise D compares the whole vocabulary, with p = 0 at entries that are no ids; f is finite
  there.
* Metrics: the teacher's entropy is that of its K or K + 1 numbers p; its top is the first largest
  of the K; none, which agrees with nothing, where all are -inf.

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

Numerical semantics at the edges are written down in :mod:`fusedkd.divergences`.
"""
