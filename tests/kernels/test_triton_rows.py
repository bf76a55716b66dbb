"""The Triton kernels at shapes that cross every boundary of the launch table, against the oracle.

They run where triton does: on a GPU, or in its interpreter in the child process that
``test_interpreter.py`` starts. Small launches stand in for the table's, so that a few hundred
columns make several tiles and several pieces; the table's own run at their smallest vocabularies.
"""

from __future__ import annotations

import math
import warnings

import budget
import pytest
import torch
from oracle import FORMULAS, Case
from own_divergences import OWN

from fusedkd import LMHead, backends, divergences, kd_loss, kd_loss_and_metrics, loss

if reason := backends.load("triton").unavailable():
    pytest.skip(reason, allow_module_level=True)

from fusedkd.kernels.triton import config, launches, tally
from fusedkd.kernels.triton import device as machine
from fusedkd.spec import LossSpec

NAMES = divergences.names()
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# One warp takes 256 columns of a 2-byte type per tile, 128 of fp32, 64 of fp64.
ONE_WARP = config.Launch(pieces=1, warps=1, unroll=1)
TILE = {BF16: 256, FP16: 256, FP32: 128, FP64: 64}
KEYWORDS = {
    "temperature": {"temperature": 1.0},
    "power": {"temperature": 3.7},
    "teacher_temperature": {"teacher_temperature": 0.7},
    "kd_weight": {"kd_weight": 0.0},
    "ce_weight": {"ce_weight": 0.0},
    "scale_by_t2": {"scale_by_t2": False},
    "ignore_index": {"ignore_index": 3},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss_weight": {"z_loss_weight": 0.3},
    "z-loss alone": {"z_loss_weight": 0.3, "ce_weight": 0.0, "temperature": 3.7},
    "reduction": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": 7.5},
    "vocab_size": {"vocab_size": 600},
    "inplace": {"inplace": True},
}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if machine.INTERPRETED else "cuda")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Launch every row kernel like this from now on."""
    return lambda launch: monkeypatch.setattr(config, "choose", lambda *_: launch)


def pieces(n: int) -> config.Launch:
    return config.Launch(pieces=n, warps=1, unroll=1)


def check(case: Case, metrics: bool = False) -> None:
    budget.check(case, "triton", metrics)


# ----------------------------------------------------------------------------------------------
# every divergence


def with_rest(lp: torch.Tensor, lq: torch.Tensor, *, a: float = 2.0) -> torch.Tensor:
    """Reverse KL, times a number, and what is none of the student's."""
    q = lq.exp()
    return a * torch.where(q > 0, q * (lq - lp), 0.0) + a * lp.exp()


FORMULAS.update({f"own_{name}": FORMULAS[name] for name in OWN})
FORMULAS["with_rest"] = lambda lp, lq, a: a * lq.exp() * (lq - lp) + a * lp.exp()


@pytest.mark.parametrize("name", ["jsd", "alpha", "with_rest"])
def test_of_ones_own(use, device: torch.device, name: str) -> None:
    """Its forms in every structure: summed in a sweep, and those that statistics give."""
    with warnings.catch_warnings(action="ignore"):
        own = OWN[name](0.3) if name in OWN else divergences.custom(with_rest)(a=0.7)
    for i, launch in enumerate((ONE_WARP, pieces(2))):
        use(launch)
        keywords = {"divergence": own, "ce_weight": 0.5 * i, "label_smoothing": 0.1 * i}
        check(budget.plain_case(i, device, 2, 515, (BF16, FP32)[i], **keywords), metrics=i == 1)


@pytest.mark.parametrize("name", NAMES)
def test_around_a_tile(use, device: torch.device, name: str) -> None:
    """One below, at and above one tile, and several; N = 1; the dtypes in turn; odd rows are
    misaligned."""
    use(ONE_WARP)
    dtype = list(TILE)[NAMES.index(name) % len(TILE)]
    for v in (TILE[dtype] - 1, TILE[dtype], TILE[dtype] + 1):
        n = 1 if v == TILE[dtype] else 3
        check(budget.plain_case(v, device, n, v, dtype, divergence=name), metrics=n == 1)
    check(budget.plain_case(5, device, 2, 5 * 256 + 3, BF16, divergence=name))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_pieces(use, device: torch.device, name: str) -> None:
    """Fewer tiles than pieces, and more; N = 1; with and without labels."""
    few = NAMES.index(name) % 2
    for count, v, n in ((2, (255, 513)[few], 3), (4, 4 * 256 + 1, 1)):
        use(pieces(count))
        labels = {"ce_weight": 0.0} if n == 1 else {}
        dtype = (BF16, FP16, FP32)[NAMES.index(name) % 3]
        check(budget.plain_case(v, device, n, v, dtype, divergence=name, **labels), metrics=n == 1)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "alpha"])
def test_programs_that_wait_for_one_another(use, device: torch.device, name: str) -> None:
    """On a GPU in one launch; in the interpreter, where nothing runs at once, in three."""
    use(config.Launch(pieces=2, warps=1, unroll=2, joint=True))
    check(budget.plain_case(1, device, 3, 3 * 512 + 13, BF16, divergence=name), metrics=True)


@pytest.mark.parametrize("name", NAMES)
def test_masked_entries(use, device: torch.device, name: str) -> None:
    """-inf on either side and on both, in the main part and at the edges, next to rows without."""
    use((ONE_WARP, pieces(2))[NAMES.index(name) % 2])
    case = budget.plain_case(0, device, 4, 533, BF16, divergence=name)
    student, teacher = case.student.detach(), case.teacher
    for rows, columns in ((1, slice(100, 180)), (1, slice(520, 533)), (2, slice(0, 3))):
        student[rows, columns] = teacher[rows, columns] = -math.inf
    teacher[3, 7], labels = -math.inf, case.labels.clamp(200, 500)
    answers = []
    for backend in ("triton", "reference"):
        s = student.clone().requires_grad_()
        options = {"divergence": name, "ce_weight": 0.5, "reduction": "none", "backend": backend}
        loss = kd_loss(s, teacher, labels, **options)
        loss.backward(torch.ones_like(loss))
        answers.append((loss.detach().float(), s.grad))
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=2**-7, atol=1e-6)
    assert (answers[0][1][student == -math.inf] == 0).all()


# ----------------------------------------------------------------------------------------------
# every keyword and form


@pytest.mark.parametrize("launch", [ONE_WARP, pieces(2)], ids=["whole", "pieces"])
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_each_keyword(use, device: torch.device, keyword: str, launch: config.Launch) -> None:
    use(launch)
    closed = (launch.pieces + list(KEYWORDS).index(keyword)) % 2
    name = ("jsd", "mixed_kl")[closed]
    case = budget.plain_case(closed, device, 3, 611, BF16, divergence=name, **KEYWORDS[keyword])
    case.labels[1] = case.keywords.get("ignore_index", 5)
    case.labels.clamp_(max=599)
    check(case, metrics=bool(closed))


@pytest.mark.parametrize("launch", [ONE_WARP, pieces(4)], ids=["whole", "pieces"])
def test_token_weights(use, device: torch.device, launch: config.Launch) -> None:
    """Rows of weight 0 hold NaN, and are neither read nor left unwritten."""
    use(launch)
    case = budget.plain_case(1, device, 4, 1311, BF16)
    case.keywords["token_weights"] = torch.tensor([2.0, 0.0, 0.3, 0.0], device=device)
    check(case, metrics=True)
    student = case.student.detach().clone()
    student[1::2] = math.nan
    student.requires_grad_()
    loss = kd_loss(student, case.teacher, case.labels, **case.keywords, backend="triton")
    loss.backward()
    assert loss.isfinite() and (student.grad[1::2] == 0).all() and (student.grad[0] != 0).any()


@pytest.mark.parametrize("form", ["head", "student head", "teacher head"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_heads(use, device: torch.device, form: str, dtype: torch.dtype) -> None:
    """Heads on one side or both, in chunks, with bias, scale and softcap, the divergences in turn;
    the gradient may be narrower than the logits it comes of."""
    first = ["head", "student head", "teacher head"].index(form)
    for i, name in enumerate(NAMES[first :: 3 if dtype == BF16 else 4]):
        use((ONE_WARP, pieces(2))[i % 2])
        case = budget.plain_case(i, device, 5, 523, dtype, divergence=name)
        g = torch.Generator().manual_seed(i)

        def head(width: int, g: torch.Generator = g, grad: bool = False) -> LMHead:
            parts = (torch.randn(s, generator=g) for s in ((5, width), (523, width), (523,)))
            return LMHead(
                *(x.to(device, dtype).requires_grad_(grad) for x in parts),
                logit_scale=0.5,
                softcap=(None, 7.0)[width % 2],
            )

        if form != "teacher head":
            case.student, case.wanted = head(8, grad=True), ["hidden", "weight", "bias"]
        if form != "student head":
            case.teacher = head(5)
        case.keywords["chunk_bytes"] = (None, 523 * 12)[i % 2]
        check(case)


# ----------------------------------------------------------------------------------------------
# the table, layouts, and the rest


@pytest.mark.parametrize("entry", launches.TABLE, ids=lambda e: f"below {e.below}, few {e.few}")
def test_the_table(device: torch.device, monkeypatch, entry: launches.Entry) -> None:
    """Each entry at the smallest vocabulary that it serves, an odd one; N = 1 and 2."""
    floor = max((e.below for e in launches.TABLE if e.below and e is not entry), default=0)
    v = (entry.below or floor) - 1 if entry.below else floor + 1
    monkeypatch.setattr(machine, "processors", lambda _: 132 if entry.few else 1)
    for n, name in ((1, "forward_kl"), (2, "jsd")):
        launch = config.choose(n, v, 132 if entry.few else 1)
        assert (launch.warps, launch.pieces > 1) == (entry.warps, bool(entry.piece))
        check(budget.plain_case(n, device, n, v, BF16, divergence=name))


@pytest.mark.parametrize("launch", [ONE_WARP, pieces(2)], ids=["whole", "pieces"])
@pytest.mark.parametrize("shift", [0, 1, 8])
def test_misaligned_sides(use, device: torch.device, launch: config.Launch, shift: int) -> None:
    """A teacher at another distance from a 16-byte boundary, rows of another length and dtype."""
    use(launch)
    case = budget.plain_case(shift, device, 3, 531, BF16)
    wide = torch.full((3, 540 + shift), math.nan, dtype=FP32, device=device)
    wide[:, shift : shift + 531] = case.teacher
    case.teacher = wide[:, shift : shift + 531]
    check(case)


def test_rows_beyond_two_to_the_31(use, device: torch.device) -> None:
    """Row offsets are 64 bits wide, in both structures."""
    store = torch.empty((1 << 31) + 2048, dtype=BF16, device=device)  # untouched pages are free
    case = budget.plain_case(0, device, 2, 515, BF16)
    far = store.as_strided((2, 515), ((1 << 31) + 1003, 1))  # as (mis)aligned as 515
    far.copy_(case.teacher)
    for launch in (ONE_WARP, pieces(2)):
        use(launch)
        for student, teacher, near in (
            (case.student.detach(), far, (case.student.detach(), case.teacher)),
            (far, case.student.detach(), (case.teacher, case.student.detach())),
        ):
            found = kd_loss(student, teacher, backend="triton")
            assert torch.equal(found, kd_loss(*near, backend="triton"))


def test_pieces_agree(use, device: torch.device) -> None:
    """The same statistics however a row is cut; twice the same bits."""
    case = budget.plain_case(3, device, 1, 8 * 128 + 77, FP32, divergence="jsd")
    found = []
    for launch in (ONE_WARP, pieces(2), pieces(8), pieces(8)):
        use(launch)
        loss, metrics = kd_loss_and_metrics(
            case.student, case.teacher, case.labels, **case.keywords, backend="triton"
        )
        found.append((loss, metrics, torch.autograd.grad(loss, case.student)[0]))
    for other in found[1:3]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)
    assert torch.equal(found[2][0], found[3][0]) and torch.equal(found[2][2], found[3][2])


def test_no_gradient_is_computed(use, device: torch.device) -> None:
    for launch in (ONE_WARP, pieces(4)):
        use(launch)
        case = budget.plain_case(4, device, 2, 1027, BF16)
        arguments = (case.student, case.teacher, case.labels)
        want = kd_loss(*arguments, **case.keywords, backend="triton").detach()
        with torch.no_grad():
            assert torch.equal(kd_loss(*arguments, **case.keywords, backend="triton"), want)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_scale(device: torch.device, dtype: torch.dtype) -> None:
    """Sizes around a tile, views, one factor or one per row; a factor of 1 changes no bit."""
    scale_ = backends.load("triton").scale_
    for columns in (1, 2047, 2048, 2049):
        x = torch.randn(2, 3, columns, device=device).to(dtype)[:, 1:]
        for factor in (torch.tensor(1.0), torch.tensor(0.3), torch.tensor([0.5, 1.0, 3.0, 0.0])):
            got = x.clone() if factor.dim() else x.contiguous()
            wide = FP64 if dtype == FP64 else FP32
            by = factor.to(device, wide)
            scale_(got, by)
            assert torch.equal(got, (x * (by.view(2, 2, 1) if by.dim() else by).to(wide)).to(dtype))


@pytest.mark.parametrize("n", [1, tally.BLOCK - 1, 2 * tally.BLOCK + 3])
def test_weights_and_sums_of_any_number_of_rows(n: int, device: torch.device) -> None:
    labels = torch.arange(n, device=device) % 3 - 1
    values, answer = torch.empty(n, device=device), torch.empty(2, device=device)
    about = {"labels": labels, "rows": n, "vocab": 2, "ignore_index": -1, "mean": 1}
    about["values"] = values
    tally.launcher()((1, 1), {**about, "answer": answer[0], "after": 0})
    counts = (labels != -1).float()
    torch.testing.assert_close(values, counts / counts.sum().clamp(min=1), rtol=1e-7, atol=0)
    values.copy_(torch.rand(n))
    tally.launcher()((1, 1), {**about, "answer": answer[1], "after": 1})
    torch.testing.assert_close(answer[1], values.double().sum().float(), rtol=1e-7, atol=0)
    assert answer[0] == 1
    tally.launcher()((1, 1), {**about, "answer": answer[0], "after": 0, "vocab": 1})
    assert answer[0] == (n < 3)  # the label 1 is wrong then


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [BF16, FP64])
def test_a_call_from_labels_to_its_loss(
    reduction: str, dtype: torch.dtype, device: torch.device
) -> None:
    student, teacher = torch.randn(2, 7, 300, dtype=FP64).to(device, dtype)
    labels = torch.arange(7, device=device) - 1
    spec = LossSpec(
        divergences.make("forward_kl"), 1, ce_weight=0.5, ignore_index=-1, reduction=reduction
    )
    made = tally.reduced(spec)(student, teacher, labels, True)
    assert made is not None
    keywords = {"ce_weight": 0.5, "ignore_index": -1, "reduction": reduction}
    wide = student.double().requires_grad_()
    want = kd_loss(wide, teacher.double(), labels, backend="reference", **keywords)
    want.backward()
    loss, grad = made
    assert loss.dtype == (FP64 if dtype == FP64 else FP32)
    close = 1e-12 if dtype == FP64 else 1e-6
    torch.testing.assert_close(loss.double(), want.detach(), rtol=close, atol=close)
    rounding = 1e-12 if dtype == FP64 else 2.0**-8
    torch.testing.assert_close(grad.double(), wide.grad, rtol=rounding, atol=1e-9)


@pytest.mark.parametrize("labels", [None, [-1, -1]])
def test_a_call_without_labels_or_with_none_that_counts(
    labels: list[int] | None, device: torch.device
) -> None:
    student, teacher = torch.randn(2, 2, 5, device=device)
    spec = LossSpec(divergences.make("jsd"), 1, ignore_index=-1)
    of = None if labels is None else torch.tensor(labels, device=device)
    loss, grad = tally.reduced(spec)(student, teacher, of, False)
    want = kd_loss(student, teacher, of, divergence="jsd", ignore_index=-1, backend="reference")
    torch.testing.assert_close(loss, want)
    assert grad is None and (labels is None) == (loss != 0)


@pytest.mark.skipif(not machine.INTERPRETED, reason="an assertion there, which ends the context")
@pytest.mark.parametrize("label", [-2, 5, 2**31])
def test_a_wrong_label_is_left_to_the_general_way(label: int) -> None:
    student, teacher = torch.randn(2, 2, 5)
    spec = LossSpec(divergences.make("forward_kl"), 1, ignore_index=-1)
    assert tally.reduced(spec)(student, teacher, torch.tensor([-1, label]), True) is None


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP16), (FP64, FP32)])
def test_plain_logits_take_the_short_way(
    dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = (torch.randn(2, 3, 301, device=device).to(dtype) for dtype in dtypes)
    labels = torch.arange(6, device=device).view(2, 3)

    def answer() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = student.detach().requires_grad_()
        keywords = {"ce_weight": 0.5, "ignore_index": 4, "temperature": 2.0, "backend": "triton"}
        value = kd_loss(leaf, teacher, labels, **keywords)
        return value.detach(), torch.autograd.grad(1.7 * value, leaf)[0]

    with monkeypatch.context() as patched:  # the general way starts there
        patched.setattr(loss.Call, "of", None)
        short = answer()
    monkeypatch.setattr(loss, "direct_loss", lambda given: None)
    general = answer()
    eps = torch.finfo(general[0].dtype).eps
    torch.testing.assert_close(short[0], general[0], rtol=2 * eps, atol=0)
    torch.testing.assert_close(short[1].double(), general[1].double(), rtol=4 * eps, atol=0)
