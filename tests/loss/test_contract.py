"""The contract's edge cases, on every backend that runs here (see conftest.py)."""

import copy
import math
import os
import pickle

import children
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedkd import KDLoss, LMHead, backends, divergences, kd_loss, kd_loss_and_metrics

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = divergences.names()
INF = math.inf


@pytest.fixture(autouse=True)
def _on_the_backends_device(request):
    if "backend" in request.fixturenames:
        device = request.getfixturevalue("device")
        with torch.device(device):
            yield
    else:
        yield


def pair(n=4, v=37, seed=0, dtype=torch.float32, scale=3.0):
    generator = torch.Generator("cpu").manual_seed(seed)
    options = {"generator": generator, "device": "cpu"}
    device = torch.get_default_device()
    student, teacher = (torch.randn(n, v, **options).to(device) * scale for _ in range(2))
    labels = torch.randint(0, v, (n,), **options).to(device)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


@pytest.mark.parametrize("name", NAMES)
def test_masked_on_both_sides_is_finite(backend, name):
    student, teacher, labels = pair()
    student, teacher = student.detach(), teacher.clone()
    student[:, 5:20] = teacher[:, 5:20] = -INF
    labels[:] = 1
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels, divergence=name, ce_weight=0.5, backend=backend)
    loss.backward()
    kept = [*range(5), *range(20, 37)]
    small = kd_loss(
        *(student.detach()[:, kept], teacher[:, kept], labels),
        divergence=name,
        ce_weight=0.5,
        backend=backend,
    )
    torch.testing.assert_close(loss, small)
    assert student.grad.isfinite().all()
    assert (student.grad[:, 5:20] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_masked_label_has_an_infinite_loss_and_a_finite_gradient(backend, name, temperature):
    student, teacher, labels = pair()
    student = student.detach()
    student[:, 3], labels[0] = -INF, 3
    student.requires_grad_()
    options = {"divergence": name, "temperature": temperature, "ce_weight": 1, "reduction": "none"}
    loss = kd_loss(student, teacher, labels, **options, backend=backend)
    loss.sum().backward()
    assert loss[0] == INF and not loss.isnan().any()
    assert student.grad.isfinite().all() and (student.grad[:, 3] == 0).all()
    assert (student.grad[0] != 0).any()


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_infinite_only_where_the_mathematics_is(backend, temperature):
    student, teacher, _ = pair()
    masked = student.detach().clone()
    masked[0, 3] = -INF
    masked.requires_grad_()
    options = {"temperature": temperature, "backend": backend, "reduction": "none"}
    forward = kd_loss(masked, teacher, **options)
    assert forward[0] == INF and forward[1:].isfinite().all()
    forward.sum().backward()
    assert masked.grad.isfinite().all() and masked.grad[0, 3] == 0
    assert kd_loss(masked, teacher, divergence="reverse_kl", **options).isfinite().all()
    other = teacher.clone()
    other[0, 3] = -INF
    reverse = kd_loss(student, other, divergence="reverse_kl", **options)
    assert reverse[0] == INF and reverse[1:].isfinite().all()
    reverse.sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9])
def test_finite_masks(backend, name, fill):
    student, teacher, _ = pair()
    student = student.detach().clone()
    student[:, 5:20] = fill
    teacher[:, 5:20] = fill
    student.requires_grad_()
    loss = kd_loss(student, teacher, divergence=name, backend=backend)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_hidden_only_where_it_does_not_count(backend, name):
    student, teacher, labels = pair()
    clean = kd_loss(student[1:], teacher[1:], labels[1:], divergence=name, backend=backend)
    (want,) = torch.autograd.grad(clean, student)
    bad = student.detach().clone()
    bad[0, 3] = math.nan
    bad.requires_grad_()
    labels[0] = -100
    loss = kd_loss(bad, teacher, labels, divergence=name, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    torch.testing.assert_close(bad.grad, want)
    assert kd_loss(bad, teacher, divergence=name, backend=backend).isnan()


@pytest.mark.parametrize("how", ["ignored", "weights", "empty"])
def test_nothing_counted(backend, how):
    student, teacher, labels = pair()
    weights = None
    if how == "ignored":
        labels[:] = -100
    elif how == "weights":
        weights = torch.zeros(4)
    else:
        student, teacher, labels = pair(n=0)
    loss, metrics = kd_loss_and_metrics(
        student, teacher, labels, ce_weight=1.0, token_weights=weights, backend=backend
    )
    assert loss == 0 and loss.requires_grad and metrics.num_tokens == 0
    loss.backward()
    assert student.grad.shape == student.shape and (student.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_never_negative_in_bf16(backend, name):
    student, _, _ = pair(n=16, v=501, dtype=torch.bfloat16)
    teacher = (student.detach().float() + 0.01 * torch.randn(16, 501)).bfloat16()
    loss = kd_loss(student, teacher, divergence=name, reduction="none", backend=backend)
    assert (loss > -1e-6).all()
    same = kd_loss(student, student.detach(), divergence=name, backend=backend)
    assert abs(same) < 1e-6


@pytest.mark.parametrize("inplace", [False, True])
def test_second_backward(backend, inplace):
    student, teacher, labels = pair()
    loss = kd_loss(student * 1, teacher, labels, ce_weight=0.5, inplace=inplace, backend=backend)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    before = first.clone()
    (triple,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, before) and torch.equal(again, first)
    torch.testing.assert_close(triple, 3 * first)


@pytest.mark.parametrize("name", NAMES)
def test_bitwise_repeatable(backend, name):
    results = []
    for _ in range(2):
        student, teacher, labels = pair(v=1031)
        loss = kd_loss(student, teacher, labels, divergence=name, ce_weight=0.5, backend=backend)
        loss.backward()
        results.append((loss.detach(), student.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_plus_infinity_is_a_nan_as_in_torch(backend, side, name):
    student, teacher, _ = pair()
    student = student.detach()
    (student if side == "student" else teacher)[1, 4] = INF
    student.requires_grad_()
    loss = kd_loss(student, teacher, divergence=name, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_masks_with_the_lowest_number(backend, side, name, dtype):
    """A mask that is no infinity, on one side only: the loss may be huge, its gradient is finite
    wherever fp64 can hold it."""
    student, teacher, _ = pair(dtype=dtype)
    student = student.detach()
    (student if side == "student" else teacher)[:, 5:20] = torch.finfo(dtype).min
    student.requires_grad_()
    loss = kd_loss(student, teacher, divergence=name, backend=backend)
    loss.backward()
    assert not loss.isnan() and student.grad.isfinite().all()


def test_true_vocabulary(backend):
    student, teacher, labels = pair(v=40)
    wider = torch.cat([teacher, torch.full((4, 9), 50.0)], dim=1)
    labels.clamp_(max=36)
    with pytest.raises(ValueError, match=r"student has 40 .* teacher 49.*vocab_size"):
        kd_loss(student, wider, backend=backend)
    loss = kd_loss(student, wider, labels, vocab_size=37, ce_weight=1.0, backend=backend)
    loss.backward()
    small = kd_loss(student[:, :37], teacher[:, :37], labels, ce_weight=1.0, backend=backend)
    torch.testing.assert_close(loss, small)
    assert (student.grad[:, 37:] == 0).all() and (student.grad[:, :37] != 0).any()


def test_large_temperature_law(backend):
    student, teacher, _ = pair(n=3, v=50, scale=0.5)
    kd_loss(student, teacher, temperature=50.0, reduction="sum", backend=backend).backward()
    gap = student.detach() - teacher
    want = (gap - gap.mean(-1, keepdim=True)) / 50
    assert (student.grad - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("temperature", [0.01, 1000.0])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_temperatures_and_gaps(backend, name, temperature):
    student, teacher, _ = pair(scale=60.0)
    loss = kd_loss(student, teacher, divergence=name, temperature=temperature, backend=backend)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_rows_beyond_two_to_the_31(backend):
    if backend != "cpu":
        pytest.skip("the reference copies its rows to fp64; the interpreter is too slow for this")
    store = torch.empty(1 << 32, dtype=torch.bfloat16)  # pages that nobody touches cost nothing
    stride = (1 << 31) - 1000
    near, teacher, _ = pair(n=3, v=500, dtype=torch.bfloat16)
    far = store.as_strided((2, 500), (stride, 1))
    far.copy_(near.detach()[:2])
    loss = kd_loss(far, teacher[:2], backend=backend)
    assert torch.equal(loss, kd_loss(near[:2], teacher[:2], backend=backend).detach())


def test_small_fp16_gradients_survive(backend):
    student, teacher, _ = pair(n=16, v=200, dtype=torch.float16, scale=0.5)
    keywords = {"normalizer": 2048.0}  # as in a long batch
    kd_loss(student, teacher, **keywords, backend=backend).mul(65536.0).backward()
    exact = student.detach().double().requires_grad_()
    kd_loss(exact, teacher.double(), **keywords, backend="reference").mul(65536.0).backward()
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2e-3


def head(n=6, v=53, h=8, seed=0, dtype=torch.float32, grad=True):
    options = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    device = torch.get_default_device()
    hidden, weight = torch.randn(n, h, **options), torch.randn(v, h, **options)
    return LMHead(*(x.to(device, dtype).requires_grad_(grad) for x in (hidden, weight)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_head_makes_no_weight_gradient(backend, reduction, monkeypatch):
    student, teacher = head(), head(seed=1, h=5, grad=False)
    student.weight.requires_grad_(False)
    module = backends.load(backend)
    shapes, mm_ = [], module.mm_
    monkeypatch.setattr(
        module, "mm_", lambda out, *a, **k: (shapes.append(out.shape), mm_(out, *a, **k))
    )
    kd_loss(student, teacher, reduction=reduction, backend=backend).sum().backward()
    assert student.hidden.grad is not None and torch.Size((53, 8)) not in shapes
    shapes.clear()
    with torch.no_grad():
        kd_loss(student, teacher, reduction=reduction, backend=backend)
    assert shapes == [torch.Size((6, 53))] * 2


def test_chunks_hold_what_they_may(backend):
    student, teacher = head(n=50), head(n=50, seed=1, grad=False)
    results = []
    for chunk_bytes in (None, 2000):
        loss = kd_loss(student, teacher, chunk_bytes=chunk_bytes, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (student.hidden, student.weight))))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(backend, name):
    if backend == "triton":
        pytest.skip("thousands of calls are too slow in the interpreter")
    student, teacher, labels = pair(n=2, v=5, dtype=torch.float64, scale=1.0)
    torch.autograd.gradcheck(
        lambda s: kd_loss(
            *(s, teacher, labels),
            divergence=name,
            temperature=1.7,
            ce_weight=0.5,
            label_smoothing=0.1,
            backend=backend,
        ),
        student,
    )


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace Triton's interpreter")
def test_compiles_whole(backend):
    student, teacher, labels = pair()
    heads = head(), head(seed=1, grad=False)

    def losses(student, teacher, labels):
        dense, metrics = kd_loss_and_metrics(
            student, teacher, labels, ce_weight=0.5, backend=backend
        )
        made = kd_loss(*heads, divergence="jsd", reduction="none", backend=backend)
        return dense + made.sum() + 0 * metrics.kd

    eager = losses(student, teacher, labels)
    want = torch.autograd.grad(eager, (student, heads[0].weight))
    compiled = torch.compile(losses, fullgraph=True)(student, teacher, labels)
    got = torch.autograd.grad(compiled, (student, heads[0].weight))
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(got, want)


def test_autocast_casts_heads(backend):
    if INTERPRETED:
        pytest.skip("autocast of CPU tensors is tested with the CPU's backends")
    student, teacher = head(), head(seed=1, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd_loss(student, teacher, reduction="none", backend=backend)
    loss.sum().backward()
    assert student.weight.grad.dtype == torch.float32
    exact = kd_loss(student, teacher, reduction="none", backend=backend)
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.1)
    assert not torch.equal(loss, exact)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(backend, reentrant):
    student, teacher, _ = pair()
    want = torch.autograd.grad(kd_loss(student, teacher, backend=backend), student)[0]
    loss = checkpoint(
        lambda s: kd_loss(s, teacher, backend=backend), student, use_reentrant=reentrant
    )
    loss.backward()
    torch.testing.assert_close(student.grad, want)


@pytest.mark.parametrize("form", ["dense", "inplace", "tokens", "head", "head of tokens"])
def test_functional_gradients(backend, form):
    student, teacher, _ = pair()
    made = head(n=4, v=37, grad=False)
    reduction = "none" if "tokens" in form else "mean"
    keywords = {"reduction": reduction, "inplace": form == "inplace", "backend": backend}

    def loss(x):
        answer = LMHead(x, made.weight) if "head" in form else x
        return (kd_loss(answer, teacher, **keywords) * 3.0).sum()

    x = made.hidden if "head" in form else student.detach()
    want = torch.autograd.grad(loss(y := x.clone().requires_grad_()), y)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.clone()), want)


def test_no_second_derivative(backend):
    student, teacher, _ = pair()
    loss = kd_loss(student, teacher, backend=backend)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()


def test_inplace_reuses_the_logits(backend):
    student, teacher, _ = pair()
    want = torch.autograd.grad(kd_loss(student, teacher, backend=backend), student)[0]
    logits = student * 1
    pointer = logits.data_ptr()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    kd_loss(logits, teacher, inplace=True, backend=backend).backward()
    assert seen == [pointer]
    torch.testing.assert_close(student.grad, want)


def test_beta_may_change_every_step(backend):
    student, teacher, _ = pair()
    for beta in (0.1, 0.35, 0.9):
        loss = kd_loss(student, teacher, divergence=divergences.jsd(beta), backend=backend)
        exact = kd_loss(
            student.double(),
            teacher.double(),
            divergence=divergences.jsd(beta),
            backend="reference",
        )
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------
# errors, and what needs no backend

S, T, Y = torch.zeros(3, 7), torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64)
WRONG = {
    "temperature": ({"temperature": 0.0}, "temperature=0.0.*above 0"),
    "teacher_temperature": ({"teacher_temperature": -1}, "teacher_temperature=-1"),
    "divergence": ({"divergence": "forward-kl"}, "forward-kl.*forward_kl"),
    "reduction": ({"reduction": "avg"}, "reduction='avg'.*'mean'"),
    "backend": ({"backend": "cuda"}, "backend='cuda'.*'triton'"),
    "ce_weight": ({"labels": None, "ce_weight": 1.0}, "ce_weight.*labels"),
    "label": ({"labels": Y + 7}, "labels holds 7.*0 to 6"),
    "dtype": ({"labels": Y.int()}, "labels is torch.int32.*int64"),
    "shape": ({"labels": Y[:2]}, r"labels has shape \(2,\).*\(3,\)"),
    "weights": ({"token_weights": torch.ones(2)}, r"token_weights has shape \(2,\)"),
    "vocab_size": ({"vocab_size": 8}, "vocab_size=8.*1 to 7"),
    "smoothing": ({"label_smoothing": 2.0}, "label_smoothing=2.0"),
    "teacher": ({"teacher": T.clone().requires_grad_()}, "teacher.*require grad.*detach"),
    "leading": ({"teacher": T[:2]}, r"leading shape \(3,\).*\(2,\)"),
    "integer": ({"student": S.long()}, "student is torch.int64"),
    "type": ({"student": [1.0]}, "student is a list.*LMHead"),
    "normalizer": ({"normalizer": -1.0}, "normalizer=-1.0"),
    "inplace": (
        {"student": torch.zeros(7, 3).T.requires_grad_(), "inplace": True},
        "inplace.*contiguous",
    ),
    "flag": ({"inplace": "yes"}, "inplace='yes'.*True or False"),
    "t2": ({"scale_by_t2": 1}, "scale_by_t2=1.*True or False"),
    "ignore_index": ({"ignore_index": 2**70}, "ignore_index=1180591620717411303424.*-100"),
    "chunk_bytes": ({"chunk_bytes": True}, "chunk_bytes=True.*int"),
    "none": ({"reduction": "none", "normalizer": 3}, "normalizer.*reduction='none'"),
    "scale": ({"student": LMHead(S, T, logit_scale=True)}, "logit_scale=True.*number"),
    "head": ({"student": LMHead(S, T.T)}, r"hidden has shape \(3, 7\) and weight \(7, 3\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_to_do(case):
    change, message = WRONG[case]
    call = {"student": S, "teacher": T, "labels": Y, "backend": "reference"} | change
    with pytest.raises((ValueError, TypeError), match=message):
        kd_loss(**call)


def test_module_and_pickling():
    loss = KDLoss(divergence=divergences.jsd(0.3), temperature=2.0)
    again = pickle.loads(pickle.dumps(loss))
    student, teacher, _ = pair()
    assert torch.equal(again(student, teacher), copy.deepcopy(loss)(student, teacher))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temprature": 2.0}, r"KDLoss\(\).*temprature.*temperature"),
        ({"backend": "cuda"}, "backend='cuda'.*'triton'"),
        ({"vocab_size": "many"}, "vocab_size='many'.*int"),
        ({"reduction": "none", "normalizer": 3}, "normalizer.*reduction='none'"),
    ],
)
def test_the_module_checks_when_it_is_made(keywords, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KDLoss(**keywords)


def test_metrics_take_the_same_keywords():
    with pytest.raises(TypeError, match=r"kd_loss_and_metrics\(\).*temprature.*temperature"):
        kd_loss_and_metrics(S, T, temprature=2.0)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_jsd_has_no_ends(end):
    with pytest.raises(ValueError, match="forward_kl"):
        divergences.jsd(end)


def test_import_is_light():
    code = (
        "import sys, fusedkd\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('triton', 'transformers')]\n"
        "assert not bad, bad\n"
        "assert not any('_native' in line for line in open('/proc/self/maps'))\n"
        "import transformers"
    )
    children.python(code)


def test_fp16_holds_what_its_weights_cancel(backend: str, device: torch.device) -> None:
    """The mean divides by the weights, so their size must not matter, however little fp16 holds."""
    torch.manual_seed(0)
    raw, teacher = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device).half()
    found = []
    for weight in (1.0, 3e5, 1e-8):
        student = raw.half().requires_grad_()
        weights = torch.full((4,), weight, device=device)
        loss = kd_loss(student, teacher, token_weights=weights, backend=backend)
        found.append(torch.autograd.grad(loss, student)[0])
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0], rtol=2e-3, atol=1e-6)


def test_fp16_head_adds_tokens_up_in_fp32(backend: str, device: torch.device) -> None:
    """Thousands of equal tokens: their sum passes 65,504, their mean does not."""
    n = 20_000 if device.type == "cuda" or backend != "triton" else 64
    size = 10.0 * 20_000 / n
    hidden = torch.full((n, 2), size, device=device).half()
    weight = torch.zeros(3, 2, device=device).half().requires_grad_()
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    heads = LMHead(hidden, weight), torch.zeros(n, 3, device=device).half()
    loss = kd_loss(*heads, labels, ce_weight=1.0, kd_weight=0.0, backend=backend)
    grad = torch.autograd.grad(loss, weight)[0]
    expected = size * torch.tensor([[-2 / 3], [1 / 3], [1 / 3]], device=device).expand(3, 2)
    assert grad.dtype == torch.float16
    torch.testing.assert_close(grad.float(), expected, rtol=2e-3, atol=0.0)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace Triton's interpreter")
def test_compiles_whole_without_a_gradient_and_for_other_numbers(
    backend: str, device: torch.device
) -> None:
    student, teacher = torch.randn(2, 4, 11, device=device)

    def loss(x: torch.Tensor, number: float) -> torch.Tensor:
        chosen = divergences.jsd(number)
        return kd_loss(x, teacher, divergence=chosen, temperature=1 + number, backend=backend)

    for wanted in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        x = student.clone().requires_grad_(wanted)
        with torch._dynamo.config.patch(recompile_limit=2):  # a third graph is an error
            for number in (0.1, 0.2, 0.3, 0.4, 0.5):
                torch.testing.assert_close(compiled(x, number), loss(x, number))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, 0.3), loss(x, 0.3))
