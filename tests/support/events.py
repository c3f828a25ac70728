"""What happens in a soak, and to what network.

An event is a name and a number that its details are drawn by, so that any part of a schedule can be replayed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# In the first quarter of a schedule so many groups come to the optimizer.
ADDITIONS = 3
# How often each comes, among the steps and between them.
STEPS = {"closure": 4, "standard": 4, "phases": 6, "closures": 4, "accumulate": 4}
OTHERS = {"freeze": 2, "edit": 3, "save": 1, "copy": 1, "look": 2, "abandon": 1}


class Event(NamedTuple):
    """What happens, and what its details are drawn by."""

    kind: str
    number: int


def schedule(seed: int, steps: int) -> list[Event]:
    """Events with so many steps among them: groups come in the first quarter, after each one memory is looked at."""
    draw = random.Random(seed)
    events: list[Event] = []
    quarter = steps // 4
    apart = quarter // (ADDITIONS + 1)
    for step in range(steps):
        while draw.random() < 0.2:
            events.append(Event(_any_of(OTHERS, draw), draw.randrange(10**6)))
        if step in range(apart, quarter, apart)[:ADDITIONS]:
            events.append(Event("add a group", draw.randrange(10**6)))
        events.append(Event(_any_of(STEPS, draw), draw.randrange(10**6)))
        if step % quarter == quarter - 1:
            events.append(Event("settle", 0))
    return events


def _any_of(weights: dict[str, int], draw: random.Random) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]


def shrunk(events: Sequence[Event], fails: Callable[[Sequence[Event]], bool], seconds: float = 60.0) -> list[Event]:
    """A few of these events that fail as well: parts are left out, ever smaller ones, as long as there is time."""
    left, size, until = list(events), len(events) // 2, time.monotonic() + seconds
    while size > 0:
        start = 0
        while start < len(left) and time.monotonic() < until:
            others = left[:start] + left[start + size :]
            if fails(others):
                left = others
            else:
                start += size
        size //= 2
    return left


class Network(nn.Module):
    """Two layers, a parameter that some batches do not use, and scales that come to the optimizer later."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2)

        self.layers = nn.ParameterList([parameter(6, 4), parameter(6), parameter(3, 6), parameter(3)])
        self.sometimes = parameter(6)
        self.later = nn.ParameterList([parameter(6) for _ in range(ADDITIONS)])

    def forward(self, x: Tensor, uses: bool) -> Tensor:
        first, shift, second, bias = self.layers
        x = torch.tanh(x @ first.t() + shift)
        for scale in self.later:
            x = torch.tanh(x + scale * x.square())
        if uses:
            x = x + torch.sin(self.sometimes)
        return x @ second.t() + bias


class Batch(NamedTuple):
    """A micro-batch."""

    inputs: Tensor
    targets: Tensor
    uses: bool

    def loss(self, network: Network) -> Tensor:
        return (network(self.inputs, self.uses) - self.targets).square().mean()


class Fault(NamedTuple):
    """What goes wrong in one micro-batch of one pass; behind its loss or, where the closure runs it, its backward."""

    kind: str  # "raises", "interrupts", "nan", "curvature"
    passes: tuple[int, ...]
    micro_batch: int
    late: bool


class Planned(Exception):
    """What a closure raises."""
