"""ms-swift, Unsloth and axolotl: their formulas in fp64, their names and signatures, and, where
they are installed, their own functions. CI installs none of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd.integrations import axolotl, swift, unsloth

B, L, V, H, K = 2, 5, 43, 8, 6
INF = math.inf
Divergence = Callable[[Tensor, Tensor], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """What the three hosts write: beta of the teacher's, in the mixture and in the sum."""
    if beta in (0, 1):
        a, b = (lq, lp) if beta else (lp, lq)
        return (a.exp() * (a - b)).sum(-1)
    lm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    parts = beta * lp.exp() * (lp - lm), (1 - beta) * lq.exp() * (lq - lm)
    return (parts[0] + parts[1]).sum(-1)


def agree(ours: Tensor, theirs: Tensor, *leaves: tuple[Tensor, Tensor]) -> None:
    upstream = 1.7
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-6, atol=1e-6)
    for (x, y), upstreamed in zip(leaves, [upstream] * len(leaves), strict=True):
        mine = torch.autograd.grad(ours * upstreamed, x, retain_graph=True)[0]
        true = torch.autograd.grad(theirs * upstreamed, y, retain_graph=True)[0]
        torch.testing.assert_close(mine.double(), true.double(), rtol=1e-5, atol=1e-6)


def pair(x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return x.clone().requires_grad_(), x.to(dtype, copy=True).requires_grad_()


# ----------------------------------------------------------------------------------------------
# ms-swift 4.6.0: swift/rlhf_trainers/gkd_loss.py


class TeacherOutput(SimpleNamespace):
    """ms-swift's dataclass: its fields and what the loss asks of it."""

    full_logits: Tensor | None
    topk_logprobs: Tensor | None
    topk_indices: Tensor | None
    labels: Tensor | None

    def __init__(self, **fields: Any) -> None:
        names = ("full_logits", "topk_logprobs", "topk_indices", "labels")
        super().__init__(**{**dict.fromkeys(names), **fields})

    @property
    def is_topk_mode(self) -> bool:
        return self.topk_logprobs is not None

    def validate(self) -> None:
        assert self.full_logits is not None or self.is_topk_mode

    def select(self, mask: Tensor) -> TeacherOutput:
        return TeacherOutput(**{k: v if v is None else v[mask] for k, v in vars(self).items()})


def swift_formula(
    student: Tensor, output: Any, labels: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    s, t = student[labels != -100], output.select(output.labels != -100)
    if t.is_topk_mode:
        keep = ~t.topk_logprobs.isinf().all(-1)
        s, logits = s[keep].gather(-1, t.topk_indices[keep]), t.topk_logprobs[keep]
    else:
        logits = t.full_logits
        s = torch.cat([s, logits[..., s.shape[-1] :]], -1)
    lq, lp = ((x.to(s.dtype) / temperature).log_softmax(-1) for x in (s, logits))
    return jsd(lp, lq, beta).sum(), torch.tensor(len(s))


def swift_case(kind: str, make: Any = TeacherOutput) -> tuple[Tensor, Any, Tensor]:
    labels = torch.randint(V, (B, L), generator=generator(1))
    labels[0, :2] = labels[1, 0] = -100
    teacher, theirs = 2 * randn(B, L, V, seed=2), labels
    if kind == "another prompt":
        teacher, theirs = teacher.roll(1, 1), labels.roll(1, 1)
    if kind == "smaller student":
        return 2 * randn(B, L, V - 3), make(full_logits=teacher, labels=theirs), labels
    if kind == "top-k":
        top = teacher.log_softmax(-1).topk(K)
        values = top.values.clone()
        values[1, 1] = -INF  # nobody scored it
        output = make(topk_logprobs=values, topk_indices=top.indices, labels=theirs)
        return 2 * randn(B, L, V), output, labels
    return 2 * randn(B, L, V), make(full_logits=teacher, labels=theirs), labels


SWIFT = ["full", "another prompt", "smaller student", "top-k"]


@pytest.mark.parametrize("beta, temperature", [(0, 1.0), (1, 2.0), (0.3, 0.7)])
@pytest.mark.parametrize("kind", SWIFT)
def test_swift(kind: str, beta: float, temperature: float) -> None:
    student, output, labels = swift_case(kind)
    x, y = pair(student)
    total, count = swift.gkd_loss(x, output, labels, beta, temperature)
    expected, number = swift_formula(y, output, labels, beta, temperature)
    assert count == number
    agree(total, expected, (x, y))


@pytest.mark.parametrize("kind", SWIFT)
def test_inside_swift(kind: str) -> None:
    host = pytest.importorskip("swift.rlhf_trainers.gkd_loss")
    student, output, labels = swift_case(kind, host.TeacherOutput)
    x, y = pair(student, torch.float32)
    total, count = swift.gkd_loss(x, output, labels, 0.3, 0.7)
    expected, number = host.gkd_loss(y, output, labels, 0.3, 0.7)
    assert count == number
    agree(total, expected, (x, y))


def test_swift_mistakes() -> None:
    student, output, labels = swift_case("full")
    with pytest.raises(NotImplementedError, match="log_softmax_fn"):
        swift.gkd_loss(student, output, labels, 0.5, 1.0, log_softmax_fn=torch.log_softmax)
    with pytest.raises(ValueError, match="43 logits and the teacher 41"):
        output.full_logits = output.full_logits[..., :41]
        swift.gkd_loss(student, output, labels, 0.5, 1.0)
    output.labels = output.labels.clone().fill_(-100)
    with pytest.raises(ValueError, match="count 0 tokens and the student's 7"):
        swift.gkd_loss(student, output, labels, 0.5, 1.0)


# ----------------------------------------------------------------------------------------------
# unsloth_zoo 2026.10.9: rl_replacements.py and fused_losses/fused_linear.py


def heads(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("items", [None, 5])
@pytest.mark.parametrize("beta", [0, 0.4, 1])
def test_unsloth(beta: float, items: int | None) -> None:
    s, t, w, u = heads((B, L, H), (B, L, H + 2), (V, H), (V, H + 2))
    labels = torch.randint(V, (B, L), generator=generator(1))
    labels[0, :2] = -100
    counts = labels != -100
    (x, y), (a, b) = pair(s), pair(w)

    def capped(z: Tensor, scale: float, cap: float) -> Tensor:
        z = z * scale
        return ((cap * (z / cap).tanh() if cap else z) / 1.5).log_softmax(-1)

    lq, lp = capped(y @ b.T, 0.5, 9.0), capped(t.double() @ u.double().T, 0.25, 0.0)
    rows = jsd(lp, lq, beta) * counts
    expected = rows.sum() / (items or counts.sum())
    entropy = -((y @ b.T * 0.5 / 9).tanh() * 9 / 1.5).softmax(-1) * lq
    loss, entropies, number = unsloth.distillation_chunked_jsd(
        *(x, t, a, u, counts, beta),
        num_items_in_batch=items,
        student_logit_scale=0.5,
        teacher_logit_scale=0.25,
        student_final_logit_softcapping=9.0,
        temperature=1.5,
    )
    agree(loss, expected, (x, y), (a, b))
    assert number == counts.sum()
    torch.testing.assert_close(entropies.double(), (entropy.sum(-1) * counts).sum().detach())
    fused = unsloth.fused_linear_jsd(
        *(x, a, t, u),
        labels=labels,
        beta=beta,
        temperature=1.5,
        student_logit_scale=0.5,
        student_logit_softcapping=9.0,
        teacher_logit_scale=0.25,
        num_items_in_batch=items,
    )
    agree(fused, expected, (x, y), (a, b))


@pytest.mark.parametrize("beta", [0, 0.4, 1])
def test_inside_unsloth(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_IS_PRESENT", "1")  # what `import unsloth` sets, which wants a GPU
    monkeypatch.setenv("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")
    zoo = pytest.importorskip("unsloth_zoo.rl_replacements")
    fused = pytest.importorskip("unsloth_zoo.fused_losses.fused_linear")
    theirs = zoo.distillation_chunked_jsd, fused.fused_linear_jsd
    s, t, w, u = heads((B, L, H), (B, L, H + 2), (V, H), (V, H + 2))
    labels = torch.randint(V, (B, L), generator=generator(1))
    labels[0, :2] = -100
    (x, y), (a, b) = pair(s, torch.float32), pair(w, torch.float32)
    soft = {"student_final_logit_softcapping": 9.0, "student_logit_scale": 0.5}
    calls = [
        f(h, t, k, u, labels != -100, beta, **soft)
        for f, h, k in ((unsloth.distillation_chunked_jsd, x, a), (theirs[0], y, b))
    ]
    agree(calls[0][0], calls[1][0], (x, y), (a, b))
    torch.testing.assert_close(calls[0][1:], calls[1][1:], check_dtype=False)
    one, other = (
        f(h, k, t, u, labels=labels, beta=beta, student_logit_softcapping=9.0)
        for f, h, k in ((unsloth.fused_linear_jsd, x, a), (theirs[1], y, b))
    )
    agree(one, other, (x, y), (a, b))
    for module, name, before in (
        (zoo, "distillation_chunked_jsd", theirs[0]),
        (fused, "fused_linear_jsd", theirs[1]),
    ):
        monkeypatch.setattr(module, name, before)  # put back afterwards
    unsloth.register()
    assert zoo.distillation_chunked_jsd is unsloth.distillation_chunked_jsd
    assert fused.fused_linear_jsd is unsloth.fused_linear_jsd


# ----------------------------------------------------------------------------------------------
# axolotl 0.19.0: axolotl/integrations/kd/kernels/liger.py


def axolotl_case() -> tuple[Tensor, ...]:
    s, w = heads((B, L, H), (V, H))
    top = randn(B, L, V, seed=5).topk(K)
    ids, log_probs = top.indices, top.values.log_softmax(-1)
    mask = torch.ones(B, L, K, dtype=torch.int64)
    mask[0, 3:], mask[1, 0] = 0, 0
    ids[mask == 0], log_probs[mask == 0] = 0, -INF  # as padding is
    labels = torch.randint(V, (B, L), generator=generator(1))
    labels[0, 2:] = -100
    return w, s, ids, log_probs, mask, labels


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("beta, temperature", [(0.0, 2.0), (1.0, 0.7), (0.3, 1.0)])
def test_axolotl(beta: float, temperature: float, normalize: bool) -> None:
    if beta and not normalize:
        with pytest.raises(ValueError, match="normalize_topk"):
            axolotl.LigerFusedLinearKLTopKLogprobLoss(beta=beta, normalize_topk=False)
        return
    w, s, ids, log_probs, mask, labels = axolotl_case()
    (a, b), (x, y) = pair(w), pair(s)
    module = axolotl.LigerFusedLinearKLTopKLogprobLoss(
        0.3, 0.8, temperature, beta, normalize_topk=normalize
    )
    loss = module(a, x, ids, log_probs, mask, labels)
    logits = y @ b.T
    lq = (logits / temperature).log_softmax(-1).gather(-1, ids)[mask[..., 0] == 1]
    lq = lq.log_softmax(-1) if normalize else lq
    lp = log_probs.double()[mask[..., 0] == 1]
    ce = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    expected = 0.8 * temperature**2 * jsd(lp, lq, beta).sum() + 0.3 * ce
    agree(loss, expected, (x, y), (a, b))


@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (1.0, 1.0), (0.3, 1.0), (0.0, 2.0)])
def test_inside_axolotl(beta: float, temperature: float) -> None:
    host = pytest.importorskip("axolotl.integrations.kd.kernels.liger")
    w, s, ids, log_probs, mask, labels = axolotl_case()
    (a, b), (x, y) = pair(w, torch.float32), pair(s, torch.float32)
    settings: Any = {"temperature": temperature, "beta": beta, "compiled": False}
    loss = axolotl.LigerFusedLinearKLTopKLogprobLoss(0.3, 0.8, **settings)(
        *(a, x, ids, log_probs, mask, labels)
    )
    theirs = host.LigerFusedLinearKLTopKLogprobLoss(0.3, 0.8, **settings)(
        *(b, y, ids, log_probs, mask, labels)
    )
    # at another T than 1 its gradient lacks the T^2 that its value has
    agree(loss, theirs, *([((x), (y)), (a, b)] if temperature == 1 else []))


def test_inside_axolotls_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, as axolotl reads it from YAML; its trainer's own ``compute_loss``."""
    host = pytest.importorskip("axolotl.integrations.kd.trainer")
    plugins = pytest.importorskip("axolotl.integrations.base").PluginManager()
    name = "LigerFusedLinearKLTopKLogprobLoss"
    theirs = getattr(host, name)
    monkeypatch.setattr(host, name, theirs)  # put back afterwards
    plugins.register("fusedkd.integrations.axolotl.KDPlugin")
    trainer = plugins.get_trainer_cls(SimpleNamespace(kd_trainer=True))
    assert trainer is host.AxolotlKDTrainer and getattr(host, name) is getattr(axolotl, name)
    w, s, ids, log_probs, mask, labels = axolotl_case()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(H, V, bias=False)
            self.lm_head.weight.data.copy_(w)

        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(hidden_states=[s])

    batch = {"labels": labels, "target_token_ids": ids, "target_logprobs": log_probs}
    losses = []
    for loss in (getattr(axolotl, name), theirs):
        made = trainer.__new__(trainer)
        made._kd_loss_fn = loss(0.3, 0.8, 2.0, 0.0, compiled=False)
        losses.append(made.compute_loss(Model(), {**batch, "target_mask": mask}))
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-6, atol=1e-6)


def test_axolotl_mistakes() -> None:
    w, s, ids, log_probs, mask, labels = axolotl_case()
    module = axolotl.LigerFusedLinearKLTopKLogprobLoss()
    with pytest.raises(ValueError, match="do not sum to 1"):
        module(w, s, ids, log_probs - 1, mask, labels)
    mask[1, 1, 0] = 0
    with pytest.raises(ValueError, match="whole tokens"):
        module(w, s, ids, log_probs, mask, labels)
    with pytest.raises(ValueError, match="weight_hard_loss=2"):
        axolotl.LigerFusedLinearKLTopKLogprobLoss(2)
    with pytest.raises(ValueError, match="temperature=0"):
        axolotl.LigerFusedLinearKLTopKLogprobLoss(temperature=0)


# ----------------------------------------------------------------------------------------------
# registration, against modules of the published names and signatures


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            made = ModuleType(parent)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, parent, made)
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def same_signature(function: Any) -> Any:
    """A function that takes what ``function`` takes, and must not be called."""
    import inspect

    def theirs(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host's own loss was called")

    theirs.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return theirs


def another(*_: Any, new_argument: int = 0) -> None: ...


def test_swift_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "swift.rlhf_trainers.gkd_trainer"
    host: Any = _module(monkeypatch, name, gkd_loss=same_signature(swift.gkd_loss))
    for _ in range(2):
        swift.register()
    assert host.gkd_loss is swift.gkd_loss
    host.gkd_loss = another
    with pytest.raises(ImportError, match="new_argument"):
        swift.register()
    assert host.gkd_loss is another
    del host.gkd_loss
    with pytest.raises(ImportError, match="is not there"):
        swift.register()


def test_unsloth_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [
        same_signature(f) for f in (unsloth.distillation_chunked_jsd, unsloth.fused_linear_jsd)
    ]
    first: Any = _module(
        monkeypatch, "unsloth_zoo.rl_replacements", distillation_chunked_jsd=theirs[0]
    )
    second: Any = _module(
        monkeypatch, "unsloth_zoo.fused_losses.fused_linear", fused_linear_jsd=another
    )
    written: Any = _module(monkeypatch, "UnslothGKDTrainer", _unsloth_fused_linear_jsd=theirs[1])
    with pytest.raises(ImportError, match="fused_linear_jsd takes"):
        unsloth.register()
    assert first.distillation_chunked_jsd is theirs[0]  # nothing by halves
    second.fused_linear_jsd = theirs[1]
    for _ in range(2):
        unsloth.register()
    assert first.distillation_chunked_jsd is unsloth.distillation_chunked_jsd
    assert second.fused_linear_jsd is unsloth.fused_linear_jsd
    assert written._unsloth_fused_linear_jsd is unsloth.fused_linear_jsd


def test_axolotl_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = axolotl.LigerFusedLinearKLTopKLogprobLoss
    loss = type(ours.__name__, (), {"__init__": ours.__init__, "forward": ours.forward})
    trainer = _module(monkeypatch, "axolotl.integrations.kd.trainer", **{ours.__name__: loss})

    class Trainer:
        __module__ = trainer.__name__

    class Plugin:
        def get_trainer_cls(self, cfg: Any) -> Any:
            return Trainer if cfg.kd_trainer else None

    monkeypatch.setattr(sys.modules["axolotl.integrations.kd"], "KDPlugin", Plugin, raising=False)
    plugin = axolotl.KDPlugin()
    assert plugin.get_trainer_cls(SimpleNamespace(kd_trainer=False)) is None
    assert getattr(trainer, ours.__name__) is loss
    loss.forward = another
    with pytest.raises(ImportError, match="forward takes"):
        plugin.get_trainer_cls(SimpleNamespace(kd_trainer=True))
    loss.forward = ours.forward
    assert plugin.get_trainer_cls(SimpleNamespace(kd_trainer=True)) is Trainer
    assert getattr(trainer, ours.__name__) is ours
