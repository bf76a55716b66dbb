"""Arguments that are not what they should be: every one ends in an error of ours that names it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import random
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fusedkd
from fusedkd import (
    KDLoss,
    LMHead,
    SparseTeacher,
    divergences,
    features,
    kd_loss,
    kd_loss_and_metrics,
)
from fusedkd.divergences import Divergence

N, V, H = 4, 7, 5
OURS = str(Path(fusedkd.__file__).parent.parent)


@functools.cache
def rubbish() -> list[Any]:
    """What nobody should pass, and some that fits somewhere."""
    numbers = [None, 0, 1, -1, 2.5, True, False, 1j, 10**30, -(10**30), 2**63, 1e308, 5e-324]
    numbers += [
        float("nan"),
        float("inf"),
        -float("inf"),
        np.float32(1),
        np.float64(2),
        np.int64(3),
    ]
    words: list[Any] = ["", "jsd", "jsd(", "cpu", "mean", b"x", [], [1.0], (1,), {}, {1: 2}, set()]
    words += [object(), len, np.array([1, 2]), np.array(["a", "b"]), np.bool_(True), torch.float32]
    words += [torch.device("cpu"), range(3), ..., divergences.jsd, divergences.jsd()]
    square = torch.zeros(N, V)
    tensors = [torch.tensor(x) for x in (1.0, float("nan"), -1.0, [1.0, 2.0], 1 + 1j, 1, True)]
    tensors += [square, square.T, square.long(), square.to(torch.int8), square.to(torch.complex64)]
    tensors += [square.to("meta"), square.to_sparse(), square.to_sparse_csr(), square.to_mkldnn()]
    tensors += [torch.nested.nested_tensor([square, square[:2]]), torch.zeros(0), torch.zeros(N)]
    tensors += [
        torch.quantize_per_tensor(square, 0.1, 0, torch.qint8),
        square.clone().requires_grad_(),
    ]
    tensors += [torch.full((N,), x) for x in (-1.0, float("nan"), float("inf"), 10**9, -5)]
    tensors += [torch.ones(N, requires_grad=True), square[None], torch.zeros(N, V + 1)]
    head = LMHead(torch.zeros(N, H), torch.zeros(V + 1, H))
    sparse = SparseTeacher(torch.zeros(N, 1).long(), torch.zeros(N, 1))
    mine = [Divergence(name, value=lambda lp, lq: lp - lq) for name in ("jsd", "mine")]
    return [*numbers, *words, *tensors, head, sparse, *mine]


def good() -> dict[str, Any]:
    return {
        "student": torch.randn(N, V).requires_grad_(),
        "teacher": torch.randn(N, V),
        "labels": torch.randint(0, V, (N,)),
        "divergence": "forward_kl",
        "temperature": 1.5,
        "teacher_temperature": 1.0,
        "kd_weight": 1.0,
        "ce_weight": 0.5,
        "scale_by_t2": True,
        "ignore_index": -100,
        "label_smoothing": 0.1,
        "z_loss_weight": 0.2,
        "token_weights": torch.ones(N),
        "reduction": "mean",
        "normalizer": 3.0,
        "vocab_size": V,
        "inplace": False,
        "chunk_bytes": 100_000,
        "group": None,
        "backend": "cpu",
    }


def call(keywords: dict[str, Any]) -> None:
    sides = [keywords.pop(name) for name in ("student", "teacher", "labels")]
    loss = kd_loss(*sides, **keywords)
    if loss.requires_grad:
        loss.sum().backward()


def parts(kind: type, side: str, part: str, value: Any) -> dict[str, Any]:
    """A call in which one field of a head or of a sparse teacher is another."""
    fields: dict[str, Any] = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H)}
    fields |= {"bias": torch.randn(V), "logit_scale": 1.0, "softcap": None}
    if kind is SparseTeacher:
        fields = {"indices": torch.arange(2).expand(N, 2), "log_probs": torch.full((N, 2), -2.0)}
        fields["tail"] = "bucket"
    return good() | {side: kind(**(fields | {part: value}))}


def targets() -> dict[str, Callable[[Any], Any]]:
    """What is tried, by the name that an error has to hold."""
    found: dict[str, Callable[[Any], Any]] = {
        name: lambda x, name=name: call(good() | {name: x}) for name in good()
    }
    for side in ("student", "teacher"):
        for field in dataclasses.fields(LMHead):
            name = f"{side}.{field.name}"
            found[name] = lambda x, a=side, b=field.name: call(parts(LMHead, a, b, x))
    for field in dataclasses.fields(SparseTeacher):
        name = f"teacher.{field.name}"
        found[name] = lambda x, b=field.name: call(parts(SparseTeacher, "teacher", b, x))
    tensors = {"student", "teacher", "labels", "token_weights", "normalizer", "group"}
    for name in sorted(good().keys() - tensors):
        found[f"KDLoss.{name}"] = lambda x, name=name: KDLoss(**{name: x})
    for name in ("jsd", "skew_forward_kl", "mixed_kl", "alpha", "alpha_beta"):
        found[name] = lambda x, name=name: getattr(divergences, name)(x)
    found["divergence.divergence"] = divergences.make
    for name in ("student", "teacher", "tokens", "normalizer"):
        found[f"hidden_mse.{name}"] = lambda x, name=name: hidden_mse(**{name: x})
    for side in ("student", "teacher"):
        for name in ("query", "key", "value", "scaling", "mask"):
            found[f"attention_kl.{side}.{name}"] = lambda x, a=side, b=name: attention(a, b, x)
        found[f"attention_kl.{side}"] = lambda x, a=side: attention(a, None, x)
    return found


def hidden_mse(**changed: Any) -> Tensor:
    keywords = {"student": torch.randn(2, N, V), "teacher": torch.randn(2, N, V)}
    return features.hidden_mse(**(keywords | changed))


def attention(side: str, name: str | None, value: Any) -> Tensor:
    sides = {}
    for which in ("student", "teacher"):
        fields = {part: torch.randn(2, 4, N, V) for part in ("query", "key", "value")}
        if which == side and name:
            fields[name] = value
        sides[which] = features.AttentionStates(**fields)
    return features.attention_kl(**(sides | ({} if name else {side: value})))


def verdict(name: str, function: Callable[[Any], Any], value: Any) -> str | None:
    """What is wrong with how a call ends; nothing where it works, or says what it should."""
    try:
        function(value)
    except (ValueError, TypeError, RuntimeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if not place.filename.startswith(OURS) or "site-packages" in place.filename:
            return f"{name}={value!r}: raised at {place.filename}:{place.lineno}: {error}"
        if name.rsplit(".", 1)[-1] not in str(error) and "label" not in str(error):
            return f"{name}={value!r}: not named in: {error}"
    except Exception as error:
        return f"{name}={value!r}: {type(error).__name__}: {error}"
    return None


@pytest.fixture
def lone_group(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", targets())
def test_every_wrong_argument_is_named(name: str) -> None:
    wrong = [verdict(name, targets()[name], value) for value in rubbish()]
    assert not list(filter(None, wrong))


def test_the_same_over_a_group(lone_group: Any) -> None:
    wrong = []
    for name, value in ((name, value) for name in good() for value in rubbish()):
        wrong.append(
            verdict(name, lambda x, n=name: call(good() | {"group": lone_group, n: x}), value)
        )
    for kind in (LMHead, SparseTeacher):
        for part, value in ((f.name, x) for f in dataclasses.fields(kind) for x in rubbish()):
            of = functools.partial(parts, kind, "teacher", part)
            run = lambda x, of=of: call(of(x) | {"group": lone_group})  # noqa: E731
            wrong.append(verdict(f"teacher.{part}", run, value))
    assert not list(filter(None, wrong))


@pytest.mark.parametrize("seed", range(300))
def test_several_wrong_arguments(seed: int) -> None:
    """Two or three at once: one of them is named."""
    rng = random.Random(seed)
    names = rng.sample(list(good()), rng.choice([2, 2, 3]))
    changed = {name: rng.choice(rubbish()) for name in names}
    wrong = [verdict(name, lambda _: call(good() | changed), changed) for name in names]
    assert None in wrong, wrong


# ---- what is taken, and what it means ------------------------------------------------------------


def test_numbers_that_spoil_a_run_are_refused(backend: str, device: torch.device) -> None:
    s, t = torch.randn(N, V, device=device), torch.randn(N, V, device=device)
    for value in (-1.0, float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match=r"^normalizer.*finite"):
            kd_loss(s, t, normalizer=torch.tensor(value, dtype=torch.float64), backend=backend)
        weights = torch.tensor([1.0, value, 1.0, 1.0], dtype=torch.float64, device=device)
        if device.type == "cpu":  # a GPU asserts on the device
            with pytest.raises(ValueError, match=r"^token_weights.*finite"):
                kd_loss(s, t, token_weights=weights, backend=backend)
    for name in ("normalizer", "token_weights"):
        with pytest.raises(ValueError, match=f"^{name} requires grad"):
            kd_loss(s, t, **{name: torch.ones(N if "t" in name[0] else ()).requires_grad_()})
    with pytest.raises(TypeError, match=r"^normalizer is torch\.bool"):
        kd_loss(s, t, normalizer=torch.tensor(True))


def test_checks_of_numbers_wait_for_nobody_when_traced() -> None:
    s, t, w = torch.randn(N, V), torch.randn(N, V), torch.rand(N)
    compiled = torch.compile(
        lambda w, z: kd_loss(s, t, token_weights=w, normalizer=z),
        backend="aot_eager",
        fullgraph=True,
    )
    z = torch.tensor(3.0)
    torch.testing.assert_close(compiled(w, z), kd_loss(s, t, token_weights=w, normalizer=z))


@pytest.mark.parametrize("text", ["jsd(beta=0.3)", "jsd(0.3)", "jsd:0.3", " jsd ( beta = 0.3 ) "])
def test_divergences_may_be_written_everywhere(text: str) -> None:
    s, t = torch.randn(N, V), torch.randn(N, V)
    want = kd_loss(s, t, divergence=divergences.jsd(0.3))
    assert kd_loss(s, t, divergence=text) == want
    assert kd_loss_and_metrics(s, t, divergence=text)[0] == want
    assert KDLoss(divergence=text)(s, t) == want
    assert divergences.make(text) == divergences.jsd(0.3)


def test_a_formula_is_never_another_ones(backend: str) -> None:
    """A hand-made divergence runs its own formula or none."""
    s, t = torch.randn(N, V), torch.randn(N, V)
    lookalikes = [Divergence("jsd", (0.5,), value=divergences.forward_kl().value)]
    lookalikes += [dataclasses.replace(divergences.jsd(0.5), params=(0.9,))]
    for divergence in lookalikes:
        with pytest.raises(ValueError, match=r"hand-made, but 'jsd' is the name of"):
            kd_loss(s, t, divergence=divergence, backend=backend)
    mine = Divergence("squares", value=lambda lp, lq: (lp.exp() - lq.exp()).square())
    want = (s.softmax(-1) - t.softmax(-1)).square().sum(-1).mean()
    torch.testing.assert_close(kd_loss(s, t, divergence=mine, backend="reference"), want)
    equal = dataclasses.replace(mine, value=lambda lp, lq: 2 * (lp.exp() - lq.exp()).square())
    torch.testing.assert_close(kd_loss(s, t, divergence=equal, backend="reference"), 2 * want)
    if backend != "reference":
        with pytest.raises(NotImplementedError, match="squares"):
            kd_loss(s, t, divergence=mine, backend=backend)
    for made in (divergences.jsd(0.3), divergences.make("alpha_beta")):
        assert pickle.loads(pickle.dumps(made)).builtin


# ---- no teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "head"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_alone(backend: str, device: torch.device, form: str, reduction: str) -> None:
    raw, labels = torch.randn(6, 30, device=device), torch.randint(30, (6,), device=device)
    labels[1] = -100
    leaf = raw.requires_grad_()
    student = leaf if form == "dense" else LMHead(leaf, torch.eye(30, device=device))
    options = {"label_smoothing": 0.1, "reduction": reduction}
    want = torch.nn.functional.cross_entropy(raw, labels, **options)  # type: ignore[arg-type]
    found = kd_loss_and_metrics(
        student, None, labels, kd_weight=0.0, ce_weight=1.0, **options, backend=backend
    )
    torch.testing.assert_close(found[0], want)
    grads = [torch.autograd.grad(loss.sum(), leaf)[0] for loss in (found[0], want)]
    torch.testing.assert_close(*grads)
    metrics = found[1]._asdict()
    assert metrics.pop("student_mass") is metrics.pop("teacher_mass") is None
    unknown = {name for name, value in metrics.items() if value.isnan()}
    assert unknown == {"kd", "teacher_entropy", "top1_agreement", "teacher_accuracy"}
    assert metrics["num_tokens"] == 5
    with pytest.raises(ValueError, match=r"^teacher is None, but kd_weight=1: expected"):
        kd_loss(student, None, labels, ce_weight=1.0, backend=backend)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="compiles no interpreted kernel")
def test_cross_entropy_alone_compiles() -> None:
    s, labels = torch.randn(6, 30), torch.randint(30, (6,))
    compiled = torch.compile(
        lambda s: kd_loss(s, None, labels, kd_weight=0.0, ce_weight=1.0),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(compiled(s), torch.nn.functional.cross_entropy(s, labels))


def test_cross_entropy_alone_over_a_group(lone_group: Any) -> None:
    s, labels = torch.randn(6, 30), torch.randint(30, (6,))
    loss = kd_loss(s, None, labels, kd_weight=0.0, ce_weight=1.0, group=lone_group)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(s, labels))


# ---- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"tokens": torch.ones(2, 1).bool()}, r"^tokens has shape \(2, 1\).*expected \(2, 4\)"),
        ({"tokens": torch.ones(2, 4, 1)}, r"^tokens has shape"),
        ({"teacher": torch.randn(2, 4, 8)}, r"one shape; use a learned projection"),
        ({"student": torch.randn(4, 7), "teacher": torch.randn(4, 7)}, r"expected \(B, L, D\)"),
        ({"teacher": torch.zeros(2, 4, 7).long()}, r"^teacher is torch\.int64"),
        ({"normalizer": -1.0}, "^normalizer=-1.0"),
        ({"normalizer": torch.tensor([1.0, 2.0])}, r"^normalizer has shape \(2,\)"),
    ],
)
def test_features_check_what_they_are_given(changed: dict[str, Any], message: str) -> None:
    keywords = {"student": torch.randn(2, 4, 7), "teacher": torch.randn(2, 4, 7)} | changed
    for loss in (features.hidden_mse, features.cosine_loss):
        text = message.replace("a learned projection", "a( learned)? projection")
        with pytest.raises((ValueError, TypeError), match=text):
            loss(**keywords)
