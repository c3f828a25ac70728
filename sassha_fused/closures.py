"""A step taken by a closure: one evaluation for each pass, of either kind of closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .step import Step, is_used, mark_used

Closure = Callable[[], Tensor]

_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")


def walk(step: Step, closure: Closure, params: Sequence[Tensor]) -> Tensor:
    """Evaluates the closure for as many passes as the step needs, and finishes it; returns the first pass's loss."""
    losses = []
    step.begin()
    while True:
        with step.gradients():
            losses.append(evaluate(closure, params))
        step.refuse_given_up()
        if not step.arrive():
            break
    step.finish(losses)
    mark_used(map(_grad, params))  # those that took no part as well: the next step drops them
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


def refuse_accumulated(params: Iterable[Tensor]) -> None:
    """ValueError where somebody has left gradients that a closure's step would drop."""
    for param in params:
        if param.grad is not None and not is_used(param.grad):
            raise ValueError(
                "step(closure) found gradients that it would drop: of a backward outside the closure, as in gradient "
                "accumulation, which is not supported yet, or left by another optimizer's step. Have the closure "
                "return the sum of the losses of all micro-batches; or, if these gradients are not needed, call "
                "opt.zero_grad() before step(closure)"
            )
