"""The Triton backend beyond conformance: when it serves, what it compiles, its tables, and the demo's model."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from examples.mnist.model import resnet
from sassha_fused import Sassha, available_backends, ops, triton_kernels
from sassha_fused.triton_kernels import table
from tests.support.backends import BACKENDS, marks_of, operators_of
from tests.support.calls import HYPER, arguments_of, run_rademacher, run_update
from tests.support.cases import Spec, assert_same_bits, assert_same_case, each_dtype, make_case
from tests.support.checks import check_perturb, check_update
from tests.support.emulation import ROOT
from tests.support.formulas import ulp
from tests.support.reference import signs

pytestmark = pytest.mark.slow
on_the_cpu = pytest.mark.skipif(BACKENDS["triton"] != "cpu", reason="Triton is not interpreted here")


def compiled(*command: str) -> str:
    """What a command of this Python prints where Triton is not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# A model


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(16, 1, 28, 28, generator=generator), torch.randint(0, 10, (16,), generator=generator)


@pytest.mark.untraced  # a minute of kernels that other tests trace
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "hessian_samples": 2, "weight_decay": 0.01}], ids=str)
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=marks_of("triton"))])
def test_every_step_of_the_demos_model_ends_within_4_ulp_of_that_on_the_cpu(
    backend: str, options: dict[str, Any]
) -> None:
    models = [resnet(0), resnet(0).to(BACKENDS[backend])]
    ours, theirs = (
        Sassha(model.parameters(), lr=0.1, hessian_interval=5, backend=name, **options)
        for model, name in zip(models, ("cpu", backend))
    )
    # Two Hessian steps, and lazy ones after each.
    for step in range(20 if BACKENDS[backend] == "cuda" else 7):
        for opt, model in zip((ours, theirs), models):
            images, labels = (t.to(next(model.parameters()).device) for t in batch(step))
            opt.step(lambda model=model, images=images, labels=labels: F.cross_entropy(model(images), labels))
        for (name, w), other in zip(models[0].named_parameters(), models[1].parameters()):
            mine, its = ({"w": p.detach(), **opt.state[p]} for opt, p in ((ours, w), (theirs, other)))
            assert mine.keys() == its.keys()
            for key, expected in mine.items():
                unit = ulp(expected, expected.dtype) if expected.is_floating_point() else 1
                error = ((its[key].cpu().double() - expected.double()).abs() / unit).max()
                assert error <= 4, f"step {step}, {name}, {key}: {error} ulp"


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled


def test_nothing_is_compiled_anew_while_hyperparameters_steps_and_parameters_change() -> None:
    found = json.loads(compiled("-m", "tests.support.specializations"))
    assert len(found["Sassha"]) == 100
    kinds = {}
    for name, steps in found.items():
        first_cycles = {key for step in steps[:12] for key in step}
        assert {key for step in steps for key in step} == first_cycles, name
        kinds[name] = len(first_cycles)
    # Sassha: norm in two stages, perturb_, signs, two samples, and inspection and update of each kind of step. MSassha
    # has no norm but that of perturb_, and one sample, of which no sum is needed; and, as SAMSGD here, an update that
    # leaves m's norm, which has a stage of its own, beside those that do not. AdaHessian's products are averaged by
    # blocks, and its steps all of one kind then; SophiaH has products, whose signs count, and no perturb_.
    assert kinds == {"Sassha": 10, "MSassha": 9, "SAMSGD": 6, "SAMAdamW": 4, "AdaHessian": 6, "SophiaH": 7}


def test_importing_the_package_does_not_import_triton() -> None:
    assert compiled("-c", "import sys, sassha_fused; print('triton' in sys.modules)").strip() == "False"


# ---------------------------------------------------------------------------------------------------------------------
# When it serves


@pytest.mark.parametrize(
    "installed, loads, gpu, reason",
    [
        (False, True, True, "Triton is not installed: pip install triton"),
        (True, True, False, "no GPU is available; TRITON_INTERPRET=1"),
        (True, False, True, "the kernels do not load: ImportError('broken')"),
        (True, True, True, None),
    ],
)
def test_why_triton_cannot_be_used_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, installed: bool, loads: bool, gpu: bool, reason: str | None
) -> None:
    def load() -> None:
        if not loads:
            raise ImportError("broken")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(ops, "_INTERPRETED", False)
    monkeypatch.setattr(ops, "_load_triton", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    found = available_backends()["triton"]
    assert found is None if reason is None else found is not None and reason in found and "\n" not in found


@pytest.fixture
def no_verdicts() -> Iterator[None]:
    """What was found out of devices is forgotten, before and after."""
    ops._refusal.cache_clear()
    yield
    ops._refusal.cache_clear()


def test_a_gpu_on_which_triton_cannot_launch_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, no_verdicts: None
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find\n  C compiler")

    monkeypatch.setattr(ops, "_INTERPRETED", False)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch, "ones", fails)
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = available_backends()["triton"]
    assert found == "the kernels do not run on cuda:0: Failed to find C compiler"


def test_auto_takes_triton_where_the_cuda_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.BACKENDS, "triton", ops.Backend(("cuda",), lambda: None, lambda: "those of Triton"))  # type: ignore[arg-type,return-value]
    monkeypatch.setitem(ops.BACKENDS, "cuda", ops.Backend(("cuda",), lambda: "not built", lambda: pytest.fail()))
    assert ops.operators("auto", torch.device("cuda")) == "those of Triton"


@on_the_cpu
def test_auto_never_takes_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ops.BACKENDS["cpu"]
    monkeypatch.setitem(ops.BACKENDS, "cpu", ops.Backend(("cpu",), lambda: "not built", backend.load))
    monkeypatch.setattr(ops, "_warned", set())
    with pytest.warns(UserWarning, match="plain torch, much slower than its kernels: cpu: not built"):
        assert ops.operators("auto", torch.device("cpu")) is ops.eager


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[table.Contents]:
    """The contents of the tables that are built from now on, as on a GPU whose current stream is number 1."""
    contents: list[table.Contents] = []
    original = table._table

    def build(device: torch.device, wanted: table.Contents) -> table.Table:
        contents.append(wanted)
        return original(torch.device("cpu"), wanted)

    monkeypatch.setattr(table, "_table", build)
    monkeypatch.setattr(table, "_kept", table.Kept(100 * table._LEAST_BYTES))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_stream(monkeypatch, 1)
    return contents


def on_stream(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    stream = type("Stream", (), {"cuda_stream": number})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


def contents_at(address: int, count: int = 1) -> table.Contents:
    return table.Contents((5,) * count, 4, (table.Stream((address,) * count, 4),), rows=(0,) * count)


CUDA = torch.device("cuda")


def test_a_table_serves_again_while_the_pointers_stay(
    built: list[table.Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [table.table_on(CUDA, contents_at(address)) for address in (512, 1024, 512, 1024)]
    assert built == [contents_at(512), contents_at(1024)]
    assert found[0] is found[2] and found[1] is found[3] and found[0] is not found[1]
    # The copy to the device is in the order of the stream that made it.
    on_stream(monkeypatch, 2)
    assert table.table_on(CUDA, contents_at(512)) is not found[0]


def test_tables_are_kept_while_there_is_room_and_the_oldest_make_way(built: list[table.Contents]) -> None:
    for _ in range(3):
        for address in range(100):
            table.table_on(CUDA, contents_at(address))
    assert len(built) == 100
    # A long one takes the room of many.
    table.table_on(CUDA, contents_at(0, 256))
    assert built[100:] == [contents_at(0, 256)]
    table.table_on(CUDA, contents_at(99))
    assert len(built) == 101
    table.table_on(CUDA, contents_at(0))
    assert len(built) == 102


def test_a_table_that_takes_more_than_all_room_serves_all_the_same(built: list[table.Contents]) -> None:
    for _ in range(2):
        assert table.table_on(CUDA, contents_at(0, 10_000)).entries == 10_000
    assert len(built) == 1


def test_the_tables_of_a_captured_graph_are_its_own(
    built: list[table.Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = table.table_on(CUDA, contents_at(512))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [table.table_on(CUDA, contents_at(512)) for _ in range(2)]
    assert len(built) == 3 and len({id(t) for t in (kept, *captured)}) == 3


def test_numbers_are_kept_by_their_contents_and_dtype(
    built: list[table.Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_copied", lambda _, numbers, dtype: torch.tensor(numbers, dtype=dtype))
    # Python takes 1 and 1.0 for the same key.
    found = [table.numbers_on(CUDA, (1, 0), torch.int64) for _ in range(2)]
    found += [table.numbers_on(CUDA, (1.0, 0.0), torch.float64) for _ in range(2)]
    assert [t.dtype for t in found] == [torch.int64, torch.int64, torch.float64, torch.float64]
    assert found[0] is found[1] and found[2] is found[3]
    assert table.numbers_on(CUDA, (1.0, 0.5), torch.float64).tolist() == [1.0, 0.5]


def test_what_a_captured_graph_copies_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = torch.tensor([1, 2])
    monkeypatch.setattr(torch, "tensor", lambda *_, **options: pinned if options["pin_memory"] else pytest.fail())
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: self.clone())
    monkeypatch.setattr(table, "_captured", [])
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        copied = table._copied(CUDA, (1, 2))
        assert [id(t) for t in table._captured] == ([id(pinned), id(copied)] if capturing else [])


@on_the_cpu
@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_does_not_matter(default: str) -> None:
    case = make_case(torch.float32, [Spec((5,)), Spec((300,), shift=1)])
    results = []
    for backend, device in (("triton", default), ("cpu", "cpu")):
        results.append(case.to("cpu"))
        arguments = arguments_of("perturb_", results[-1], measure=True)
        with torch.device(device):
            operators_of(backend).perturb_(**arguments)
    assert_same_case(*results)


class Weight(nn.Parameter):
    """A parameter of a class of its own, as some libraries have."""


@on_the_cpu
def test_parameters_of_a_class_of_their_own_are_parameters() -> None:
    results = []
    for kind, backend in ((Weight, "triton"), (nn.Parameter, "cpu")):
        w = kind(torch.linspace(1, 2, 5))
        opt = Sassha([w], lr=1e-3, hessian_interval=2, backend=backend)
        for _ in range(3):
            opt.step(lambda w=w: (w**3).sum())
        results.append(w.detach().clone())
    assert_same_bits(results[0].as_subclass(Tensor), results[1], "w")


class Wrapper(Tensor):
    """A tensor whose memory is another one's, as that of DTensor is."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


@on_the_cpu
@pytest.mark.parametrize("place", [0, 1])
def test_tensors_without_memory_of_their_own_are_refused(place: int) -> None:
    tensors: list[Tensor] = [torch.ones(3), torch.ones(3)]
    tensors[place] = Wrapper(tensors[place])
    with pytest.raises(ValueError, match=f"tensor {place} is a Wrapper"):
        operators_of("triton").grad_norm(tensors, [], None, False)


@on_the_cpu
def test_an_update_of_parameters_on_another_device_than_their_state_is_refused() -> None:
    case = make_case(torch.float32, [Spec((5,))])
    moved = replace(case, params=[w.to("meta") for w in case.params], grads=[g.to("meta") for g in case.grads])
    with pytest.raises(ValueError, match=r"tensor 0 is .* on meta, not as when its state was made"):
        run_update("triton", moved, HYPER, False)


@on_the_cpu
def test_a_row_of_the_counts_belongs_to_one_parameter() -> None:
    case = make_case(torch.float32, [Spec((5,)), Spec((5,))])
    with pytest.raises(ValueError, match="rows must be distinct"):
        run_update("triton", replace(case, rows=[1, 1]), HYPER, False)


@on_the_cpu
@each_dtype
def test_more_tensors_than_two_looks_at_the_table_can_tell_apart(dtype: torch.dtype) -> None:
    # Each look tells 32 entries apart. Most are empty, or the interpreter would take its time.
    sizes = [(7 * i) % 200 if i % 37 == 36 else 0 for i in range(1100)]
    case = make_case(dtype, [Spec((size,), shift=i % 3) for i, size in enumerate(sizes)])
    check_perturb("triton", case, 3.0)
    check_update("triton", case, hessian=True)
    run_rademacher("triton", case, 5, 6, 7)
    expected = torch.cat([signs(i, p.numel(), 5, 6, 7) for i, p in zip(case.indices, case.params, strict=True)])
    assert_same_bits(torch.cat(case.params), expected.to(dtype), "signs")
