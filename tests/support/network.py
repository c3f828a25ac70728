"""What the tests of conformance train: a small network, its groups, and what there is after a step."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.backends import INTERPRETED, marks_of
from tests.support.cases import place, whole
from tests.support.pairs import every_pair

STEPS = 12
COMMON = {"lr": 0.05, "rho": 0.1, "weight_decay": 0.02, "eps": 1e-2, "seed": 3}
NARROW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def steps_of(backend: str) -> int:
    """How many steps a backend takes: interpreted ones not as far into the schedule."""
    return 4 if backend in INTERPRETED else STEPS


class Network(nn.Module):
    """A small smooth network with a parameter of every kind, each between guard zones; the same at every call.

    One of them has a gradient in every third step only, from the second on.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device
        self.convolution = self.parameter(3, 2, 3, 3, layout="channels_last")
        self.shift = self.parameter(3)
        self.gain = self.parameter(48)
        self.hidden = self.parameter(5, 48, layout="transposed")
        self.sliced = self.parameter(5, 3, layout="sliced")
        self.unused = self.parameter(7)
        self.scale = self.parameter()
        self.linear = self.parameter(1, 9)
        self.sometimes = self.parameter(5)
        self.empty = self.parameter(0, 3)
        self.inputs = [self.random(4, 2, 6, 6) for _ in range(STEPS + 4)]

    def random(self, *shape: int) -> Tensor:
        # Rounded to the narrowest dtype, so that networks of all dtypes start from the same numbers.
        return torch.randn(shape, generator=self.generator).bfloat16().to(self.device, self.dtype)

    def parameter(self, *shape: int, layout: str = "contiguous") -> nn.Parameter:
        base = place(self.random(*shape).cpu() / 4, self.dtype, layout, shift=1)
        return nn.Parameter(whole(base).to(self.device).as_strided(shape, base.stride(), base.storage_offset()))

    def loss(self, step: int) -> Tensor:
        return self(step)

    def forward(self, step: int) -> Tensor:
        x = F.gelu(F.conv2d(self.inputs[step], self.convolution, self.shift)).flatten(1)
        x = F.layer_norm(x, (48,), self.gain)
        x = torch.tanh(x @ self.hidden.t())
        if step % 3 == 1:
            x = x + self.sometimes**3
        x = (x @ self.sliced).square() * (1 + self.scale)
        return x.mean() + self.linear.sum() + self.empty.sum()

    def assert_guards_untouched(self) -> None:
        for parameter in self.parameters():
            if parameter.layout == torch.strided and parameter.storage_offset():
                outside = torch.ones_like(whole(parameter), dtype=torch.bool)
                outside.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset()).fill_(False)
                assert whole(parameter)[outside].isnan().all()


class Dropping(Network):
    """The same with parameters left out at random, others in every pass, and two steps that are not finite."""

    NOT_FINITE = ((1, 1), (3, 2))  # the step, and the pass of it

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.drawn = random.Random(0)
        self.passes: Counter[int] = Counter()

    def loss(self, step: int) -> Tensor:
        self.passes[step] += 1
        dropped = {name: p.detach() for name, p in self.named_parameters() if self.drawn.random() < 0.3}
        loss = torch.func.functional_call(self, dropped, step)
        return loss * math.inf if (step, self.passes[step]) in self.NOT_FINITE else loss


Groups = Callable[[Network], Any]


def one_group(network: Network) -> Any:
    return network.parameters()


def many_groups(network: Network) -> Any:
    """Groups that share no hyperparameter that they may have to themselves."""
    return [
        {"params": [network.convolution, network.shift], "rho": 0.1, "weight_decay": 0.1},
        {
            "params": [network.sliced, network.hidden, network.unused],
            "lr": 0.02,
            "betas": (0.5, 0.9),
            "eps": 1e-2,
            "bias_correction": "update",
            "adaptive": True,
        },
        {
            "params": [network.scale, network.sometimes, network.empty],
            "betas": (0.9, 0.99),
            "bias_correction": "none",
        },
        {"params": [network.gain], "hessian_power": 1.0, "eps": 0.1, "lr": 0.01, "maximize": True},
        {"params": [network.linear], "hessian_power": 0.8, "rho": 0.0, "weight_decay": 0.5},
    ]


def many_still_groups(network: Network) -> Any:
    """The same, none of which moves: one pass is enough."""
    return [{**group, "rho": 0.0} for group in many_groups(network)]


GROUPINGS = [many_groups, one_group]


State = dict[str, Any]


def snapshot(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, State]]:
    """Every parameter and its state, copied, in group order."""
    saved = optimizer.state_dict()["state"]
    copies = []
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state = {
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for name, value in saved.get(i, {}).items()
        }
        copies.append((parameter.detach().cpu().clone(), state))
    return copies


Trajectory = list[list[tuple[Tensor, State]]]


def id_of(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def each_run(backends: Iterable[str], options: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """Runs in which every two of a backend, options, a dtype and a grouping meet."""
    runs = every_pair(options=options, backend=list(backends), dtype=NARROW_DTYPES, groups=GROUPINGS)
    return pytest.mark.parametrize(
        "backend, dtype, groups, options",
        [
            pytest.param(
                run["backend"],
                run["dtype"],
                run["groups"],
                run["options"],
                marks=marks_of(run["backend"]),
                id=f"{id_of(run['options'])}-{str(run['dtype'])[6:]}-{run['groups'].__name__}-{run['backend']}",
            )
            for run in runs
        ],
    )
