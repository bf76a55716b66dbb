"""What the launchers hand to Triton, through Triton's own front door: binding, cache keys, compiler
and launcher. The driver at the end is not a GPU's and only writes down what it is asked to do, so
this runs anywhere; what it is asked to do has to be what benchmarks/resources.py compiles and
checks.
"""
# ruff: noqa: E402 (triton may be missing)

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is for Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process launches nothing", allow_module_level=True)

from triton.runtime import driver as active

from fusedkd import SparseTeacher, divergences
from fusedkd.benchmarks import resources
from fusedkd.distributions.sparse import canonical
from fusedkd.kernels import RowCall
from fusedkd.kernels.triton import config, device, lean, ops, rehearsal, sparse_ops
from fusedkd.kernels.triton.launches import JOINT
from fusedkd.spec import LossSpec

TARGET = "sm_90"


class _Launch(NamedTuple):
    source: Any  # triton.compiler.ASTSource
    warps: int
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


_devices = itertools.count(1 << 20)


class _Driver(rehearsal.Rehearsal):
    """Writes down what it is asked to launch."""

    def __init__(self) -> None:
        super().__init__(resources.TARGETS[TARGET])
        self.launches: list[_Launch] = []
        # what is compiled here must not be found by a launch on a true device, or by the next test
        self.device = next(_devices)

    def load_binary(self, name: str, binary: bytes, *rest: int) -> tuple[Any, ...]:
        assert binary[:4] == b"\x7fELF"
        return super().load_binary(name, binary, *rest)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            arguments = rest[-len(source.fn.params) :]
            self.launches.append(_Launch(source, metadata.num_warps, (x, y, z), arguments))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Launch]]:
    fake = _Driver()
    monkeypatch.setattr(device, "check", lambda x: None)
    monkeypatch.setattr(device, "processors", lambda _: 132)
    monkeypatch.setattr(device, "guard", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(active, "_active", fake)
    yield fake.launches


def _call(n: int, v: int, name: str, tail: str, temperature: float = 2.0) -> None:
    """A loss with a gradient, in bf16, against all logits or against three of them."""
    spec = LossSpec(divergences.make(name), v, ce_weight=0.5, temperature=temperature)
    student = torch.zeros(1, n, v, dtype=torch.bfloat16)
    grad, weights = torch.empty_like(student), torch.ones(n)
    labels = torch.zeros(n, dtype=torch.int64)
    call = RowCall(student, torch.zeros_like(student), labels, weights, spec, grad, False)
    if tail:
        ids = torch.arange(3).expand(n, 3)
        teacher = SparseTeacher(ids, torch.full((n, 3), -2.0))
        entries = canonical(teacher.indices, teacher.log_probs, weights, spec, tail)
        sparse_ops.rows(call._replace(teacher=entries))
    else:
        ops.rows(call)


def _essence(source: Any) -> tuple[Any, ...]:
    """All that the machine code depends on, besides the options."""
    assert not any(source.attrs.values())  # nothing that Triton found out about an argument
    return source.fn.cache_key, source.signature, source.constants


@pytest.mark.parametrize("tail", ["", "bucket", "drop"])
@pytest.mark.parametrize(("n", "v"), [(200, 40_000), (3, 70_000)])
def test_what_is_launched_is_what_was_compiled(
    launches: list[_Launch], n: int, v: int, tail: str
) -> None:
    name = "jsd"
    _call(n, v, name, tail)
    launch = config.choose(n, v, 132)
    stages = resources.stages_of("bf16", name, "plain", launch, tail)
    assert len(launches) == len(stages)
    for made, stage in zip(launches, stages, strict=True):
        job = resources.Job(TARGET, "bf16", name, launch, stage, "plain", tail)
        assert _essence(made.source) == _essence(resources.source(job))
        assert (made.grid, made.warps) == ((n, launch.pieces, 1), launch.warps)
        pointers = {a.data_ptr() for a in made.arguments if isinstance(a, torch.Tensor)}
        assert len(pointers) >= 4


def test_no_number_compiles_or_launches_anew(launches: list[_Launch]) -> None:
    """From the outside: other rows, temperatures and weights, the same kernel; T = 1 and 2 are
    kernels of their own."""
    for n, temperature in ((200, 1.0), (137, 2.0), (133, 1.7), (200, 0.5), (133, 2.0)):
        _call(n, 40_000, "forward_kl", "", temperature)
    sources = [id(launch.source) for launch in launches]
    assert sources[2] == sources[3] and sources[1] == sources[4] and len({*sources}) == 3


def test_no_two_forms_are_one_kernel() -> None:
    """In a process Triton tells kernels apart by their plans' texts."""
    assert len({repr(form) for form in lean.FORMS.values()}) == len(lean.FORMS)
    names = {ops.dense_name(divergences.jsd(beta)) for beta in (0.5, 0.3, 0.7)}
    assert names == {"jsd", "jsd_half"}


@pytest.mark.parametrize("tail", ["", "bucket", "drop"])
@pytest.mark.parametrize(("n", "v"), [(200, 40_000), (3, 70_000)])
def test_later_launches_tell_the_kernel_what_the_first_did(
    launches: list[_Launch], monkeypatch: pytest.MonkeyPatch, n: int, v: int, tail: str
) -> None:
    """They go past Triton's front door, and no argument may be missing or in another's place."""
    _call(n, v, "jsd", tail)
    first = [_plain(launch) for launch in launches]
    with monkeypatch.context() as patched:
        patched.setattr(triton.JITFunction, "run", None)
        _call(n, v, "jsd", tail)
    assert [_plain(launch) for launch in launches[len(first) :]] == first


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "alpha"])
def test_programs_that_wait_for_one_another_are_one_launch(
    launches: list[_Launch], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(config, "choose", lambda *_: JOINT)
    _call(200, 70_000, name, "")
    (made,) = launches
    assert made.grid == (200 * JOINT.pieces, 1, 1)  # a row's programs start one after the other
    job = resources.Job(TARGET, "bf16", name, JOINT, "joint")
    assert _essence(made.source) == _essence(resources.source(job))
    counters = [a for a in made.arguments if getattr(a, "dtype", None) == torch.int32]
    assert [a.shape for a in counters] == [(200, 2)] and not counters[0].any()


def _plain(launch: _Launch) -> list[Any]:
    tensors = ((a.dtype, a.shape) if isinstance(a, torch.Tensor) else a for a in launch.arguments)
    return [launch.grid, launch.warps, *tensors]


def test_another_device_dtype_or_absence_is_another_kernel(launches: list[_Launch]) -> None:
    grad = torch.zeros(1, 4, 5003, dtype=torch.bfloat16)
    for device_, factor in (
        (0, torch.ones(())),
        (0, torch.ones((), dtype=torch.float64)),
        (1, torch.ones(())),
        (1, torch.ones(())),
    ):
        active.active.device = (1 << 30) + device_
        ops.scale_(grad, factor)
    sources = [id(launch.source) for launch in launches]
    assert len({*sources[:3]}) == 3 and sources[3] == sources[2]
    assert launches[1].source.signature["factor"] == "*fp64"


def test_a_profiler_is_told_of_every_launch(
    launches: list[_Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    grad, seen = torch.zeros(1, 4, 5003, dtype=torch.bfloat16), []
    ops.scale_(grad, torch.ones(()))
    front = triton.JITFunction.run
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda *a, **k: [seen.append(1), front(*a, **k)][1]
    )
    triton.knobs.runtime.launch_enter_hook.add(print)
    try:
        ops.scale_(grad, torch.ones(()))
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(print)
    ops.scale_(grad, torch.ones(()))
    assert len(seen) == 1 and len(launches) == 3


def test_an_interpreter_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRETED", True)
    for version, numbers, told in (
        ("3.6.0", "2.4.6", True),
        ("3.6.0", "2.3.1", False),
        ("3.10.1", "2.4.6", False),
    ):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(device.numpy, "__version__", numbers)
        assert ("numpy<2.4" in (device.unavailable() or "")) == told


def test_scaling(launches: list[_Launch]) -> None:
    ops.scale_(torch.zeros(4, 5003, dtype=torch.bfloat16), torch.ones(()))
    (made,) = launches
    job = resources.Job(TARGET, "bf16", "-", config.SCALE, "scale")
    assert _essence(made.source) == _essence(resources.source(job))
    assert made.grid[0] == 1 and made.grid[1] > 1
