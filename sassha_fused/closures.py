"""A step taken by a closure: one evaluation for each pass, of either kind of closure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .gradients import mark_droppable
from .step import Step

Closure = Callable[[], Tensor]

_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")


def walk(step: Step, closure: Closure, params: Sequence[Tensor]) -> Tensor:
    """Evaluates the closure for as many passes as the step needs, and finishes it; returns the first pass's loss."""
    losses = []
    step.begin()
    while True:
        with step.around_pass():
            losses.append(evaluate(closure, params))
        step.run.refuse_interference(step)
        if not step.arrive():
            break
    step.finish(losses)
    mark_droppable(params)
    return losses[0]


@torch.enable_grad()
def evaluate(closure: Closure, params: Sequence[Tensor]) -> Tensor:
    """One pass: the closure, and backward unless the closure has run it; returns the loss, detached."""
    for param in params:
        param.grad = None
    loss = closure()
    if not isinstance(loss, Tensor):
        raise TypeError(f"closure must return the loss as a tensor, got {loss!r}")
    if loss.numel() != 1:
        raise ValueError(f"closure must return a scalar loss, got a tensor of shape {tuple(loss.shape)}")
    if all(param.grad is None for param in params):
        trainable = any(map(_requires_grad, params))
        if trainable and not loss.requires_grad:
            raise ValueError(
                "closure must return a loss that requires grad, or call loss.backward() itself; got one "
                "that was detached or computed under torch.no_grad()"
            )
        try:
            if loss.requires_grad:
                loss.backward()
        except RuntimeError as error:
            # Where all is frozen, a closure that runs backward itself leaves nothing to know it by.
            if trainable or "backward through the graph a second time" not in str(error):
                raise
    return loss.detach()


def ends_step(closure: Callable[[], object], params: Sequence[Tensor]) -> bool:
    """Whether a closure that does nothing, as Lightning makes, stands for none at the end of a step in phase style."""
    if all(param.grad is None for param in params):
        return False
    if closure() is not None:
        raise ValueError(
            "step(closure) after perturb() and a second backward: the step under way would be dropped. Call step() "
            "without a closure, or restore() and zero_grad() first"
        )
    return True
