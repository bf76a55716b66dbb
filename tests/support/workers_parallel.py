"""Vocabulary-parallel calls beside the same call on whole tensors. Run by test_parallel.py."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import processes
import torch
import torch.distributed as dist
from own_rules import of_everything
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fusedkd import (
    LMHead,
    SparseTeacher,
    divergences,
    fp16,
    kd_loss_and_metrics,
    sampled_kd_loss_and_metrics,
    token_log_probs,
    top_k,
)

fp16.SCRATCH_BYTES["cpu"] = 600  # so that these few rows are several chunks

N, V, H = 9, 53, 6
# how many columns each rank has: uneven, and with one that has none
SPLITS = {2: [20, 33], 3: [7, 46, 0]}


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = {"s": (N, V), "t": (N, V), "hs": (N, H), "ws": (V, H), "bs": (V,), "ht": (N, H + 3)}
    shapes |= {"wt": (V, H + 3), "bt": (V,)}
    values = {name: torch.randn(shape, generator=make).to(dtype) for name, shape in shapes.items()}
    values["s"] *= 3
    values["labels"] = torch.randint(0, V, (N,), generator=make)
    values["labels"][[1, 4]] = -100
    values["weights"] = torch.rand(N, generator=make).to(dtype)
    values["weights"][5] = 0
    return values


def sparse(t: Tensor, tail: str, k: int = 7) -> SparseTeacher:
    log_probs, ids = t.float().log_softmax(-1).topk(k)
    ids[2, 3:] = -1
    return SparseTeacher(ids, log_probs, tail)


OPTIONS: dict[str, Any] = {"temperature": 2.0, "teacher_temperature": 1.5, "ce_weight": 0.4}
OPTIONS |= {"label_smoothing": 0.1}
Case = tuple[str, str, torch.dtype, dict[str, Any]]  # student, teacher, dtype, options


def cases() -> dict[str, Case]:
    wide, single = torch.float64, torch.float32
    cases_by_name: dict[str, Case] = {}
    for name in divergences.names():
        options = {**OPTIONS, "divergence": name}
        cases_by_name[f"dense {name}"] = ("dense", "dense", wide, options)
        cases_by_name[f"dense {name} fp32"] = ("dense", "dense", single, options)
        cases_by_name[f"heads {name}"] = ("head", "head", wide, {**options, "chunk_bytes": 5000})
        cases_by_name[f"bucket {name}"] = ("dense", "bucket", wide, options)
    for name in ("forward_kl", "total_variation"):
        for tail in ("drop", "renormalize"):
            options = {**OPTIONS, "divergence": name}
            cases_by_name[f"{tail} {name}"] = ("head", tail, single, options)
    for name in divergences.names():
        options = {**OPTIONS, "divergence": name}
        cases_by_name[f"generalized {name}"] = ("dense", "generalized", single, options)
        cases_by_name[f"conditional {name}"] = ("head", "conditional", wide, options)
    cases_by_name |= {
        "mixed": ("head", "dense", single, OPTIONS),
        "row rule": ("head", "bucket", wide, {**OPTIONS, "row_rule": of_everything(slope=0.3)}),
        "other mix": ("dense", "head", single, OPTIONS),
        "transforms": ("capped", "capped", wide, OPTIONS),
        "true vocabulary": ("dense", "dense", wide, {**OPTIONS, "vocab_size": 41}),
        "small vocabulary": ("head", "dense", wide, {**OPTIONS, "vocab_size": 5}),
        "none": ("head", "head", wide, {**OPTIONS, "reduction": "none"}),
        "dense none": ("dense", "dense", wide, {**OPTIONS, "reduction": "none"}),
        "sum": ("dense", "dense", wide, {**OPTIONS, "reduction": "sum"}),
        "normalizer": ("head", "head", wide, {**OPTIONS, "normalizer": 30.0}),
        "half": ("head", "head", torch.bfloat16, OPTIONS),
        "half dense": ("dense", "dense", torch.float16, OPTIONS),
        "in place": ("dense", "dense", single, {**OPTIONS, "inplace": True}),
        "masked": ("masked", "masked", wide, {**OPTIONS, "label_smoothing": 0.0}),
        "apart": ("apart", "dense", wide, {**OPTIONS, "divergence": "jsd"}),
        "apart fp32": ("apart", "dense", single, {**OPTIONS, "divergence": "jsd"}),
        "apart reverse": ("apart", "dense", single, {**OPTIONS, "divergence": "reverse_kl"}),
        "z-loss": ("dense", "dense", wide, {**OPTIONS, "z_loss_weight": 0.2}),
        "z-loss of a head": ("head", "bucket", wide, {**OPTIONS, "z_loss_weight": 0.2}),
        "z-loss fp16": ("dense", "drop", torch.float16, {**OPTIONS, "z_loss_weight": 0.2}),
        "z-loss alone": ("capped", "dense", wide, {"labels": None, "z_loss_weight": 0.2}),
        "no labels": ("dense", "dense", wide, {"labels": None, "divergence": "jsd"}),
        "nothing counted": ("dense", "dense", wide, {**OPTIONS, "weights": 0}),
        "no tokens": ("head", "head", wide, {**OPTIONS, "rows": 0}),
    }
    return cases_by_name


def sides(case: Case) -> tuple[dict[str, Tensor], Any, Any]:
    """The whole tensors, and functions from them to the student and the teacher."""
    student, teacher, dtype, options = case
    x = tensors(dtype)
    for name in ("s", "t", "hs", "ht"):  # of a token whose weight is 0
        x[name][5] = torch.nan
    if student == "apart":  # p and q hardly meet
        x["s"][::2, 3], x["t"][::2, 40] = 60.0, 60.0
    if "masked" in (student, teacher):
        for name in ("s", "t"):
            x[name][:, 11:30] = -torch.inf
        x["labels"].clamp_(max=9)
    x["labels"] = x["labels"].clamp(max=options.get("vocab_size", V) - 1)
    if "rows" in options:
        x = {
            n: t[: options["rows"]] if n not in ("ws", "bs", "wt", "bt") else t
            for n, t in x.items()
        }
    scale = (0.7, 4.0) if student == "capped" else (1.0, None)

    def make_student(x: dict[str, Any]) -> Any:
        if student in DENSE:
            return x["s"]
        return LMHead(x["hs"], x["ws"], x["bs"], *scale)

    def make_teacher(x: dict[str, Any]) -> Any:
        if teacher in ("dense", "masked"):
            return x["t"]
        if teacher in ("head", "capped"):
            return LMHead(x["ht"], x["wt"], x["bt"], *scale)
        return sparse(tensors(dtype)["t"], teacher)

    return x, make_student, make_teacher


DENSE = ("dense", "masked", "apart")
VOCABULARY = {"s": 1, "t": 1, "ws": 0, "bs": 0, "wt": 0, "bt": 0}  # which dimension is split


def run(
    x: dict[str, Any], make: tuple[Any, Any], case: Case, group: Any, backend: str = "reference"
) -> tuple[Any, ...]:
    options = {k: v for k, v in case[3].items() if k not in ("weights", "rows", "labels")}
    student = [x[n] for n in (("s",) if case[0] in DENSE else ("hs", "ws", "bs"))]
    leaves = [t.requires_grad_() for t in student]
    # an in-place gradient must not be written over a leaf's own values
    called = {n: t * 1 if n == "s" and "inplace" in options else t for n, t in x.items()}
    labels = None if "labels" in case[3] else x["labels"]
    weights = x["weights"] * case[3].get("weights", 1)
    loss, metrics = kd_loss_and_metrics(
        *(make[0](called), make[1](called), labels),
        **options,
        token_weights=weights,
        group=group,
        backend=backend,
    )
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaves, upstream)


def mine(name: str, x: Tensor, rank: int, sizes: list[int]) -> Tensor:
    if name not in VOCABULARY:
        return x.clone()
    return x.split(sizes, VOCABULARY[name])[rank].clone()


def compare(
    case: Case,
    local: Callable[..., Any],
    whole: Callable[..., Any],
    group: Any,
    backend: str = "reference",
) -> None:
    x, *make = sides(case)
    want = run({n: t.clone() for n, t in x.items()}, make, case, None)
    got, again = (
        run({n: local(n, t) for n, t in x.items()}, make, case, group, backend) for _ in range(2)
    )
    torch.testing.assert_close(got, again, rtol=0, atol=0, equal_nan=True)
    names = ("s",) if case[0] in DENSE else ("hs", "ws", "bs")
    gradients = [whole(name, grad) for name, grad in zip(names, got[2], strict=True)]
    exact = case[2] == torch.float64 and case[1] not in ("bucket",)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 3e-5, "atol": 3e-6}
    if case[2].itemsize == 2:
        tolerance = {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(got[:2], want[:2], equal_nan=True, **tolerance)
    torch.testing.assert_close(gradients, list(want[2]), **tolerance)


def failures(function: Callable[[str], None], names: Any) -> dict[str, str | None]:
    """What went wrong in each case, so that one does not hide the others."""
    values: dict[str, str | None] = {}
    for name in names:
        try:
            function(name)
            values[name] = None
        except Exception:
            values[name] = traceback.format_exc()
    return values


def plain(rank: int, backends: Sequence[str] = ("reference", "cpu")) -> dict[str, str | None]:
    sizes = SPLITS[dist.get_world_size()]

    def gathered(name: str, grad: Tensor) -> Tensor:
        if name not in VOCABULARY:
            return grad
        dim = VOCABULARY[name]
        shape = list(grad.shape)
        parts = []
        for size in sizes:
            shape[dim] = size
            parts.append(grad.new_empty(shape))
        for source, part in enumerate(parts):
            if source == rank:
                part.copy_(grad)
            dist.broadcast(part, source)
        return torch.cat(parts, dim)

    def one(name: str) -> None:
        backend, name = name.split(" ", 1)
        local = lambda n, t: mine(n, t, rank, sizes)  # noqa: E731
        compare(cases()[name], local, gathered, dist.group.WORLD, backend)

    return failures(one, [f"{b} {name}" for b in backends for name in cases()])


DTENSOR_CASES = ("dense jsd", "heads jsd", "bucket forward_kl", "mixed", "other mix", "none")


def dtensors(rank: int) -> dict[str, str | None]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def local(name: str, x: Tensor) -> Any:
        if name in VOCABULARY:
            return distribute_tensor(x, mesh, [Shard(VOCABULARY[name])])
        if name in ("hs", "ht"):  # one tensor parallel layer hands over shards, another copies
            return distribute_tensor(x, mesh, [Shard(0) if name == "hs" else Replicate()])
        return x.clone()

    def whole(name: str, grad: Any) -> Tensor:
        assert isinstance(grad, DTensor)
        return grad.full_tensor()

    return failures(lambda name: compare(cases()[name], local, whole, None), DTENSOR_CASES)


TOKEN_CASES = (
    "dense",
    "several dense",
    "head",
    "frozen",
    "several head",
    "sampled",
    "sampled head",
)


def tokens(rank: int) -> dict[str, str | None]:
    """Log-probabilities and sampled losses, of the columns here and of all."""
    sizes, world = SPLITS[dist.get_world_size()], dist.group.WORLD

    def call(name: str, x: dict[str, Tensor], group: Any, backend: str) -> tuple[Any, Any]:
        dense = "dense" in name or name == "sampled"
        leaves = [x[n] for n in (["s"] if dense else ["hs", "ws", "bs"])]
        trained = leaves[:1] if name == "frozen" else leaves
        for leaf in trained:
            leaf.requires_grad_()
        side = leaves[0] if dense else LMHead(*leaves, softcap=4.0)
        options: dict[str, Any] = {"chunk_bytes": 5000, "vocab_size": V - 4, "temperature": 1.5}
        options |= {"group": group, "backend": backend}
        ids = x["labels"].clamp(max=V - 5)
        if "sampled" in name:
            t = -x["weights"] * 5
            results: Any = sampled_kd_loss_and_metrics(side, t, ids, **options)
            return results, torch.autograd.grad(results[0], trained, torch.tensor(1.5).to(t))
        if "top" in name:
            top = top_k(side, 6, also=ids[:, None].clamp(min=-1), **options)
            return top, []
        if "several" in name:
            ids = torch.stack([ids, ids.flip(0), ids], -1)
        results = token_log_probs(side, ids, entropy=True, **options)
        ups = [torch.linspace(0.5, 2.0, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
        return results, torch.autograd.grad(results, trained, ups)

    def one(case: str) -> None:
        backend, name = case.split(" ", 1)
        x = tensors()
        names = ["s"] if "dense" in name or name == "sampled" else ["hs", "ws", "bs"]
        want = call(name, {n: t.clone() for n, t in x.items()}, None, backend)
        got = call(name, {n: mine(n, t, rank, sizes) for n, t in x.items()}, world, backend)
        torch.testing.assert_close(
            [y.detach() for y in _flat(got[0])], [y.detach() for y in _flat(want[0])]
        )
        for n, grad, whole in zip(names, got[1], want[1], strict=False):
            torch.testing.assert_close(grad[..., : whole.shape[-1]], mine(n, whole, rank, sizes))

    return failures(one, [f"{b} {name}" for b in ("reference", "cpu") for name in TOKEN_CASES])


def _flat(results: Any) -> list[Tensor]:
    return [y for x in results for y in (x if isinstance(x, tuple) else (x,))]


def messages(rank: int) -> dict[str, str]:
    """What the errors say; every rank raises, none waits for another."""
    x, group, world = tensors(), dist.group.WORLD, dist.get_world_size()
    sizes = SPLITS[world]
    s, t = (mine(n, x[n], rank, sizes) for n in ("s", "t"))
    other = mine("t", x["t"], rank, sizes[::-1])
    pairs = [dist.new_group([0]), dist.new_group([1])]
    calls = {
        "split": lambda: kd_loss_and_metrics(s, other, group=group),
        "size": lambda: kd_loss_and_metrics(s, t, group=group, vocab_size=V + 1),
        "type": lambda: kd_loss_and_metrics([1.0], t, group=group),  # type: ignore[arg-type]
        "label": lambda: kd_loss_and_metrics(s, t, x["labels"] + V, group=group),
        "groups": lambda: kd_loss_and_metrics(
            distribute_tensor(x["s"], init_device_mesh("cpu", (world,)), [Shard(1)]),
            *(t,),
            group=pairs[rank],
        ),
        "compiled": lambda: torch.compile(
            lambda a: kd_loss_and_metrics(a, t, group=group)[0], fullgraph=True, backend="eager"
        )(s),
    }
    values = {}
    for name, call in calls.items():
        try:
            call()
            values[name] = "no error"
        except Exception as error:
            values[name] = f"{type(error).__name__}: {error}"
    eager = kd_loss_and_metrics(s, t, group=group)[0]
    compiled = torch.compile(lambda a: kd_loss_and_metrics(a, t, group=group)[0], backend="eager")
    values["graph break"] = "same" if torch.equal(compiled(s), eager) else "another loss"
    return values


def interpreted(rank: int) -> dict[str, str | None]:
    return plain(rank, ["triton"])


def everything(rank: int) -> dict[str, Any]:
    values: dict[str, Any] = {"plain": plain(rank), "dtensors": dtensors(rank)}
    values["tokens"] = tokens(rank)
    if dist.get_world_size() == 2:
        values["messages"] = messages(rank)
    return values


if __name__ == "__main__":
    processes.main({"everything": everything, "interpreted": interpreted})
