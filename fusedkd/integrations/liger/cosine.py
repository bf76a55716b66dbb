"""Rows of logits compared by their cosine, which no kernel does."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusedkd.backends import CustomRows
from fusedkd.integrations.liger.probabilities import pieces
from fusedkd.kernels import METRICS, RowCall, Rows


class CosineRows(CustomRows):
    """1 - cosine of the two rows of logits in the divergence's place, differentiated by
    autograd."""

    def rows(self, call: RowCall) -> Rows:
        """Heads come with one leading dimension."""
        student, _, labels, row_scale, spec, grad, metrics, _ = call
        loss = torch.zeros_like(row_scale)
        found = row_scale.new_zeros(len(row_scale), len(METRICS))
        for rows in pieces(student[0]):
            scale, counts = row_scale[rows], row_scale[rows, None] != 0
            columns = slice(spec.vocab_size)
            with torch.enable_grad():
                s, t = (x[0, rows, columns].to(scale.dtype) for x in (student, call.teacher_logits))
                s, t = (torch.where(counts, x, 1.0).requires_grad_() for x in (s, t))
                ce = torch.zeros_like(scale)
                if labels is not None and (metrics or spec.ce_weight):
                    y = labels[rows].where(counts[:, 0], 0)
                    ce = F.nll_loss(F.log_softmax(s, dim=-1), y, reduction="none")
                terms = torch.stack([1 - F.cosine_similarity(s, t, dim=-1), ce], -1)
                total = scale * (terms @ terms.new_tensor([spec.kd_scale, spec.ce_weight]))
                everything = total.sum()
            if grad is not None:
                grad[0, rows] = 0
                made = torch.autograd.grad(everything, s)[0]
                grad[0, rows, columns] = made.where(counts, 0.0)
            loss[rows] = total.detach()
            found[rows, :2] = terms.detach().where(counts, 0.0)
        return Rows(loss, found if metrics else None)
