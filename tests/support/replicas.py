"""A problem that ranks train together under DistributedDataParallel, or one process alone: the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sassha_fused import Sassha, data_parallel, running_stats_once
from tests.support.members import MEMBERS

ROWS = 8  # of a batch
EVERY_MEMBER = {"Sassha": (Sassha, {"lr": 0.05, "hessian_interval": 3}), **MEMBERS}


class Network(nn.Module):
    """Two branches, of which a batch may leave one out; a parameter that enters linearly; batch norm on demand."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh())
        self.branch = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)
        self.shift = nn.Parameter(torch.zeros(2))
        generator = torch.Generator().manual_seed(0)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64) / 2

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        hidden = self.first(x)
        if branch:
            hidden = hidden + torch.tanh(self.branch(hidden))
        return self.last(hidden) + self.shift


class Replica:
    """One rank's part of the problem; of one process alone, all of it."""

    def __init__(
        self, rank: int, world: int, member: str = "Sassha", norm: bool = False, ddp: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64, frozen: bool = False, known: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        self.rank, self.world, self.dtype = rank, world, dtype
        torch.manual_seed(rank)
        self.network = Network(norm).to(dtype)
        self.network.branch.requires_grad_(not frozen)
        self.params = list(self.network.parameters())
        kind, defaults = EVERY_MEMBER[member]
        if "hessian_interval" in defaults:  # what enters linearly, with a Hessian of 0, moves by less than 1 / eps
            defaults = {"eps": 1e-2, **defaults}
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 0.03, "weight_decay": 0.1}]
        self.opt: Any = kind(groups, **{**defaults, **options})
        self.model: Any = self.network
        self.ddp = ddp or {}
        if known:
            self.wrap()
        if norm:
            running_stats_once(self.network, self.opt)
        self.steps = 0

    def wrap(self) -> None:
        """Under DistributedDataParallel, or under it anew."""
        if self.world > 1:
            self.model = DistributedDataParallel(self.network, **self.ddp)
            data_parallel(self.model, self.opt)

    def rows(self, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """This rank's rows of the batch, or of one of its micro-batches."""
        generator = torch.Generator().manual_seed(100 + self.steps)
        x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
        y = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
        mine = slice(self.rank * ROWS // self.world, (self.rank + 1) * ROWS // self.world)
        return x[mine][part::parts].to(self.dtype), y[mine][part::parts].to(self.dtype)

    def loss(self, part: int = 0, parts: int = 1, branch: bool = True) -> Tensor:
        x, y = self.rows(part, parts)
        return (self.model(x, branch) - y).square().mean() / parts

    def no_sync(self) -> Any:
        return self.model.no_sync() if self.world > 1 else nullcontext()

    def snapshot(self) -> dict[str, Any]:
        state = self.opt.state_dict()["state"]
        return {
            "weights": [param.detach().clone() for param in self.params],
            "buffers": [buffer.clone() for buffer in self.network.buffers()],
            "state": {i: {name: torch.as_tensor(v).clone() for name, v in of.items()} for i, of in state.items()},
            "skipped": self.opt.skipped_steps,
        }


def by_closure(replica: Replica) -> None:
    replica.opt.step(replica.loss)


def by_standard_closure(replica: Replica) -> None:
    def closure() -> Tensor:
        replica.opt.zero_grad()
        loss = replica.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(replica.params, 0.2)
        return loss

    replica.opt.step(closure)


def by_phases(replica: Replica, parts: int = 1) -> None:
    opt = replica.opt
    along_momentum = opt.defaults.get("ascent") == "momentum" or type(opt).__name__ == "MSassha"

    def backward() -> None:
        for part in range(parts):
            with replica.no_sync() if part < parts - 1 else nullcontext():
                replica.loss(part, parts).backward()
        nn.utils.clip_grad_norm_(replica.params, 0.2)

    if along_momentum:
        opt.perturb()
    elif "rho" in opt.defaults:
        backward()
        opt.perturb()
    with opt.hessian_pass():
        backward()
    opt.step()
    opt.zero_grad()


def by_phases_in_no_sync(replica: Replica) -> None:
    by_phases(replica, parts=2)


def by_list(replica: Replica) -> None:
    replica.opt.step([lambda part=part: replica.loss(part, 2) for part in range(2)])


def by_accumulating(replica: Replica) -> None:
    replica.opt.accumulate(lambda: replica.loss(0, 2))
    replica.opt.step(lambda: replica.loss(1, 2))


def by_parts_of_ranks(replica: Replica, branches: Callable[[int, int], bool] = lambda rank, steps: True) -> None:
    """In one process what two ranks do, each with statistics and branches of its own."""

    def loss_of(rank: int) -> Tensor:
        part = copy(replica)
        part.rank, part.world = rank, 2
        return part.loss(branch=branches(rank, replica.steps)) / 2

    replica.opt.step([lambda rank=rank: loss_of(rank) for rank in range(2)])


def branch_is_used(rank: int, steps: int) -> bool:
    """In every third step nobody uses the branch, in every other one rank does not."""
    return steps % 3 != 0 and (rank == 0 or steps % 3 == 2)


def with_some_unused(replica: Replica) -> None:
    if replica.world == 1:
        return by_parts_of_ranks(replica, branch_is_used)
    replica.opt.step(lambda: replica.loss(branch=branch_is_used(replica.rank, replica.steps)))


def difference(one: Any, other: Any) -> float:
    """The largest of weights, buffers and state, of two snapshots; infinite where they hold different things."""
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return math.inf
        return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
    if isinstance(one, (dict, list)):
        if len(one) != len(other) or (isinstance(one, dict) and one.keys() != other.keys()):
            return math.inf
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        return max((difference(one[key], other[key]) for key in keys), default=0.0)
    return 0.0 if one == other else math.inf


WAYS = {
    f.__name__: f for f in (by_closure, by_standard_closure, by_phases, by_phases_in_no_sync, by_list, by_accumulating)
}


def train(rank: int, world: int, way: str | Callable[[Replica], None], steps: int, **options: Any) -> dict[str, Any]:
    """What is left of some steps in one way."""
    replica = Replica(rank, world, **options)
    for _ in range(steps):
        (WAYS[way] if isinstance(way, str) else way)(replica)
        replica.steps += 1
    return replica.snapshot()
