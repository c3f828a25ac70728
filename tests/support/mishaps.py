"""What goes wrong in the steps of replicas, on one rank or on all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sassha_fused import Sassha, data_parallel
from tests.support.replicas import WAYS, Replica, by_closure, difference

# ---------------------------------------------------------------- refusals


def refusal(rank: int, act: Callable[..., Any], *arguments: Any, after: int = 0, **options: Any) -> tuple[str, float]:
    """The message of the error that a rank gets after some steps, and how far its weights are from what they were."""
    replica = Replica(rank, dist.get_world_size(), **options)
    before = steps(replica, after)
    try:
        act(replica, *arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", difference([p.detach() for p in replica.params], before)
    return "no error", 0.0


def steps(replica: Replica, count: int) -> list[Tensor]:
    """Takes some, and returns the weights."""
    for _ in range(count):
        by_closure(replica)
        replica.steps += 1
    replica.opt.zero_grad()
    return [param.detach().clone() for param in replica.params]


def whole_pass_in_no_sync(replica: Replica, way: str) -> None:
    def loss() -> Tensor:
        with replica.no_sync():
            return replica.loss()

    if way == "closure":
        replica.opt.step(loss)
    else:
        loss().backward()
        replica.opt.perturb()


def second_pass_in_no_sync(replica: Replica) -> None:
    replica.loss().backward()
    replica.opt.perturb()
    with replica.opt.hessian_pass(), replica.no_sync():
        replica.loss().backward()
    replica.opt.step()


def around_the_module(replica: Replica, way: str) -> None:
    """The second pass calls the module that DistributedDataParallel wraps."""
    passes = []

    def loss() -> Tensor:
        x, y = replica.rows()
        passes.append(1)
        return ((replica.model if len(passes) == 1 else replica.network)(x) - y).square().mean()

    if way == "closure":
        replica.opt.step(loss)
    else:
        loss().backward()
        replica.opt.perturb()
        with replica.opt.hessian_pass():
            loss().backward()
        replica.opt.step()


def thawed_on_the_way(replica: Replica) -> None:
    replica.network.branch.requires_grad_(True)
    by_closure(replica)


def thawed_too_early(replica: Replica) -> None:
    replica.model = DistributedDataParallel(replica.network)
    replica.network.branch.requires_grad_(True)
    data_parallel(replica.model, replica.opt)


def ignored_parameter(replica: Replica) -> None:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(replica.network, ["shift"])
    replica.wrap()
    by_closure(replica)


def parameter_outside(replica: Replica) -> None:
    scale = nn.Parameter(torch.ones((), dtype=replica.dtype))
    replica.opt.add_param_group({"params": [scale]})
    replica.opt.step(lambda: replica.loss() * scale)


def joined(replica: Replica) -> None:
    with replica.model.join():
        by_closure(replica)


def first_step(replica: Replica) -> None:
    by_closure(replica)


def other_options(replica: Replica, options: dict[str, Any]) -> None:
    """data_parallel() of an optimizer that differs on each rank."""
    mine = {name: values[replica.rank] for name, values in options.items()}
    data_parallel(replica.model, Sassha(replica.params, **{"lr": 0.05, **mine}))


def other_steps(replica: Replica) -> None:
    """As many steps in one process as the rank's number says, before the module is made."""
    before = [param.detach().clone() for param in replica.params]
    steps(replica, replica.rank)
    with torch.no_grad():
        for param, value in zip(replica.params, before):
            param.copy_(value)
    replica.wrap()


def wrong_module(replica: Replica) -> None:
    data_parallel(replica.network, replica.opt)


def wrong_optimizer(replica: Replica) -> None:
    data_parallel(replica.model, torch.optim.SGD(replica.params, lr=0.1))


def unknown_module(replica: Replica, way: str) -> None:
    """A Hessian step through a module that data_parallel() was not called for."""
    replica.model = DistributedDataParallel(replica.network)
    if way in ("by_closure", "by_standard_closure"):
        return WAYS[way](replica)
    try:
        if way == "by_phases":
            return WAYS[way](replica)
        replica.loss().backward()
        replica.opt.perturb()
        if way == "by hand":
            replica.loss().backward(create_graph=True)
        with replica.opt.hessian_pass(), replica.no_sync():
            replica.loss().backward()
    finally:
        replica.opt.restore()


# ---------------------------------------------------------------- a rank that is lost


def lost(rank: int, way: str, at: int, how: str, timeout: float, after: int = 3) -> tuple[str, float, float]:
    """Rank 1 raises an error or dies in a pass, counted from 0; what the other gets, its weights, and the seconds."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=timeout))  # which the error leaves unusable
    replica = Replica(rank, dist.get_world_size(), ddp={"process_group": group})
    before, passes, begun = steps(replica, after), [], time.monotonic()
    loss = replica.loss

    def losing(*arguments: Any) -> Tensor:
        passes.append(1)
        if rank == 1 and len(passes) == at + 1:
            os._exit(1) if how == "dies" else torch.zeros(2).sum(5)  # an IndexError
        return loss(*arguments)

    replica.loss = losing  # type: ignore[method-assign]
    try:
        WAYS[way](replica)
    except (IndexError, RuntimeError) as error:
        if way == "by_phases":
            replica.opt.restore()
        moved = difference([param.detach() for param in replica.params], before)
        return type(error).__name__, moved, time.monotonic() - begun
    return "no error", 0.0, 0.0


# ---------------------------------------------------------------- not finite


def poisoned(rank: int, way: str, step: int, at: int, only_loss: bool) -> tuple[int, float, dict[str, Any]]:
    """A loss on rank 1 that is NaN; how many steps were skipped, what that step changed, and what there is at the end.

    only_loss: its gradients are finite.
    """
    replica = Replica(rank, dist.get_world_size())
    loss, passes = replica.loss, []

    def poisoning(*arguments: Any) -> Tensor:
        passes.append(1)
        if not (rank == 1 and replica.steps == step and len(passes) == at + 1):
            return loss(*arguments)
        return loss(*arguments) + torch.nan if only_loss else loss(*arguments) * torch.nan

    replica.loss, moved = poisoning, 0.0  # type: ignore[method-assign]
    for replica.steps in range(7):
        before = [param.detach().clone() for param in replica.params]
        passes.clear()
        WAYS[way](replica)
        if replica.steps == step:
            moved = difference([param.detach() for param in replica.params], before)
    return replica.opt.skipped_steps, moved, replica.snapshot()
