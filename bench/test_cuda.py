"""Each pass on a GPU against the memory roof, and whole steps against AdamW(fused).

Times are those of CUDA events around the call. Before each, memory twice the size of the L2 cache is written, so that
nothing is found there, and the device sleeps for longer than the host needs to enqueue the call. The roof is what a
copy of a gibibyte reaches in the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor

from bench.contenders import HESSIAN, LAZY, Problem
from bench.interleave import interleaved, replay, replayed_seconds, spread
from bench.passes import bytes_read, bytes_written, passes
from bench.shapes import MODELS, Shape
from sassha_fused import Sassha, available_backends, ops
from sassha_fused.curvature.exact import SOURCES, HessianSource
from sassha_fused.layout import layouts_of, state_dtype
from sassha_fused.settings import RowSettings, Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SECONDS = 20
COPIED_BYTES = 1 << 30
SLEEP_CYCLES = 4_000_000  # some 2 ms
DTYPES = {"float": torch.float32, "__nv_bfloat16": torch.bfloat16}
UNIT = 128  # elements: at a multiple of so many each parameter's state begins
GROUP = {
    "betas": (0.9, 0.999),
    "eps": 1e-4,
    "hessian_power": 0.5,
    "adaptive": False,
    "maximize": False,
    "bias_correction": "step",
}
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

    def normal() -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes]

    params, grads, products, signs = normal(), normal(), normal(), normal()
    layouts, rows = layouts_of(params), list(range(len(params)))
    indices = list(itertools.accumulate((param.numel() for param in params), initial=0))[:-1]
    *offsets, total = itertools.accumulate((-(-param.numel() // UNIT) * UNIT for param in params), initial=0)
    backup = torch.zeros(total, dtype=dtype, device="cuda")
    exp_avg, exp_hessian, estimate = (torch.zeros_like(backup, dtype=state_dtype(params[0])) for _ in range(3))
    steps = torch.zeros((len(params), 2), dtype=torch.int64, device="cuda")
    skipped, evaluation = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))
    norm = torch.ones((), dtype=torch.float64, device="cuda")
    own = RowSettings(lr=1e-4, weight_decay=1e-4, rho=1e-3)
    per_row = torch.tensor([own] * len(params), dtype=torch.float64, device="cuda")
    settings = list(Settings.of(GROUP))
    operators = ops.operators(backend, torch.device("cuda"))

    def perturb(measure: bool) -> None:
        operators.perturb_(params, grads, backup, offsets, rows, layouts, norm, measure, per_row, settings)

    def update(found: list[Tensor], check: bool) -> None:
        state = (backup, exp_avg, exp_hessian, steps, skipped, offsets, rows, layouts)
        operators.update_(params, grads, found, *state, [norm], check, per_row, settings)

    return {
        "grad_norm": lambda: operators.grad_norm(grads, [], None, False),
        "grad_norm, adaptive": lambda: operators.grad_norm(grads, params, layouts, True),
        "perturb_": lambda: perturb(False),
        "perturb_, its norm included": lambda: perturb(True),
        "rademacher_": lambda: operators.rademacher_(signs, indices, 0, evaluation, 0),
        "hutchinson_, behind the first sample": lambda: operators.hutchinson_(
            products, estimate, offsets, indices, 0, evaluation, 1, 3
        ),
        "update_, lazy": lambda: update([], False),
        "update_, lazy, its check included": lambda: update([], True),
        "update_, Hessian": lambda: update(products, False),
        "update_, Hessian, its checks included": lambda: update(products, True),
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
