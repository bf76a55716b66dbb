"""Row rules: a factor on each row's divergence, against the oracle; what is refused; where they
go."""

from __future__ import annotations

import copy
import math
import os
import pickle
import textwrap
from pathlib import Path

import pytest
import torch
from budget import check, plain_case
from oracle import Case
from own_rules import entropy_gate, of_everything, token_clip
from random_calls import random_case, sparse_case
from torch import Tensor

from fusedkd import KDLoss, LMHead, SparseTeacher, kd_loss, kd_loss_and_metrics, row_rules
from fusedkd.row_rules import RowRule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where a call takes a second
RULES = {
    "gate": entropy_gate(threshold=2.5),
    "clip": token_clip(most=0.4),
    "of everything": of_everything(shift=2.0),
}


PAIRS = [(divergence, rule) for divergence in ("forward_kl", "jsd", "alpha") for rule in RULES]


@pytest.mark.parametrize(("divergence", "rule"), PAIRS[:: 4 if INTERPRETED else 1])
def test_logits(backend: str, device: torch.device, divergence: str, rule: str) -> None:
    """Metrics are as without a rule."""
    how = {"divergence": divergence, "row_rule": RULES[rule]}
    if INTERPRETED:
        check(plain_case(1, device, 3, 67, torch.float32, **how), backend, rule != "gate")
        return
    dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float16
    for seed, dtype in enumerate(dtypes):
        how["reduction"] = ("none", "mean", "sum", "mean")[seed]
        case = plain_case(seed, device, 5, 67, dtype, **how)
        check(case, backend, metrics=seed % 2 == 0)
        case.labels[1] = -100
        case.keywords["token_weights"] = torch.rand(5, device=device)
        check(case, backend)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop", "generalized", "conditional"])
def test_sparse_teachers(backend: str, device: torch.device, tail: str) -> None:
    kinds = (torch.float32, "forward_kl"), (torch.float64, "jsd")
    for dtype, divergence in kinds[: 1 if INTERPRETED else None]:
        how = {"divergence": divergence, "row_rule": RULES["of everything"], "reduction": "none"}
        case = plain_case(3, device, 5, 67, dtype, **how)
        top = case.teacher.div(2).log_softmax(-1).topk(6)
        case.teacher = SparseTeacher(top.indices, top.values, tail=tail)
        check(case, backend)


@pytest.mark.parametrize("seed", range(0 if INTERPRETED else 40))
def test_random_calls(backend: str, device: torch.device, seed: int) -> None:
    """Any form, dtype, layout and keyword."""
    tail = ("", "generalized", "conditional")[seed % 3]
    for case in (random_case(seed, device), sparse_case(seed, device, tail=tail)):
        labelled = case.labels is not None and seed % 2
        rule = of_everything(slope=0.3, shift=2.0) if labelled else token_clip(most=0.3)
        case.keywords["row_rule"] = rule
        check(case, backend, metrics=seed % 3 == 0)


def test_heads(backend: str, device: torch.device) -> None:
    """In chunks of two tokens; and "none", whose chunks are computed again in the backward."""
    for reduction in ("mean",) if INTERPRETED else ("mean", "none"):
        hidden, states = torch.randn(2, 5, 8, device=device).unbind()
        student, teacher = (
            LMHead(h, torch.randn(67, 8, device=device), softcap=cap)
            for h, cap in ((hidden, 3.0), (states, None))
        )
        for x in (student.hidden, student.weight):
            x.requires_grad_()
        keywords = {"row_rule": RULES["of everything"], "temperature": 1.5, "ce_weight": 0.3}
        keywords |= {"reduction": reduction, "chunk_bytes": 2 * 67 * 12, "divergence": "jsd"}
        labels = torch.randint(67, (5,), device=device)
        check(Case(student, teacher, labels, keywords, None, ["hidden", "weight"]), backend)


def test_a_closed_gate_leaves_infinities_out(backend: str, device: torch.device) -> None:
    s, t = torch.randn(2, 3, 40, device=device).unbind()
    t[0, 7] = -math.inf  # the reverse KL is infinite there
    t[2], s[1, 3] = 0.0, math.nan
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    keywords = {"divergence": "reverse_kl", "reduction": "none", "backend": backend}
    keywords |= {"row_rule": entropy_gate(threshold=0.1), "ce_weight": 1.0}
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, labels, **keywords)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    expected = torch.nn.functional.cross_entropy(s, labels, reduction="none")
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
    right = s.softmax(-1)
    right[:, 0] -= 1
    torch.testing.assert_close(grad[[0, 2]], right[[0, 2]])
    assert loss[1].isnan() and grad[1].isnan().all()  # never hidden by a gate
    _, metrics = kd_loss_and_metrics(s[:1], t[:1], labels[:1], **keywords)
    assert metrics.kd == math.inf


def test_without_a_weight_it_has_no_say(backend: str, device: torch.device) -> None:
    s, t = torch.randn(2, 3, 40, device=device).unbind()
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    keywords = {"kd_weight": 0.0, "ce_weight": 1.0, "backend": backend}
    rule = token_clip(most=0.1)
    for function in (kd_loss, lambda *a, **k: kd_loss_and_metrics(*a, **k)[0]):
        both = (function(s, t, labels, **keywords, row_rule=x) for x in (rule, None))
        assert torch.equal(*both)


# ----------------------------------------------------------------------------------------------
# what is refused


def test_functions_that_are_no_rules() -> None:
    def unknown(entropy: Tensor) -> Tensor:
        return entropy

    def nothing(*, threshold: float = 1.0) -> Tensor:
        return threshold

    def positional(divergence: Tensor, most=1.0) -> Tensor:  # type: ignore[no-untyped-def]
        return divergence

    for formula, said in ((unknown, "entropy is no statistic"), (nothing, "expected some of")):
        with pytest.raises(TypeError, match=f"{said}.*teacher_entropy"):
            row_rules.custom(formula)
    with pytest.raises(TypeError, match="most is no statistic"):
        row_rules.custom(positional)

    def constant(divergence: Tensor, *, by: float = 2.0) -> Tensor:
        return by * by

    def number(divergence: Tensor) -> float:
        return 1.0

    def over_rows(divergence: Tensor) -> Tensor:
        return divergence.mean()

    def branching(divergence: Tensor) -> Tensor:
        return divergence if divergence > 1 else 1 - divergence

    for formula, said in (
        (constant, "does not depend on divergence"),
        (number, "expected a tensor made of divergence, and got 1.0"),
        (over_rows, "mean is not known.*one number for each row"),
        (branching, "torch.where"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            row_rules.custom(formula)
        assert f"{formula.__name__} ({__file__}:" in str(error.value)


def test_factors_that_are_none_name_the_point() -> None:
    def ratio(divergence: Tensor) -> Tensor:
        return 1 / divergence

    def share(divergence: Tensor) -> Tensor:
        return divergence / (1 + divergence)

    def slope(student_top1: Tensor, *, by: float = 0.5) -> Tensor:
        return 1 - by * student_top1

    for formula, said in (
        (ratio, "ratio: the factor is inf at divergence = 0 "),
        (share, "share: the factor is nan at divergence = inf"),
    ):
        with pytest.raises(ValueError, match=said):
            row_rules.custom(formula)
    made = row_rules.custom(slope)
    with pytest.raises(ValueError, match=r"slope: the factor is -0\.8 at student_top1 = 0\.9"):
        made(by=2.0)  # with these parameters only
    with pytest.raises(TypeError, match="size"):
        made(size=2.0)


def test_statistics_that_are_not_there() -> None:
    s, t = torch.randn(2, 3, 9).unbind()
    with pytest.raises(ValueError, match="asks for label_log_prob, but labels is None"):
        kd_loss(s, t, row_rule=RULES["of everything"])
    with pytest.raises(ValueError, match="teacher is None"):
        kd_loss(s, None, torch.zeros(3).long(), kd_weight=0, ce_weight=1, row_rule=RULES["gate"])
    for wrong, said in ((entropy_gate, "called, not the function"), (3, "row_rule=3")):
        with pytest.raises(TypeError, match=said):
            kd_loss(s, t, row_rule=wrong)
    for wrong in ("entropy_gate", "own_rules:", "own_rules:RULES", "no_such_module:gate"):
        with pytest.raises(ValueError, match=f"row_rule={wrong!r}"):
            KDLoss(row_rule=wrong)


# ----------------------------------------------------------------------------------------------
# where they go


def test_pickled_compared_stored(backend: str, device: torch.device) -> None:
    rule = RULES["clip"]
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule == copy.deepcopy(rule) and hash(again) == hash(rule)
    assert rule != token_clip() and rule != RULES["gate"]
    s, t = torch.randn(2, 4, 9, device=device).unbind()
    stored = KDLoss(row_rule=again, backend=backend)
    assert torch.equal(stored(s, t), kd_loss(s, t, row_rule=rule, backend=backend))
    assert not torch.equal(stored(s, t), kd_loss(s, t, backend=backend))


def test_compiled_graphs() -> None:
    s, t = torch.randn(2, 4, 9).unbind()
    labels = torch.tensor([1, 2, -100, 3])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return kd_loss(s, t, labels, divergence="jsd(beta=0.3)", row_rule=OF_EVERYTHING)

    s.requires_grad_()
    expected = kd_loss(s, t, labels, divergence="jsd(beta=0.3)", row_rule=OF_EVERYTHING)
    loss = step(s, t, labels)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(x, s)[0] for x in (loss, expected)))


OF_EVERYTHING: RowRule = RULES["of everything"]


def test_a_schedule_of_parameters(backend: str, device: torch.device) -> None:
    """Numbers at run time."""
    s, t = torch.randn(2, 4, 9, device=device).unbind()
    kd = kd_loss(s, t, reduction="none", backend=backend)
    for most in (0.05, 0.1, 0.2):
        rule = token_clip(most=most)
        got = kd_loss(s, t, reduction="none", backend=backend, row_rule=rule)
        torch.testing.assert_close(got, kd.clamp(max=most), rtol=1e-5, atol=1e-6)


def test_from_a_module_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
        from fusedkd import row_rules

        @row_rules.custom
        def gate(student_top1, *, least=0.5):
            return student_top1 > least
    """
    (tmp_path / "rules_by_name.py").write_text(textwrap.dedent(body))
    monkeypatch.chdir(tmp_path)
    s, t = torch.randn(2, 4, 9).unbind()
    named = row_rules.resolve("rules_by_name:gate(least=0.2)")
    assert named is not None and named.name == "gate" and named.params == (0.2,)
    kd = kd_loss(s, t, reduction="none")
    got = kd_loss(s, t, reduction="none", row_rule="rules_by_name:gate(least=0.2)")
    assert torch.equal(got, torch.where(s.softmax(-1).amax(-1) > 0.2, kd, 0.0))
