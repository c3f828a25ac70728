"""Replicas of a model under DistributedDataParallel: Hessian steps on all of them, bit for bit alike."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _find_tensors
from torch.utils.hooks import RemovableHandle

from .selection import Selection

if TYPE_CHECKING:
    from .run import Run

_replicated: weakref.WeakKeyDictionary[DistributedDataParallel, Replicated] = weakref.WeakKeyDictionary()


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
        ValueError: the ranks disagree on the schedule of Hessian steps, on the seed or on the steps taken.
    """
    if not isinstance(module, DistributedDataParallel):
        raise TypeError(f"module must be a DistributedDataParallel, got {type(module).__name__}")
    run = getattr(optimizer, "_run", None)
    if run is None:
        raise TypeError(f"optimizer must be one of sassha_fused, got {type(optimizer).__name__}")
    _refuse_disagreement(module, run)
    if module not in _replicated:
        _replicated[module] = Replicated(module)
    _replicated[module].runs.add(run)
    if run.processes is None:
        run.processes = Replicas()
    if _replicated[module] not in run.processes.modules:
        run.processes.modules.append(_replicated[module])


def _refuse_disagreement(module: DistributedDataParallel, run: Run) -> None:
    group = run.groups()[0]
    mine = {name: group[name] for name in run.flat.method.shared}
    mine |= {"steps": run.counts.catch_up(), "evaluations": run.counts.evaluations}
    everyone: list[Any] = [None] * dist.get_world_size(module.process_group)
    dist.all_gather_object(everyone, mine, group=module.process_group)
    for rank, theirs in enumerate(everyone):
        for name, value in mine.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {value!r} on this and {theirs[name]!r} on rank {rank}"
                )


def refuse_unknown_modules(run: Run) -> list[RemovableHandle]:
    """Until it is removed, a module under DistributedDataParallel that does not know of the run is refused."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    weak = weakref.ref(run)

    def refuse(module: nn.Module, _: object) -> None:
        if not isinstance(module, DistributedDataParallel) or not torch.is_grad_enabled():
            return
        known = _replicated.get(module)
        if known is None or weak() not in known.runs:
            raise ValueError(
                "the pass of a Hessian step through a module under DistributedDataParallel, whose hooks on gradients "
                "lose their graph, and in no_sync() the replicas would drift apart: call "
                "sassha_fused.data_parallel(module, opt) once, after both are made"
            )

    return [register_module_forward_pre_hook(refuse)]


class Replicated:
    """A module under DistributedDataParallel, and the gradients that its replica has of its own on a Hessian step.

    Attributes:
        runs: records of the optimizers that train it.
        local: whether gradients stay on their replica, those of a micro-batch that is not the last.
        own: this replica's gradients of the last pass, with their graph, before they were averaged.
        synced: whether the last backward averages gradients; None where none has begun since anybody asked.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = weakref.ref(module)
        self.runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self.local = False
        self.own: dict[Tensor, Tensor] = {}
        self.synced: bool | None = None
        self._takes_over = self._averages = self._queued = False
        module.register_forward_pre_hook(self._before_forward)
        module.register_forward_hook(self._after_forward, always_call=True)

    @property
    def params(self) -> list[Tensor]:
        """Those that are averaged."""
        return [param for param in self._module()._module_parameters if param.requires_grad]  # type: ignore[union-attr]

    def _before_forward(self, module: Any, _: object) -> None:
        if not torch.is_grad_enabled():
            return
        syncs = module.require_backward_grad_sync and not self.local
        self.synced = syncs
        self._takes_over = self.local or any(run.builds_graph for run in self.runs)
        self._averages = self._takes_over and syncs
        if self._takes_over:
            if module.static_graph and not module._static_graph_delay_allreduce_enqueued:
                raise ValueError(
                    "static_graph=True learns from the first backward, which must not be that of a Hessian step or of "
                    "one of several micro-batches: run one forward and backward, and opt.zero_grad(), before step()"
                )
            self._asked, module.require_backward_grad_sync = module.require_backward_grad_sync, False

    def _after_forward(self, module: Any, _: object, output: Any) -> None:
        if not self._takes_over:
            return
        self._takes_over = False
        module.require_backward_grad_sync = self._asked
        module.require_forward_param_sync = True
        if self._averages:
            self._queued = False
            for tensor in _find_tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._queue_average)

    def _queue_average(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """Puts the gradients aside whose graph is this replica's, and their mean in .grad."""
        params = self.params
        own = {param: param.grad for param in params if param.grad is not None}
        self.own = own
        used = torch.tensor([param in own for param in params], dtype=torch.float32, device=params[0].device)
        *means, used = self.mean([*(own[p].detach() if p in own else torch.zeros_like(p) for p in params), used])
        some_unused = self._module().find_unused_parameters  # type: ignore[union-attr]
        shares = used.tolist() if some_unused else [1.0] * len(params)
        for param, mean, share in zip(params, means, shares, strict=True):
            param.grad = mean if share > 0 else None  # where no replica has used it, it has none, as on other steps

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their means over the replicas: a flat all-reduce for each dtype."""
        group = self._module().process_group  # type: ignore[union-attr]
        means: list[Tensor] = [torch.empty_like(tensor) for tensor in tensors]
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            of_dtype = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in of_dtype])
            flat /= dist.get_world_size(group)
            dist.all_reduce(flat, group=group)
            for i, part in zip(of_dtype, flat.split([tensors[i].numel() for i in of_dtype]), strict=True):
                means[i].copy_(part.view(tensors[i].shape))
        return means


class Replicas:
    """What an optimizer knows of the replicas of what it trains.

    Attributes:
        modules: those that data_parallel() was called for.
    """

    def __init__(self) -> None:
        self.modules: list[Replicated] = []

    def hold_back(self, local: bool) -> None:
        """Whether the gradients that come next stay on their replica."""
        for module in self.modules:
            module.local = local

    def refuse_unsynced(self) -> None:
        """ValueError where the gradients of the last pass stayed on their replica."""
        unsynced = [module.synced is False for module in self.modules]
        for module in self.modules:
            module.synced = None
        if any(unsynced):
            raise ValueError(
                "the last backward of a pass ran within no_sync(): its gradients were not averaged, and the replicas "
                "would drift apart. Leave the last micro-batch of each pass out of no_sync()"
            )

    def own(self, selections: Sequence[Selection]) -> list[Selection]:
        """What has a gradient of this replica's own, with it; where they were averaged that is not the one in .grad."""
        own = {param: grad for module in self.modules for param, grad in module.own.items()}
        averaged = {param for module in self.modules if module.own for param in module.params}
        chosen = []
        for selection in selections:
            mine = [own.get(p, None if p in averaged else p.grad) for p in selection.params]
            positions = [i for i, grad in enumerate(mine) if grad is not None]
            chosen.append(selection.at(positions).with_grads([mine[i] for i in positions]))  # type: ignore[misc]
        return [selection for selection in chosen if selection.grads]

    def let_go(self, params: Sequence[Tensor]) -> None:
        """The graphs of these parameters' gradients are no longer needed."""
        for module in self.modules:
            for param in params:
                module.own.pop(param, None)

    def mean(self, products: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The means of Hessian products over the replicas."""
        means = iter(self.modules[0].mean([product for of_bucket in products for product in of_bucket]))
        return [[next(means) for _ in of_bucket] for of_bucket in products]

    def agree(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """One scalar for all replicas, not finite where a loss is not on any of them."""
        finite = torch.stack([torch.isfinite(loss).reshape(()) for loss in losses]).all()
        (share,) = self.modules[0].mean([finite.to(torch.float32)])
        return [torch.where(share > 1 - 0.5 / self._count, 0.0, torch.inf)]

    @property
    def _count(self) -> int:
        return dist.get_world_size(self.modules[0]._module().process_group)  # type: ignore[union-attr]
