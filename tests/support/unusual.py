"""What replicas do beside the plain loop: loss scales, several optimizers, copies, other outputs, torch.compile."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sassha_fused import Sassha, data_parallel
from tests.support.replicas import WAYS, Replica, by_closure, difference


def steps(replica: Replica, count: int) -> None:
    for _ in range(count):
        by_closure(replica)
        replica.steps += 1


def scaled(rank: int, world: int, way: str, overflow: int | None = None) -> tuple[dict[str, Any], list[float]]:
    """Steps with a loss scale, one of which overflows on the last rank; what there is, and the scale after each."""
    replica, scaler = Replica(rank, world), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scales = []
    for replica.steps in range(7):
        inf = torch.inf if replica.steps == overflow and rank == world - 1 else 1.0
        if way == "closure":
            replica.opt.step(lambda: replica.loss() * inf, scaler=scaler)
        else:
            scaler.scale(replica.loss() * inf).backward()
            replica.opt.perturb(scaler=scaler)
            with replica.opt.hessian_pass():
                scaler.scale(replica.loss() * inf).backward()
            scaler.unscale_(replica.opt)
            scaler.step(replica.opt)
            replica.opt.zero_grad()
        scaler.update()
        scales.append(scaler.get_scale())
    return replica.snapshot(), scales


def two_optimizers(rank: int, world: int) -> dict[str, Any]:
    """Two optimizers of one module, of which one has its Hessian steps more often."""
    replica = Replica(rank, world)
    halves = [Sassha(replica.params[:3], lr=0.05, hessian_interval=2), Sassha(replica.params[3:], lr=0.05, seed=1)]
    replica.opt = halves[0]
    if world > 1:
        for half in halves:
            data_parallel(replica.model, half)
    for replica.steps in range(7):
        replica.loss().backward()
        for half in halves:
            half.perturb()
        with halves[0].hessian_pass(), halves[1].hessian_pass():
            replica.loss().backward()
        for half in halves:
            half.step()
            half.zero_grad()
    return {"weights": replica.params, "state": [half.state_dict()["state"] for half in halves]}


def two_modules(rank: int, world: int) -> dict[str, Any]:
    """One optimizer of two modules, the second of which sees what the first makes."""
    replica, second = Replica(rank, world), Replica(rank, world)
    second.network.last = nn.Linear(6, 5, dtype=torch.float64)
    second.network.shift = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    with torch.no_grad():
        for param in second.network.last.parameters():
            param.copy_(torch.linspace(-0.5, 0.5, param.numel(), dtype=torch.float64).view(param.shape))
    params = [*replica.params, *second.network.parameters()]
    opt, before = Sassha(params, lr=0.05, hessian_interval=3), nn.Module()
    before.model = DistributedDataParallel(second.network) if world > 1 else second.network
    if world > 1:
        data_parallel(replica.model, opt)
        data_parallel(before.model, opt)

    def loss() -> Tensor:
        x, y = replica.rows()
        return (replica.model(before.model(x)) - y).square().mean()

    for replica.steps in range(7):
        opt.step(loss)
    return {"weights": params, "state": opt.state_dict()["state"]}


def resumed(rank: int, world: int, path: str, way: str) -> float:
    """How far a run that goes on from a checkpoint of rank 0 is from one that was not interrupted."""
    replica = Replica(rank, world, ddp={"gradient_as_bucket_view": True})
    for replica.steps in range(5):
        WAYS[way](replica)
    if rank == 0:
        torch.save([replica.network.state_dict(), replica.opt.state_dict()], path)
    dist.barrier()
    again = Replica(rank, world, ddp={"gradient_as_bucket_view": True})
    network, optimizer = torch.load(path, weights_only=True)
    again.network.load_state_dict(network)
    again.opt.load_state_dict(optimizer)
    for run in (replica, again):
        for run.steps in range(5, 12):
            WAYS[way](run)
    return difference(replica.snapshot(), again.snapshot())


def thawed_and_wrapped_anew(rank: int, world: int) -> dict[str, Any]:
    replica = Replica(rank, world, frozen=True)
    steps(replica, 4)
    replica.network.branch.requires_grad_(True)
    replica.wrap()
    steps(replica, 4)
    return replica.snapshot()


def trained_copy(rank: int, world: int) -> dict[str, Any]:
    """Steps of a copy that is made on the way, with an optimizer of its own."""
    replica = Replica(rank, world)
    steps(replica, 5)
    _train_copy(replica)
    return replica.snapshot()


def _train_copy(replica: Replica) -> None:
    replica.model = copy.deepcopy(replica.model)
    replica.params = list(replica.model.parameters())
    replica.opt = Sassha(replica.params, lr=0.05, hessian_interval=3, eps=1e-2)
    if replica.world > 1:
        data_parallel(replica.model, replica.opt)
    steps(replica, 5)


def averaged_model(rank: int, world: int) -> tuple[dict[str, Any], float]:
    """An average of the weights on the way, which copies the module with its hooks, and then steps of a copy."""
    replica = Replica(rank, world)
    average = AveragedModel(replica.model)
    total = [torch.zeros_like(param) for param in replica.params]
    for replica.steps in range(5):
        by_closure(replica)
        average.update_parameters(replica.model)
        for running, param in zip(total, replica.params):
            running += param.detach() / 5
    error = difference([param.detach() for param in average.parameters()], total)
    replica.steps += 1
    _train_copy(replica)
    return replica.snapshot(), error


def with_comm_hook(rank: int, world: int) -> tuple[dict[str, Any], list[int]]:
    """How often a communication hook is called in each step."""
    replica, calls, counts = Replica(rank, world), [], []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
        calls.append(1)
        flat = bucket.buffer().div_(world)
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda future: future.value()[0])

    replica.model.register_comm_hook(None, hook)
    for replica.steps in range(7):
        by_closure(replica)
        counts.append(len(calls))
        calls.clear()
    return replica.snapshot(), counts


def evaluating_between(replica: Replica) -> None:
    """Phases, and between them the module runs under no_grad."""
    opt = replica.opt

    def evaluate() -> None:
        with torch.no_grad():
            replica.loss()

    evaluate()
    replica.loss().backward()
    evaluate()
    opt.perturb()
    evaluate()
    with opt.hessian_pass():
        loss = replica.loss()
        evaluate()
        loss.backward()
    evaluate()
    opt.step()
    opt.zero_grad()


def synced_each_time(replica: Replica) -> None:
    """Two micro-batches, both of which are averaged."""
    opt = replica.opt
    for is_second in (False, True):
        with opt.hessian_pass() if is_second else nullcontext():
            for part in range(2):
                replica.loss(part, 2).backward()
        opt.step() if is_second else opt.perturb()
    opt.zero_grad()


def repeated(replica: Replica) -> None:
    """The second pass is dropped and taken anew."""
    opt = replica.opt
    replica.loss().backward()
    opt.perturb()
    with opt.hessian_pass():
        replica.loss(0, 2).backward()
        opt.zero_grad()
        replica.loss().backward()
    opt.step()
    opt.zero_grad()


def two_backwards_after_two_forwards(replica: Replica) -> None:
    opt = replica.opt
    replica.loss().backward()
    opt.perturb()
    with opt.hessian_pass():
        losses = [replica.loss(part, 2) for part in range(2)]
        for loss in losses:
            loss.backward()
    opt.step()
    opt.zero_grad()


def regrouped(rank: int, world: int) -> dict[str, Any]:
    """Every rank in a group of its own, and then the module made anew in one group."""
    groups = [dist.new_group([other]) for other in range(world)]
    replica = Replica(rank, world, ddp={"process_group": groups[rank]})
    replica.ddp = {}
    replica.wrap()
    steps(replica, 5)
    return replica.snapshot()


def modules_in_turn(rank: int, world: int) -> dict[str, Any]:
    """Every other step leaves one of two modules out, whose gradients are cleared to zeros."""
    replicas = [Replica(rank, world), Replica(rank, world)]
    opt = Sassha([param for replica in replicas for param in replica.params], lr=0.05, hessian_interval=3, eps=1e-2)
    for replica in replicas if world > 1 else ():
        data_parallel(replica.model, opt)
    for step in range(6):
        opt.zero_grad(set_to_none=False)
        for is_second in (False, True):
            with opt.hessian_pass() if is_second else nullcontext():
                for replica in replicas[: 1 + step % 2]:
                    replica.steps = step
                    replica.loss().backward()
            opt.step() if is_second else opt.perturb()
    return {"weights": [param for replica in replicas for param in replica.params], "state": opt.state_dict()["state"]}


def buffers_before_an_evaluation(rank: int, world: int) -> list[Tensor]:
    """The running statistics that an evaluation after a Hessian step of one pass sees."""
    replica = Replica(rank, world, member="MSassha", norm=True)
    steps(replica, 4)
    replica.model.eval()
    with torch.no_grad():
        replica.loss()
    return list(replica.network.buffers())


def held_after_steps(rank: int, world: int) -> list[bool]:
    """Whether the graph of each step lives on after it; the optimizer trains a part of the module."""
    replica, held = Replica(rank, world), []
    replica.opt = Sassha(replica.params[3:], lr=0.05, hessian_interval=2)
    data_parallel(replica.model, replica.opt)
    gc.disable()
    for replica.steps in range(4):
        x, y = replica.rows()
        inputs = x.clone()
        alive = weakref.ref(inputs)
        replica.opt.step(lambda inputs=inputs: (replica.model(inputs) - y).square().mean())
        del inputs
        held.append(alive() is not None)
    gc.enable()
    return held


def forward_twice(replica: Replica) -> None:
    replica.opt.step(lambda: replica.loss(0, 2) + replica.loss(1, 2))


def penalized(replica: Replica) -> None:
    """A penalty on the gradient by the inputs, which torch.autograd.grad() asks for."""

    def closure() -> Tensor:
        x, y = replica.rows()
        x.requires_grad_(True)
        out = replica.model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return (out - y).square().mean() + slope.square().mean()

    replica.opt.step(closure)


@dataclass
class Output:
    value: Tensor


class Opaque:
    def __init__(self, value: Tensor) -> None:
        self.value = value


WRAPPINGS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda value: {"value": value}, lambda output: output["value"]),
    "tuple": (lambda value: (None, [value]), lambda output: output[1][0]),
    "dataclass": (Output, lambda output: output.value),
    "opaque": (Opaque, lambda output: output.value),
}


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, x: Tensor) -> Any:
        return WRAPPINGS[self.kind][0](self.network(x))


def of_outputs(rank: int, world: int, kind: str) -> dict[str, Any]:
    replica = Replica(rank, world)
    model: Any = Wrapped(replica.network, kind)
    if world > 1:
        model = DistributedDataParallel(model)
        data_parallel(model, replica.opt)

    def closure() -> Tensor:
        x, y = replica.rows()
        return (WRAPPINGS[kind][1](model(x)) - y).square().mean()

    for replica.steps in range(7):
        replica.opt.step(closure)
    return replica.snapshot()


def compiled(rank: int, world: int, inside: bool) -> dict[str, Any]:
    """torch.compile() of the module under DistributedDataParallel, or of what it wraps."""
    replica = Replica(rank, world)
    if inside:
        replica.network.compile(backend="aot_eager")
    else:
        replica.model = torch.compile(replica.model, backend="aot_eager")
    steps(replica, 7)
    return replica.snapshot()


@contextmanager
def one_rank(store: str) -> Iterator[None]:
    """This process as the only one of a group."""
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def alone(wrapper: Callable[[Any], Any] = lambda opt: opt) -> Replica:
    """One process under DistributedDataParallel; wrapper: what a trainer puts around the optimizer."""
    replica = Replica(0, 1)
    replica.model = DistributedDataParallel(replica.network)
    data_parallel(replica.model, wrapper(replica.opt))
    return replica


def train_alone(way: str, steps: int) -> dict[str, Any]:
    replica = alone()
    for replica.steps in range(steps):
        WAYS[way](replica)
    return replica.snapshot()
