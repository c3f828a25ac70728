"""Each pass on a GPU against the memory roof, and whole steps against AdamW(fused).

Times are those of CUDA events around the call. Before each, memory twice the size of the L2 cache is written, so that
nothing is found there, and the device sleeps for longer than the host needs to enqueue the call. The roof is what a
copy of a gibibyte reaches in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch

from bench.contenders import HESSIAN, LAZY, Problem
from bench.interleave import interleaved, replay, replayed_seconds, spread
from bench.operands import Operands
from bench.passes import bytes_read, bytes_written, passes
from bench.shapes import MODELS, Shape
from sassha_fused import Sassha, available_backends
from sassha_fused.curvature.exact import SOURCES, HessianSource

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SECONDS = 20
COPIED_BYTES = 1 << 30
SLEEP_CYCLES = 4_000_000  # some 2 ms
DTYPES = {"float": torch.float32, "__nv_bfloat16": torch.bfloat16}
# The backends that serve CUDA tensors by kernels of their own.
BACKENDS = ("cuda", "triton")


class Timed:
    """A contender that is timed on the device."""

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self.name, self.call = name, call
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.flushed = torch.empty(2 * device.L2_cache_size, dtype=torch.uint8, device="cuda")

    def round(self) -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return {"": start.elapsed_time(end) / 1e3}


def copy() -> Timed:
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Timed("copy", lambda: target.copy_(source))


def calls(shapes: tuple[Shape, ...], dtype: torch.dtype, backend: str) -> dict[str, Callable[[], object]]:
    """The passes of bench.passes that are one operator call, ready to run."""
    on = Operands(shapes, backend, "cuda", dtype)
    return {
        "grad_norm": on.grad_norm,
        "grad_norm, adaptive": lambda: on.grad_norm(adaptive=True),
        "perturb_": on.perturb,
        "perturb_, its norm included": lambda: on.perturb(measure=True),
        "rademacher_": on.rademacher,
        "hutchinson_, behind the first sample": on.hutchinson,
        "update_, lazy": on.update,
        "update_, lazy, its check included": lambda: on.update(check=True),
        "update_, Hessian": lambda: on.update(hessian=True),
        "update_, Hessian, its checks included": lambda: on.update(hessian=True, check=True),
    }


@pytest.fixture(scope="module", params=[(m, d, b) for m in MODELS for d in DTYPES for b in BACKENDS], ids=str)
def timed_passes(request, progress, report):
    model, dtype, backend = request.param
    reason = available_backends()[backend]
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    roof = copy()
    chosen = calls(MODELS[model], DTYPES[dtype], backend)
    contenders = [roof, *(Timed(name, call) for name, call in chosen.items())]
    with progress(f"{model}, {dtype}, {backend}") as done:
        samples = interleaved(contenders, SECONDS, done)
    parameters = sum(torch.Size(shape).numel() for shape in MODELS[model])
    rate = 2 * COPIED_BYTES / median(samples["", roof.name])
    rows = [("", "us", "spread", "bytes/parameter", "GB/s", "of the roof")]
    rows.append(("copy of 1 GiB", f"{1e6 * median(samples['', roof.name]):.1f}", spread(samples["", roof.name])))
    rows[-1] += ("", f"{rate / 1e9:.0f}", "100 %")
    for name in chosen:
        seconds = median(samples["", name])
        kernels = passes(dtype)[name]
        moved = bytes_read(kernels) + bytes_written(kernels)
        achieved = moved * parameters / seconds
        cells = (f"{1e6 * seconds:.1f}", spread(samples["", name]), str(moved), f"{achieved / 1e9:.0f}")
        rows.append((name, *cells, f"{100 * achieved / rate:.0f} %"))
    title = f"{model} ({parameters / 1e6:.2f} M parameters), {dtype}, {backend} on {torch.cuda.get_device_name()}"
    report.table(title, rows)
    return f"{model}, {dtype}, {backend}", samples


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("name", [name for name in passes("float") if not name.endswith("step")])
def test_pass(timed_passes, name, benchmark):
    benchmark.group, samples = timed_passes
    replay(benchmark, samples["", name])


class Steps:
    """The optimizer's part of lazy and Hessian steps, in turns; perturb and step are timed apart and added."""

    def __init__(self, problem: Problem, backend: str) -> None:
        self.name = f"sassha {backend}"
        self.problem, self.steps = problem, 0
        SOURCES["given"] = HessianSource(lambda *_: problem.products, needs_graph=False)
        settings = {"lr": 1e-4, "weight_decay": 1e-4, "hessian_interval": 2}
        self.optimizer = Sassha(problem.parameters, **settings, hvp="given", backend=backend)
        self.perturb, self.finish = Timed("", self.optimizer.perturb), Timed("", self.optimizer.step)

    def step(self) -> tuple[str, float]:
        self.steps += 1
        self.problem.assign(self.problem.first_gradients)
        first = self.perturb.round()[""]
        self.problem.assign(self.problem.second_gradients)
        return LAZY if self.steps % 2 == 0 else HESSIAN, first + self.finish.round()[""]

    def round(self) -> dict[str, float]:
        return dict((self.step(), self.step()))


class AdamW(Timed):
    def __init__(self, problem: Problem) -> None:
        optimizer = torch.optim.AdamW(problem.parameters, lr=1e-4, fused=True)
        super().__init__("AdamW fused", optimizer.step)
        self.problem = problem

    def round(self) -> dict[str, float]:
        self.problem.assign(self.problem.first_gradients)
        return {LAZY: super().round()[""]}


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("model", MODELS)
def test_step(model, progress, report, benchmark):
    problem = Problem(MODELS[model], device="cuda")
    present = available_backends()
    contenders = [*(Steps(problem, backend) for backend in BACKENDS if present[backend] is None), AdamW(problem)]
    with progress(f"{model}, whole optimizer steps") as done:
        samples = interleaved(contenders, SECONDS, done)
    rival = median(samples[LAZY, "AdamW fused"])
    rows = [("", "us", "spread", "time of AdamW fused")]
    for (kind, name), values in samples.items():
        seconds = median(values)
        rows.append((f"{name}, {kind}", f"{1e6 * seconds:.1f}", spread(values), f"{seconds / rival:.2f}"))
    report.table(f"{model}, float32, the optimizer's part of a step, on {torch.cuda.get_device_name()}", rows)
    replay(benchmark, samples[LAZY, contenders[0].name])
