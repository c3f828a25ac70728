"""Prints time and peak memory of a Hessian step that takes its batch in 1, 4 or 8 micro-batches, beside a lazy step.

A process of its own for the memory, as bench.peak_memory is. Linux only.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.models import MODELS
from bench.peak_memory import resident
from sassha_fused import Sassha

BATCH = 32
ROUNDS = 5
# Micro-batches, how many of them products are taken of, and whether the step is a Hessian step.
WAYS: dict[str, tuple[int, int | None, bool]] = {
    "one batch": (1, None, True),
    "4 micro-batches": (4, None, True),
    "8 micro-batches": (8, None, True),
    "8, hessian_batches=1": (8, 1, True),
    "one batch, lazy": (1, None, False),
    "8 micro-batches, lazy": (8, None, False),
}


def stepper(model: str, parts: int, hessian_batches: int | None, hessian: bool) -> Callable[[], Tensor]:
    """Takes the same step again and again; the first has made the state."""
    torch.manual_seed(0)
    network, inputs, targets = MODELS[model](BATCH)
    interval = 1 if hessian else 10**6
    opt = Sassha(network.parameters(), 1e-4, hessian_interval=interval, hessian_batches=hessian_batches, backend="cpu")

    def closure_of(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        return lambda: cross_entropy(network(x), y) / parts

    closures: Sequence[Callable[[], Tensor]] = [
        closure_of(x, y) for x, y in zip(inputs.chunk(parts), targets.chunk(parts))
    ]

    def step() -> Tensor:
        return opt.step(closures)

    step()
    return step


def measured(model: str) -> dict[str, tuple[float, float]]:
    """Of each way the least seconds of a step, in turns with the others, and MB above what there was before it."""
    peaks = {}
    for way, options in WAYS.items():
        step = stepper(model, *options)
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        step()
        peaks[way] = (resident("VmHWM") - before) / 1e6
    steppers = {way: stepper(model, *options) for way, options in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, step in steppers.items():
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)
    return {way: (min(seconds[way]), peaks[way]) for way in WAYS}


if __name__ == "__main__":
    print(json.dumps({model: measured(model) for model in MODELS}))
