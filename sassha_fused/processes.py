"""Replicas of a model under DistributedDataParallel: Hessian steps on all of them, bit for bit alike."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .flat import Groups
from .gradients import is_droppable, name_of, of_groups
from .replicated import Replicated, known, replicated
from .selection import Selection

if TYPE_CHECKING:
    from .run import Run

_WENT_AROUND = (
    "the last backward of the pass ran within no_sync(), or its forward around the module. Leave the last micro-batch "
    "of each pass out of no_sync(), and call model(x), not model.module(x)"
)
_UNKNOWN = (
    "DistributedDataParallel does not average it. It was frozen when the module was made, is ignored by it, or belongs "
    "to none that data_parallel() was called for: make the module anew, with this parameter in it"
)


def data_parallel(module: DistributedDataParallel, optimizer: Any) -> None:
    """Has an optimizer take its Hessian steps on all replicas of a module.

    DistributedDataParallel averages gradients while they are computed, which loses the graph that a Hessian step needs.
    On the pass of a Hessian step it now leaves them to this function: at the end of the backward, before any clipping,
    ``.grad`` becomes the mean over the replicas, and each replica keeps the graph of its own. The Hessian products are
    averaged once, and in closure style one scalar says on all replicas whether a step is skipped. Lazy steps stay as
    they are. Call it once after both are made, on every rank; ``no_sync()`` works as always.

    Args:
        module: whose parameters the optimizer trains; several modules or several optimizers: a call for each pair.
        optimizer: a member of the family, or a trainer's wrapper around it.

    Raises:
        TypeError: the module is not wrapped, or the optimizer is another.
        ValueError: the ranks disagree on a hyperparameter, the seed among them, or on the steps taken; or a parameter
            was thawed since the module was made, which does not average it.
    """
    if not isinstance(module, DistributedDataParallel):
        raise TypeError(f"module must be a DistributedDataParallel, got {type(module).__name__}")
    run = getattr(optimizer, "_run", None) or getattr(getattr(optimizer, "optimizer", None), "_run", None)
    if run is None:
        raise TypeError(f"optimizer must be one of sassha_fused, got {type(optimizer).__name__}")
    _refuse_thawed(module)
    _refuse_disagreement(module, run)
    replicated(module).runs.add(run)
    if run.processes is None:
        run.processes = Replicas()
    run.processes.add(replicated(module))


def _refuse_thawed(module: DistributedDataParallel) -> None:
    known = module._get_ddp_logging_data().get("num_parameter_tensors")
    trained = [param for param in module._module_parameters if param.requires_grad]
    if known is not None and known < len(trained):
        raise ValueError(
            f"module must average all {len(trained)} parameters that require grad, got one that averages {known}: the "
            "others were frozen when it was made. Make DistributedDataParallel anew after thawing"
        )


def _refuse_disagreement(module: DistributedDataParallel, run: Run) -> None:
    mine: dict[str, Any] = {"steps": run.counts.catch_up(), "hessian_evaluations": run.counts.evaluations}
    for number, group in enumerate(run.groups()):
        for name in run.flat.method.names:
            value = group[name]
            mine[f"{name} of group {number}"] = value.item() if isinstance(value, Tensor) else value
    everyone: list[Any] = [None] * dist.get_world_size(module.process_group)
    dist.all_gather_object(everyone, mine, group=module.process_group)
    for rank, theirs in enumerate(everyone):
        for name in dict.fromkeys([*mine, *theirs]):
            if theirs.get(name) != mine.get(name):
                raise ValueError(
                    f"{name} must be the same on all ranks, got {mine.get(name)!r} on this and {theirs.get(name)!r} on "
                    f"rank {rank}"
                )


def refuse_unknown_modules(run: Run) -> list[RemovableHandle]:
    """Until it is removed, a module under DistributedDataParallel that does not know of the run is refused."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    weak = weakref.ref(run)

    def refuse(module: nn.Module, _: object) -> None:
        if not isinstance(module, DistributedDataParallel) or not torch.is_grad_enabled():
            return
        if module not in known or weak() not in known[module].runs:
            raise ValueError(
                "the pass of a Hessian step through a module under DistributedDataParallel, whose hooks on gradients "
                "lose their graph, and in no_sync() the replicas would drift apart: call "
                "sassha_fused.data_parallel(module, opt) once, after both are made"
            )

    return [register_module_forward_pre_hook(refuse)]


class Replicas:
    """What an optimizer knows of the replicas of what it trains.

    Attributes:
        modules: those that data_parallel() was called for.
    """

    def __init__(self) -> None:
        self.modules: list[Replicated] = []
        self._seen: dict[Replicated, object] = {}

    def add(self, module: Replicated) -> None:
        """Takes in a module, in place of one that had the same parameters before."""
        others = [m for m in self.modules if m is not module and set(m.params).isdisjoint(module.params)]
        self.modules = [*others, module]

    def hold_back(self, local: bool) -> None:
        """Whether the gradients that come next stay on their replica."""
        for module in self.modules:
            module.local = local

    def refuse_unaveraged(self, groups: Groups) -> None:
        """ValueError where a gradient of the pass that is over is not the mean over the replicas."""
        averaged = {m: m.averaged is not None and m.averaged is not self._seen.get(m) for m in self.modules}
        self._seen = {module: module.averaged for module in self.modules}
        fine = {id(param): averaged[module] for module in self.modules for param in module.params}
        for param in of_groups(groups):
            if param.grad is None or fine.get(id(param)) or is_droppable(param.grad):
                continue
            raise ValueError(
                f"the gradient of {name_of(param, groups)} is not the mean over the replicas, which would drift apart: "
                + (_WENT_AROUND if id(param) in fine else _UNKNOWN)
            )

    def own(self, selections: Sequence[Selection]) -> list[Selection]:
        """What has a gradient of this replica's own, with it; where they were averaged that is not the one in .grad."""
        own = {param: grad for module in self.modules for param, grad in module.own.items()}
        averaged = {param for module in self.modules for param in module.means}
        chosen = []
        for selection in selections:
            mine = [own.get(p, None if p in averaged else p.grad) for p in selection.params]
            positions = [i for i, grad in enumerate(mine) if grad is not None]
            chosen.append(selection.at(positions).with_grads([mine[i] for i in positions]))  # type: ignore[misc]
        return [selection for selection in chosen if selection.grads]

    def let_go(self, params: Sequence[Tensor]) -> None:
        """The graphs of these parameters' gradients are no longer needed."""
        for module in self.modules:
            module.let_go(params)

    def mean(self, products: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The means of Hessian products over the replicas."""
        means = iter(self.modules[0].mean([product for of_bucket in products for product in of_bucket]))
        return [[next(means) for _ in of_bucket] for of_bucket in products]

    def agree(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """One scalar for all replicas, not finite where a loss is not on any of them."""
        module = self.modules[0]
        finite = torch.stack([torch.isfinite(loss).reshape(()) for loss in losses]).all()
        (share,) = module.mean([finite.to(module.params[0].device, torch.float32)])
        return [torch.where(share > 1 - 0.5 / dist.get_world_size(module.group), 0.0, torch.inf)]
