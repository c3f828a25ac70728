"""Prints how far resident memory rises above parameters and gradients in steps of the family, in bytes per parameter.

The network has large weights and a batch of one, so that what autograd holds does not count; a Hessian step's products
do. A process of its own, as bench.peak_memory is. Linux only.
"""

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.family import rows
from bench.peak_memory import resident
from bench.peers import Make

WIDTH, LAYERS = 512, 8
STEPS = 2  # the first makes the state


def network() -> nn.Module:
    layers = ((nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS))
    return nn.Sequential(*(module for pair in layers for module in pair))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    batch = torch.randn(1, WIDTH)
    return lambda: model(batch).square().mean()


def peak(make: Make) -> float:
    gc.collect()
    model = network()
    params = list(model.parameters())
    count = sum(param.numel() for param in params)
    before = resident("VmRSS") + params[0].element_size() * count  # the gradients, which come and go
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step = make(params, loss_of(model))
    for _ in range(STEPS):
        step()
    return (resident("VmHWM") - before) / count


def main() -> None:
    warnings.simplefilter("ignore")
    every = [row for row in rows() if row.steps == 1]  # where there is a Hessian, it is in every step
    for make in every[0].contenders.values():
        peak(make)  # what the process itself keeps
    print(json.dumps({row.title: {name: peak(make) for name, make in row.contenders.items()} for row in every}))


if __name__ == "__main__":
    main()
