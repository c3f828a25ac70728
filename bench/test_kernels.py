"""The CPU kernels one by one, beside torch's fused AdamW kernel and torch.sum, in the caches and in memory.

Times are those of an element: what a call on 8 elements takes, which is the host's work, is taken off. In the caches
each call, that one too, goes over each tensor several times, so that it lies where the call left it, and what the host
has to fetch again does not count. The check that begins an update_ is timed by two steps that are skipped: one for the
last gradient, one for a scalar, before any gradient is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pytest
import torch

from bench.budgets import ADAMW_BYTES, CHECK_BYTES, NORM_BYTES, PERTURB_BYTES, UPDATE_BYTES
from bench.interleave import Samples, interleaved, replay, replayed_seconds, spread
from bench.operands import Operands
from bench.report import Report
from bench.shapes import MODELS, Shape


@dataclass(frozen=True)
class Place:
    """What the kernels work on; the check on less in the caches, since a skipped step touches three arrays."""

    shapes: tuple[Shape, ...]
    shapes_of_check: tuple[Shape, ...]
    times: int  # that a call goes over each tensor
    seconds: int


THREADS = (1, 2)
IN_CACHE = "64 Ki elements a thread"
PLACES = {
    **{(IN_CACHE, n): Place(((1 << 16,),) * n, ((1 << 14,),) * n, times=16, seconds=15) for n in THREADS},
    **{("GPT-2 small", n): Place(*[MODELS["GPT-2 small"]] * 2, times=1, seconds=60) for n in THREADS},
}
ELEMENT = "an element"
SUM, ADAMW, UPDATE = "torch.sum", "AdamW kernel", "update_, lazy"
CHECK, NORM, PERTURB = "its check", "grad_norm", "perturb_"
BYTES = {
    SUM: NORM_BYTES,
    ADAMW: ADAMW_BYTES,
    UPDATE: UPDATE_BYTES,
    CHECK: CHECK_BYTES,
    NORM: NORM_BYTES,
    PERTURB: PERTURB_BYTES,
}


class Kernel:
    """A call, less what another call of the same operator takes."""

    def __init__(self, name: str, call: Callable[[], object], less: Callable[[], object], count: int) -> None:
        self.name, self.calls, self.count = name, (call, less), count

    def round(self) -> dict[str, float]:
        whole, less = map(seconds, self.calls)
        return {ELEMENT: (whole - less) / self.count}


def seconds(call: Callable[[], object]) -> float:
    """What the second call in a row takes."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def sums(operands: Operands) -> Callable[[], object]:
    average = operands.bucket.exp_avg
    return lambda: [average.sum() for _ in range(operands.times)]


def fused_adamw(operands: Operands) -> Callable[[], object]:
    """torch's kernel, on the memory of Sassha's state."""
    b = operands.bucket
    states = [b.state_of(row) for row in b.rows]
    averages, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_hessian"))
    steps = [torch.tensor(1.0) for _ in states]
    numbers = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-4, "eps": 1e-8}

    def call() -> None:
        lists = (operands.params, operands.grads, averages, squares, [], steps)
        torch._fused_adamw_(*lists, **numbers, amsgrad=False, maximize=False)

    return call


def check(operands: Operands) -> Kernel:
    last = operands.grads[-1].clone()
    last.view(-1)[-1] = math.inf
    unfit, infinite = [*operands.grads[:-1], last], torch.tensor(math.inf)
    whole, less = lambda: operands.update(grads=unfit, check=True), lambda: operands.update(guard=infinite)
    return Kernel(CHECK, whole, less, operands.count)


def kernels(place: Place) -> list[Kernel]:
    operands, of_check, few = (Operands(s, "cpu") for s in (place.shapes, place.shapes_of_check, ((8,),)))
    for on in (operands, of_check, few):
        on.go_over_each(place.times)

    def kernel(name: str, call_on: Callable[[Operands], Callable[[], object]]) -> Kernel:
        return Kernel(name, call_on(operands), call_on(few), operands.count)

    return [
        kernel(SUM, sums),
        kernel(ADAMW, fused_adamw),
        kernel(UPDATE, lambda on: on.update),
        check(of_check),
        kernel(NORM, lambda on: on.grad_norm),
        kernel(PERTURB, lambda on: on.perturb),
    ]


@pytest.fixture(scope="module", params=PLACES, ids=str)
def measured(request, progress, report) -> tuple[str, Samples]:
    (name, threads), place = request.param, PLACES[request.param]
    title = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with progress(f"kernels, {title}") as done:
            samples = interleaved(kernels(place), place.seconds, done)
    finally:
        torch.set_num_threads(before)
    describe(report, title, samples, judged=request.param == (IN_CACHE, 1))
    return title, samples


def describe(report: Report, title: str, samples: Samples, judged: bool) -> None:
    typical = {name: median(values) for (_, name), values in samples.items()}
    rows = [("", "ns/element", "spread", "bytes/element", "GB/s", f"this / {SUM}", f"this / {ADAMW}")]
    for name, seconds in typical.items():
        cells = (f"{1e9 * seconds:.4f}", spread(samples[ELEMENT, name]), str(BYTES[name]))
        ratios = (f"{seconds / typical[rival]:.2f}" for rival in (SUM, ADAMW))
        rows.append((name, *cells, f"{BYTES[name] / seconds / 1e9:.1f}", *ratios))
    report.table(f"CPU kernels, {title}, medians of {len(samples[ELEMENT, SUM])} rounds", rows)
    if judged:
        report.judge("kernel, update_", typical[UPDATE] / typical[ADAMW])
        report.judge("kernel, check", typical[CHECK] / typical[SUM])
        report.judge("kernel, norm", typical[NORM] / typical[SUM])


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("kernel", BYTES)
def test_kernel(measured, kernel, benchmark):
    title, samples = measured
    benchmark.group = f"CPU kernels, {title}"
    benchmark.extra_info["bytes per element"] = BYTES[kernel]
    replay(benchmark, samples[ELEMENT, kernel])
