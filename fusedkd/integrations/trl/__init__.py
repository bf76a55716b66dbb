"""TRL's distillation trainers with their loss computed from heads, normalised once and for all.

Replace the import, keep the rest (written for TRL 1.16)::

    from fusedkd.integrations.trl import GKDTrainer, GOLDTrainer, DistillationTrainer

The values are TRL's: no T^2, beta 0 forward KL and beta 1 reverse KL. What differs:

* logits never exist, in any dtype, where the models have a plain head (see
  :mod:`fusedkd.models.heads`); ``compute_loss(return_outputs=True)`` makes them, as it must;
* one optimizer step gives one loss and one gradient, however it is cut into micro-batches and
  processes. TRL's gradients are averaged over processes of sums that are divided by all tokens;
* completions that were generated in the step are counted, not the ones they replaced. GKD
  generates one micro-batch after the other, so there (``lmbda`` or ``seq_kd`` set) each micro-batch
  is normalised over the processes, and their losses are averaged over accumulation steps;
* GOLD's ULD is TRL's, a mean over rows, and averaged over a step's micro-batches, which TRL adds
  up. (Its cross-entropy, ``uld_crossentropy_weight``, is a mean over a micro-batch's tokens.)

:func:`generalized_jsd_loss`, :func:`chunked_divergence_loss` and :class:`ChunkedLogProbFunction`
(for GRPO and all that has a fused head) stand in for TRL's functions and need no TRL; the trainers
are made when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedkd.integrations.trl.log_probs import ChunkedLogProbFunction
from fusedkd.integrations.trl.losses import chunked_divergence_loss, generalized_jsd_loss

if TYPE_CHECKING:
    DistillationTrainer = GKDTrainer = GOLDTrainer = Any

__all__ = [
    "ChunkedLogProbFunction",
    "DistillationTrainer",
    "GKDTrainer",
    "GOLDTrainer",
    "chunked_divergence_loss",
    "generalized_jsd_loss",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusedkd.integrations.trl import trainers

    return getattr(trainers, name)
