"""A teacher of K entries a token: what its entries mean, settled once for all backends."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd import divergences
from fusedkd.checks import check_device, check_logits, check_tensor
from fusedkd.distributions.side import Side
from fusedkd.divergences import Divergence
from fusedkd.spec import LossSpec

TAILS = ("bucket", "renormalize", "drop", "generalized", "conditional")
PADDING = 2**31 - 1  # sorts behind every id
INF = float("inf")
# How far above 1 probabilities may sum, besides the rounding of log_probs: what softmaxes in half
# precision leave.
EXCESS = 1e-3


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """A teacher of which only K entries per token are known: its top k, or a sample.

    With q the student's softmax over the whole vocabulary at ``temperature`` and I the token's ids,
    every divergence sum f(log p, log q) of :mod:`fusedkd.divergences` compares, by ``tail``:

    * ``"bucket"``: K + 1 categories, the ids and everything else, with p_* = 1 - sum_I p and q_* =
      sum of q outside I. The last one's derivative reaches the entries outside in proportion to
      their q: d D / d s_v = (g_* q_v / q_* - q_v G) / T there, and (g_v - q_v G) / T for an id,
      where g = d f / d log q and G is the sum of all K + 1. The right choice where p_* is not
      negligible (Sparse Logit Sampling, Anshumann et al. 2025, arXiv 2503.16870, shows what goes
      wrong without).
    * ``"renormalize"``: the K entries scaled to sum to 1; everything else has p = 0.
    * ``"drop"``: the entries as they are, also where they sum to less than 1; everything else has p
      = 0. Forward KL is then sum_I p log(p / q), with gradient (q sum_I p - p) / T.
    * ``"generalized"``: two measures on I, which sum to what they do: sum_I f + c (q - p), with the
      c that makes it 0 at q = p and positive elsewhere: forward KL sum_I p log(p / q) - p + q
      (Minka 2005, MSR-TR-2005-173, sec. 2), reverse KL sum_I q log(q
      / p) - q + p, skewed ones likewise; c is 0 for all others. What lies outside I counts only
      through q's normaliser. For supports that are not the teacher's top k, such as the student's.
    * ``"conditional"``: both sides given that the token is in I: two softmaxes over K entries.
      Nothing tells the student how much I has together, and no gradient reaches what is outside.

    ``"renormalize"`` and ``"drop"`` leave p = 0 < q outside I, so a divergence that is infinite
    there (reverse KL and whatever contains it) raises ValueError. With the others none is refused;
    one that is infinite at p = 0 < q is so where an id has log-probability -inf, or where p_* is 0:
    if the entries sum to 1 up to rounding, p_* is taken to be what fp32 may have lost of it (sum_I
    p abs(log p) / 2^24), which is 0 for a one-hot teacher only.

    Where the student has nothing outside the ids (they cover the vocabulary, or the rest is
    masked), a p_* within the rounding of ``log_probs`` counts as 0: with K = V the result is that
    of the dense teacher.

    Args:
        indices: (..., K) int64 or int32 vocabulary ids in any order, none twice in a token; -1 is
            padding, so tokens may have different numbers of entries (0 is fine, except with
            ``"renormalize"`` and ``"conditional"``, and has no divergence with ``"generalized"``).
        log_probs: (..., K) fp64, fp32, bf16 or fp16 natural-log probabilities, made at
            ``teacher_temperature``: nothing here can change their temperature. Constants; ignored
            at padding. Their rounding is the teacher's rounding, so prefer fp32.
        tail: "bucket", "renormalize", "drop", "generalized" or "conditional".
        entropy: (...,) nats, of the whole teacher at ``teacher_temperature``, for the metric; None:
            unknown.

    Metrics: ``student_mass`` and ``teacher_mass`` are what q and the entries have on I, before
    either is scaled; ``teacher_entropy`` is ``entropy`` where it is given, else that of the K or K
    + 1 categories, not of the teacher that was cut; ``student_entropy`` that of q over the whole
    vocabulary; the teacher's top-1 is its most probable id (smallest id at a tie), even where the
    tail holds more.
    """

    indices: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    entropy: Tensor | None = None


def sparse_side(teacher: SparseTeacher) -> Side:
    """The teacher's side, checked as far as shapes and types go."""
    indices, log_probs = teacher.indices, teacher.log_probs
    check_tensor("teacher.indices", indices)
    check_logits("teacher.log_probs", log_probs)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"teacher.indices is {indices.dtype}: expected torch.int64 or torch.int32 vocabulary "
            "ids; use indices.long()."
        )
    if indices.dim() < 1 or indices.shape != log_probs.shape:
        raise ValueError(
            f"teacher.indices has shape {tuple(indices.shape)}, teacher.log_probs "
            f"{tuple(log_probs.shape)}: expected (..., K) for both, with index -1 as padding."
        )
    check_device("teacher.indices", indices, "teacher.log_probs", log_probs)
    if not isinstance(teacher.tail, str) or teacher.tail not in TAILS:
        raise ValueError(
            f"teacher.tail={teacher.tail!r}: expected one of {', '.join(map(repr, TAILS))}."
        )
    if teacher.entropy is not None:
        _check_entropy(teacher.entropy, log_probs)
    tail, entropy = teacher.tail, teacher.entropy
    return Side("teacher", log_probs, None, indices=indices, tail=tail, entropy=entropy)


def _check_entropy(entropy: Tensor, log_probs: Tensor) -> None:
    check_logits("teacher.entropy", entropy)
    check_device("teacher.entropy", entropy, "teacher.log_probs", log_probs)
    if entropy.shape != log_probs.shape[:-1]:
        raise ValueError(
            f"teacher.entropy has shape {tuple(entropy.shape)}: expected "
            f"{tuple(log_probs.shape[:-1])}, one number per token."
        )


class SparseRows(NamedTuple):
    """The teacher's side of N rows as backends read it, see :mod:`fusedkd.kernels`."""

    indices: Tensor  # (N, K) int32, ascending; PADDING behind all others
    log_probs: Tensor  # (N, K + 1) fp64; the last one is the tail's
    rounding: float  # a tail below this counts as 0 where the student has none
    tail: str  # one of TAILS; beside "bucket" nothing is left but the ids

    def part(self, rows: slice | Tensor) -> SparseRows:
        return self._replace(indices=self.indices[rows], log_probs=self.log_probs[rows])


def canonical(
    indices: Tensor, log_probs: Tensor, row_scale: Tensor, spec: LossSpec, tail: str
) -> SparseRows:
    """Sort, check and complete a :class:`fusedkd.SparseTeacher`'s entries (see its docstring).

    Args:
        indices, log_probs: (..., K), the token dimensions together N.
        row_scale: (N,) in the accumulation type; rows where it is 0 are not looked at.

    Raises:
        ValueError: ids outside the vocabulary or twice in a token, probabilities that sum to more
            than 1, nothing to renormalise, a divergence that is infinite for this ``tail``. On a
            GPU all but the last are one device-side assertion: no synchronisation.
    """
    _check_tail(spec.divergence, tail)
    shape = (row_scale.numel(), indices.shape[-1])
    # On a GPU this is host time of some 5 us an operation, whatever the size: hence few of them.
    raw = indices.reshape(shape).masked_fill((row_scale == 0)[:, None], -1)
    near = raw.clamp(-1, spec.vocab_size - 1)
    outside = near != raw
    ids, order = _ascending(near.masked_fill(near < 0, PADDING))
    absent = ids == PADDING
    # In fp64: where the student is close, rounding the tail's logarithm would be most of the loss.
    lp = log_probs.detach().reshape(shape).double().gather(-1, order).masked_fill_(absent, -INF)
    twice = (ids[:, 1:] == ids[:, :-1]) > absent[:, 1:]  # and not absent

    p = lp.exp()
    total, spread = p.sum(-1), torch.linalg.vecdot(p, lp.clamp(min=-1e3)).abs()  # 0 log 0 is 0
    excess = total.sub(spread, alpha=torch.finfo(log_probs.dtype).eps) > 1 + EXCESS
    scaled = tail in ("renormalize", "conditional")
    empty = (total == 0) & (row_scale != 0) if scaled else None
    _check(outside, twice, excess, empty, raw, ids, total, spec, tail)

    if tail == "bucket":
        lost = spread * (torch.finfo(row_scale.dtype).eps / 2)
        last = torch.where(total < 1, 1 - total, lost).log()
    else:
        last = torch.full_like(total, -INF)
    if scaled:
        lp = torch.where(lp == -INF, lp, lp - total.log()[:, None])
    # The sum's rounding is at most eps / 2 * spread, and spread <= log V < 16.
    rounding = 8 * torch.finfo(log_probs.dtype).eps
    return SparseRows(ids, torch.cat([lp, last[:, None]], -1), rounding, tail)


def _ascending(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) ids in order, as int32, and where they were."""
    if ids.device.type != "cpu":
        return ids.to(torch.int32).sort(-1)
    # NumPy's sort is vectorised: 0.1 ms where torch's takes 0.8 (512 x 64, Zen 3, November 2026).
    keys = (ids.long() << 32 | torch.arange(ids.shape[1], device=ids.device)).numpy()
    keys.sort(-1)
    ordered = torch.from_numpy(keys)
    return (ordered >> 32).to(torch.int32), ordered & 0xFFFFFFFF


def _check(
    outside: Tensor,
    twice: Tensor,
    excess: Tensor,
    empty: Tensor | None,
    raw: Tensor,
    ids: Tensor,
    total: Tensor,
    spec: LossSpec,
    tail: str,
) -> None:
    if raw.device.type != "cpu":
        of_rows = [x[:, None] for x in (excess, empty) if x is not None]
        torch._assert_async(
            ~torch.cat([outside, twice, *of_rows], -1).any(),
            f"SparseTeacher: expected distinct indices from 0 to {spec.vocab_size - 1} (or -1: "
            "padding) whose probabilities sum to at most 1, and with tail='renormalize' or "
            "'conditional' more than 0, in every token that counts",
        )
    elif outside.any():
        raise ValueError(
            f"teacher.indices holds {int(raw[outside][0])}: expected 0 to {spec.vocab_size - 1} "
            "(the vocabulary; the student's columns, or vocab_size), or -1 for padding."
        )
    elif twice.any():
        raise ValueError(
            f"teacher.indices holds {int(ids[:, 1:][twice][0])} twice in one token: expected each "
            "id once. Add the probabilities of the two (logaddexp) into one entry."
        )
    elif excess.any():
        raise ValueError(
            f"teacher.log_probs: a token's probabilities sum to {float(total[excess][0]):.6g}: "
            "expected at most 1. They are natural logarithms of probabilities (log_softmax over "
            "the whole vocabulary, then topk), not logits or logits of the top k."
        )
    elif empty is not None and empty.any():
        raise ValueError(
            f"teacher has no entry with a probability above 0 for token {int(empty.nonzero()[0])}: "
            f"tail={tail!r} has nothing to scale there. Leave the token out (ignore_index, or "
            "token_weights 0), or use tail='bucket', 'generalized' or 'drop'."
        )


@functools.cache
def _check_tail(divergence: Divergence, tail: str) -> None:
    """Refuse a divergence whose own formula is infinite at p = 0 < q where there are such entries.

    Every f of :mod:`fusedkd.divergences` is finite there for all q or for none.
    """
    if tail == "generalized":
        divergences.measure_term(divergence)
    if tail not in ("renormalize", "drop") or _finite_without(divergence):
        return
    fine = [name for name in divergences.names() if _finite_without(divergences.make(name))]
    raise ValueError(
        f"divergence={divergence.name!r} is infinite where the teacher has no probability, and "
        f"tail={tail!r} leaves it none outside its entries: expected tail='bucket', 'generalized' "
        f"or 'conditional', or a divergence that is finite there, such as {', '.join(fine)}."
    )


def _finite_without(divergence: Divergence) -> bool:
    absent, half = torch.tensor([-INF, -0.7], dtype=torch.float64, device="cpu")
    return bool(divergence.value(absent, half).isfinite())
