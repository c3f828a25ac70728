"""A module under DistributedDataParallel: on Hessian steps its gradients are averaged after their graph is built."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .gradients import of_groups

if TYPE_CHECKING:
    from .run import Run

# Those that data_parallel() was called for.
known: weakref.WeakKeyDictionary[DistributedDataParallel, Replicated] = weakref.WeakKeyDictionary()


# Functions, not methods: copies and pickles of a module take its hooks along, and know of no optimizer.
def _before_forward(module: Any, _: object) -> None:
    if torch.is_grad_enabled() and (found := known.get(module)) is not None:
        found.before_forward(module)


def _after_forward(module: Any, *_: object) -> None:
    if (found := known.get(module)) is not None:
        found.after_forward(module)


def replicated(module: DistributedDataParallel) -> Replicated:
    """What is known of a module, which is hooked the first time."""
    if module not in known:
        known[module] = Replicated(module)
    if _before_forward not in module._forward_pre_hooks.values():  # which a copy has already
        module.register_forward_pre_hook(_before_forward)
        module.register_forward_hook(_after_forward, always_call=True)
    return known[module]


class Replicated:
    """A module under DistributedDataParallel, and the gradients that its replica has of its own on a Hessian step.

    Attributes:
        params: those that are averaged.
        group: the process group.
        runs: records of the optimizers that train it.
        local: whether gradients stay on their replica, those of a micro-batch that is not the last.
        own: this replica's gradients of the last pass, with their graph, before they were averaged.
        means: what .grad became of them.
        averaged: marks the last pass whose gradients are means; None where those of the last backward are not.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        self.params = [param for param in module._module_parameters if param.requires_grad]
        self.group = module.process_group
        self.runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self.local = False
        self.own: dict[Tensor, Tensor] = {}
        self.averaged: object | None = None
        self.means: dict[Tensor, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._some_unused = self._takes_over = self._averages = self._queued = self._asked = False

    def before_forward(self, module: Any) -> None:
        """Has the module leave this pass's gradients alone, where they are those of a Hessian step or a micro-batch."""
        takes_over = self.local or any(run.builds_graph for run in self.runs)
        if takes_over and module.static_graph and not module._static_graph_delay_allreduce_enqueued:
            raise ValueError(
                "static_graph=True learns from the first backward, which must not be that of a Hessian step or of "
                "one of several micro-batches: run one forward and backward, and opt.zero_grad(), before step()"
            )
        if module._join_config.enable:
            raise ValueError("join() does not know of the means over Hessian products: give all ranks as many batches")
        syncs = module.require_backward_grad_sync and not self.local
        self.averaged = object() if syncs and not takes_over else None
        self._takes_over, self._averages = takes_over, takes_over and syncs
        if takes_over:
            self._asked, module.require_backward_grad_sync = module.require_backward_grad_sync, False

    def after_forward(self, module: Any) -> None:
        """Whatever was set for the forward is as before; the backward will average the gradients."""
        if not self._takes_over:
            return
        self._takes_over = False
        module.require_backward_grad_sync = self._asked
        if self._averages:
            module.require_forward_param_sync = True
            self._some_unused = module.find_unused_parameters or module.static_graph
            self._queued = False
            self.own = {param: own for param, own in self.own.items() if param.grad is self.means.get(param)}
            self._hooks = self._hooks or [
                param.register_post_accumulate_grad_hook(self._queue_average)
                for param in self.params
                if param.requires_grad
            ]

    def _queue_average(self, _: Tensor) -> None:
        if not self._queued and self._averages:
            self._queued = True
            Variable._execution_engine.queue_callback(self._average)

    def _average(self) -> None:
        """Puts the gradients aside whose graph is this replica's, and their mean in .grad."""
        self._queued = False
        params = [param for param in self.params if param.requires_grad]
        grads = {param: param.grad for param in params if param.grad is not None}
        self._keep(grads)
        with torch.no_grad():
            tensors = [grads[p].detach() if p in grads else torch.zeros_like(p) for p in params]
            if self._some_unused:
                used = torch.tensor([param in grads for param in params], dtype=torch.float32, device=params[0].device)
                *tensors, used = self.mean([*tensors, used])
                # What no replica has used has no gradient, as on other steps.
                means = {p: mean for p, mean, share in zip(params, tensors, used.tolist(), strict=True) if share > 0}
            else:
                means = dict(zip(params, self.mean(tensors), strict=True))
            for param in params:
                param.grad = means.get(param)
        self.means = means
        self.averaged = object()

    def _keep(self, grads: dict[Tensor, Tensor]) -> None:
        # After a backward whose gradients were averaged without their graph, another adds its own to their means.
        wanted = {param for run in self.runs if run.builds_graph for param in of_groups(run.groups())}
        with torch.enable_grad():
            for param in wanted.intersection(grads):
                before = self.own.get(param)
                self.own[param] = grads[param] if before is None else before + grads[param]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their means over the replicas: a flat all-reduce for each device and dtype."""
        means: list[Tensor] = [torch.empty_like(tensor) for tensor in tensors]
        kinds = [(tensor.device, tensor.dtype) for tensor in tensors]
        for kind in dict.fromkeys(kinds):
            of_kind = [i for i, other in enumerate(kinds) if other == kind]
            flat = torch.cat([tensors[i].reshape(-1) for i in of_kind])
            flat /= dist.get_world_size(self.group)
            dist.all_reduce(flat, group=self.group)
            for i, part in zip(of_kind, flat.split([tensors[i].numel() for i in of_kind]), strict=True):
                means[i].copy_(part.view(tensors[i].shape))
        return means

    def let_go(self, params: Sequence[Tensor]) -> None:
        """The graphs of these parameters' gradients are no longer needed."""
        for param in params:
            self.own.pop(param, None)
            self.means.pop(param, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
