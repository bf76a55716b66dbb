"""A head whose vocabulary is some rows of its weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedkd import LMHead, inputs, kd_loss, sampled_kd_loss, token_log_probs, top_k

N, H, ROWS, COLUMNS = 6, 5, 260, 201  # three whole pieces of 64, and a rest


@pytest.fixture
def heads(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> tuple[LMHead, LMHead]:
    """Trained and constant, each with as little gathered at a time as can be."""
    monkeypatch.setattr(inputs, "PIECE_BYTES", {"cpu": 1, "cuda": 1})

    def head(width: int) -> LMHead:
        ids = torch.randperm(ROWS)[:COLUMNS].to(device)
        shapes = (N, width), (ROWS, width), (ROWS,)
        hidden, weight, bias = (torch.randn(*s, device=device) for s in shapes)
        return LMHead(hidden, weight, bias, ids=ids)

    return head(H), head(2 * H)


def leaves(head: LMHead) -> list[Tensor]:
    assert head.bias is not None
    return [x.clone().requires_grad_() for x in (head.hidden, head.weight, head.bias)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_it_is_the_head_of_these_rows(
    backend: str,
    device: torch.device,
    heads: tuple[LMHead, LMHead],
    reduction: str,
    chunk_bytes: int | None,
) -> None:
    student, teacher = heads
    labels = torch.randint(COLUMNS, (N,), device=device)
    labels[1] = -100
    keywords = {"ce_weight": 0.5, "temperature": 2.0, "reduction": reduction, "backend": backend}
    upstream = torch.randn(N if reduction == "none" else (), device=device)
    made = []
    for ids in (student.ids, None):
        trained = leaves(student)
        one, other = LMHead(*trained, ids=ids), teacher
        if ids is None:
            assert teacher.bias is not None
            one = LMHead(trained[0], *(x[student.ids] for x in trained[1:]))
            rows = teacher.weight[teacher.ids], teacher.bias[teacher.ids]
            other = LMHead(teacher.hidden, *rows)
        loss = kd_loss(one, other, labels, chunk_bytes=chunk_bytes, **keywords)
        loss.backward(upstream)
        made.append([loss.detach(), *(x.grad for x in trained)])
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert not made[0][2][student.ids.new_tensor(sorted(outside(student)))].any()


def outside(head: LMHead) -> set[int]:
    assert head.ids is not None
    return set(range(ROWS)) - set(head.ids.tolist())


def test_all_rows_in_another_order(backend: str, device: torch.device) -> None:
    """Two vocabularies of the same tokens."""
    order = torch.randperm(ROWS).to(device)
    hidden, weight = torch.randn(N, H, device=device), torch.randn(ROWS, H, device=device)
    teacher = torch.randn(N, ROWS, device=device)
    results = []
    for ids, target in ((None, teacher), (order, teacher[:, order])):
        trained = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = kd_loss(LMHead(*trained, ids=ids), target, backend=backend)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in trained)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_tokens_of_it(backend: str, heads: tuple[LMHead, LMHead], trained: bool) -> None:
    """Log-probabilities, entropy, a sampled loss, and the top of the student's distribution."""
    student, _ = heads
    tokens = torch.randint(COLUMNS, (N, 3), device=student.hidden.device)
    upstream = torch.randn(N, 3, device=tokens.device)
    results = []
    for ids in (student.ids, None):
        parts = leaves(student)
        if not trained:
            parts[1:] = [x.detach() for x in parts[1:]]
        rows = parts if ids is not None else [parts[0], *(x[student.ids] for x in parts[1:])]
        head = LMHead(*rows, ids=ids)
        log_probs, entropy = token_log_probs(head, tokens, entropy=True, backend=backend)
        drawn, teacher = tokens[:, 0], log_probs[:, 0].detach() - 0.5
        loss = sampled_kd_loss(head, teacher, drawn, loss_type="k3", backend=backend)
        (entropy.sum() + (upstream * log_probs).sum() + loss).backward()
        best = top_k(LMHead(*(x.detach() for x in rows), ids=ids), 4, backend=backend)
        grads = [x.grad for x in parts if x.requires_grad]
        results.append([log_probs.detach(), entropy.detach(), loss.detach(), *best, *grads])
    for got, want in zip(*results, strict=True):
        if isinstance(got, Tensor):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=3e-6)


def test_under_torch_compile(heads: tuple[LMHead, LMHead]) -> None:
    student, teacher = heads

    def step(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return kd_loss(LMHead(hidden, weight, ids=ids), teacher)

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        trained = leaves(student)[:2]
        loss = function(*trained, student.ids)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in trained)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, ROWS]), "student.ids holds 260: expected rows of the weight, 0 to 259"),
        (torch.tensor([4, -1]), "student.ids holds -1"),
        (torch.tensor([4, 3, 4]), "student.ids holds 4 twice"),
        (torch.tensor([[4, 3]]), r"shape \(1, 2\): expected \(V',\)"),
        (torch.tensor([], dtype=torch.int64), "at least one row"),
        (torch.tensor([0.5]), "torch.float32: expected torch.int64 or torch.int32"),
        ([1, 2], "student.ids"),
    ],
)
def test_what_is_refused(ids: Tensor, message: str) -> None:
    head = LMHead(torch.randn(N, H), torch.randn(ROWS, H), ids=ids)
    with pytest.raises((ValueError, TypeError), match=message):
        kd_loss(head, torch.randn(N, 2))
