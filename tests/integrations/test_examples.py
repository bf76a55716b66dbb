"""The examples run, and what they train gets better; torchtune's losses and the mixin."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import byte_llama
import pytest
import torch
from torch import Tensor

from fusedkd import LMHead
from fusedkd.integrations import torchtune

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize(
    "name, options",
    [
        ("plain_pytorch", {}),
        ("accelerate_loop", {"cpu": True}),
        ("lightning_module", {}),
        ("own_trainer", {"use_cpu": True}),
        ("draft_model", {}),
        ("sft_trainer", {"use_cpu": True, "max_steps": 8, "bf16": False}),
    ],
)
def test_example(name: str, options: dict[str, Any], example: Any) -> None:
    if name == "sft_trainer":
        options = {**options, "tokenizer": byte_llama.tokenizer()}
    losses = example(name).main(**options)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["tensor_parallel", "accelerate_loop"])
def test_example_with_two_processes(name: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(
            [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    # With their work long done, gloo's processes now and then abort (pytorch issue 190489) or hang
    # (75097: whoever drops the last reference to the group, the GIL held, joins gloo's thread, and
    # that waits for the GIL to drop a tensor). With the answer there, they run once more for it.
    for _ in range(3):
        run = subprocess.Popen(
            [*launch, str(EXAMPLES / f"{name}.py")],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            answer, errors = run.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            run.terminate()  # the launcher ends its processes then
            answer, errors = run.communicate(timeout=60)
            assert " at last" in answer, errors[-3000:]
            continue
        if "terminate called without an active exception" not in errors:
            break
    assert run.returncode == 0, errors[-3000:]
    first, last = (float(part.split()[-1]) for part in answer.split(" at ")[:2])
    assert last < first


def data() -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 8, 41, generator=make) * 2
    labels = torch.randint(0, 41, (3, 8), generator=make)
    labels[0, :5] = labels[2] = -100
    return s, t, labels


def by_hand(s: Tensor, t: Tensor, labels: Tensor, ratio: float, normalize: bool) -> Tensor:
    """torchtune's formulas: its forward KL has no entropy of the teacher."""
    lq, lp = s.double().log_softmax(-1), t.double().log_softmax(-1)
    forward, reverse = -(lp.exp() * lq).sum(-1), (lq.exp() * (lq - lp)).sum(-1)
    rows = (ratio * forward + (1 - ratio) * reverse)[labels != -100]
    return rows.sum() / (len(rows) if normalize else 1)


LOSSES = {"ForwardKL": 1.0, "ReverseKL": 0.0, "SymmetricKL": 0.3}
# how 8 tokens are cut: as torch.chunk would, as tensor_split would, and more often than there are
CUTS = {4: (2, 2, 2, 2), 3: (3, 3, 2), 5: (2, 2, 2, 1, 1), 9: (1,) * 8 + (0,), 2: (7, 1)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunks", [None, *CUTS])
def test_torchtune(name: str, normalize: bool, chunks: int | None) -> None:
    s, t, labels = data()
    s.requires_grad_()
    options = {"sym_kd_ratio": 0.3} if name == "SymmetricKL" else {}
    if chunks is not None:
        loss = getattr(torchtune, f"{name}WithChunkedOutputLoss")(chunks, **options)
        value = loss(*(list(x.split(CUTS[chunks], 1)) for x in (s, t)), labels, normalize)
    else:
        value = getattr(torchtune, f"{name}Loss")(**options)(s, t, labels, normalize)
    want = by_hand(s, t, labels, LOSSES[name], normalize)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    got, exact = (torch.autograd.grad(x, s)[0] for x in (value, want))
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [((4, 4), (5, 3)), ((4, 4), (8,)), ((4, 3), (4, 3))])
def test_torchtune_chunks_that_do_not_fit(sizes: Any) -> None:
    s, t, labels = data()
    chunks = [[x[:, :n] for n in cut] for x, cut in zip((s, t), sizes, strict=True)]
    with pytest.raises(ValueError, match=r"student_logits has chunks of \[4, .*labels has shape"):
        torchtune.ForwardKLWithChunkedOutputLoss()(*chunks, labels)


def test_torchtune_takes_heads_and_keeps_the_graph() -> None:
    s, t, labels = data()
    eye = torch.eye(41)
    hidden = s.clone().requires_grad_()
    value = torchtune.ForwardKLLoss()(LMHead(hidden, eye), LMHead(t, eye), labels)
    torch.testing.assert_close(value.double(), by_hand(s, t, labels, 1.0, True))
    nothing = torchtune.ReverseKLLoss()(hidden, t, torch.full_like(labels, -100))
    assert nothing == 0 and (torch.autograd.grad(nothing, hidden)[0] == 0).all()
