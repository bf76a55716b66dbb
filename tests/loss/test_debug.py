"""FUSEDKD_DEBUG=1 says what a call does."""

from __future__ import annotations

import pytest
import torch

from fusedkd import LMHead, SparseTeacher, debug, kd_loss


def test_a_call_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(100, 8)
    ids = torch.arange(4).expand(40, 4)
    labels = torch.randint(0, 100, (40,))
    labels[::2] = -100
    teacher = SparseTeacher(ids, torch.full((40, 4), -2.0))
    kd_loss(LMHead(hidden, weight), teacher, labels, temperature=2.0, chunk_bytes=4000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(debug, "ENABLED", True)
    kd_loss(LMHead(hidden, weight), teacher, labels, temperature=2.0, chunk_bytes=4000)
    said = capsys.readouterr().err
    tokens = "20 of 40 tokens; logits of 10 at a time, gradient of 10, in 4,000 bytes"
    products = "products: 2 of student's logits, 2 of dh"
    for expected in ("forward_kl", "T = 2", "bucket over 4", tokens, products):
        assert expected in said, said
    assert "dW" not in said
