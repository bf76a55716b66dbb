"""The forms in which a distribution can be handed to :func:`fusedkd.kd_loss`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["TAILS", "LMHead", "SparseTeacher"]

TAILS = ("bucket", "renormalize", "drop")


@dataclass(frozen=True, eq=False)
class LMHead:
    """Hidden states and the output projection that turns them into logits, which then never exist
    in full.

    The logits are ``softcap * tanh(x / softcap)`` of ``x = logit_scale * (hidden @ weight.T +
    bias)``, without the tanh where ``softcap`` is None.

    Args:
        hidden: (..., H) last hidden states, after the final norm.
        weight: (V, H) the ``lm_head`` (or tied embedding) matrix.
        bias: (V,) or None.
        logit_scale: factor on the logits (Cohere's ``logit_scale``, 1 / Granite's
            ``logits_scaling``).
        softcap: Gemma 2's ``final_logit_softcapping``, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


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

    The last two leave p = 0 < q outside I, so a divergence that is infinite there (reverse KL and
    whatever contains it) raises ValueError. With the bucket none is refused; one that is infinite
    at p = 0 < q is so where an id has log-probability -inf, or where p_* is 0: if the entries sum
    to 1 up to rounding, p_* is taken to be what fp32 may have lost of it (sum_I p abs(log p) /
    2^24), which is 0 for a one-hot teacher only.

    Where the student has nothing outside the ids (they cover the vocabulary, or the rest is
    masked), a p_* within the rounding of ``log_probs`` counts as 0: with K = V the result is that
    of the dense teacher.

    Args:
        indices: (..., K) int64 or int32 vocabulary ids in any order, none twice in a token; -1 is
            padding, so tokens may have different numbers of entries (0 is fine, except with
            ``"renormalize"``). K may be 0.
        log_probs: (..., K) fp64, fp32, bf16 or fp16 natural-log probabilities, made at
            ``teacher_temperature``: nothing here can change their temperature. Constants; ignored
            at padding. Their rounding is the teacher's rounding, so prefer fp32.
        tail: "bucket", "renormalize" or "drop".

    Metrics: ``teacher_entropy`` is that of the K or K + 1 categories, not of the teacher that was
    cut; ``student_entropy`` that of q over the whole vocabulary; the teacher's top-1 is its most
    probable id (smallest id at a tie), even where the tail holds more.
    """

    indices: Tensor
    log_probs: Tensor
    tail: str = "bucket"
