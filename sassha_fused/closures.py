"""A step taken by closures: one evaluation of each for each pass, of either kind of closure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .curvature.taking import take_part
from .gradients import detach, mark_droppable, refuse_dropping
from .micro_batches import Arrivals
from .step import Step

Closure = Callable[[], Tensor]

_requires_grad = attrgetter("requires_grad")


def closures_of(closure: Any) -> list[Closure]:
    """What step() is given, as a list; TypeError where it is neither a closure nor several."""
    closures = list(closure) if isinstance(closure, (list, tuple)) else [closure]
    if not closures or not all(map(callable, closures)):
        raise TypeError(f"closure must be callable, or a list of callables, got {closure!r}")
    return closures


def walk(step: Step, closures: Sequence[Closure], params: Sequence[Tensor]) -> Tensor:
    """Evaluates the closures, one for each micro-batch, for as many passes as the step needs, and finishes it.

    Those that accumulate() was given have been through the first pass. Returns the loss of this pass, summed.
    """
    every = [*step.micro_batches.closures, *closures]
    step.micro_batches.count = len(every)
    _begin_or_go_on(step)
    losses = [_sum([*step.micro_batches.losses, *evaluate_each(step, closures, params, ends=True)])]
    while step.arrive():
        step.micro_batches.refuse_rebound()
        if step.scale is not None:
            step.scale.await_gradients()
        losses.append(_sum(evaluate_each(step, every, params, ends=True)))
    step.finish(losses if step.run.processes is None else step.run.processes.agree(losses))
    mark_droppable(params)
    return losses[0]


def accumulate(step: Step, closures: Sequence[Closure], params: Sequence[Tensor]) -> Tensor:
    """The first pass of micro-batches that are not the last of their step; returns their loss."""
    _begin_or_go_on(step)
    losses = evaluate_each(step, closures, params, ends=False)
    step.micro_batches.keep(closures, losses)
    if step.perturbed:  # along the momentum; meanwhile somebody may evaluate the model, or save it
        step.swap()
        step.micro_batches.back_at_w = True
    return _sum(losses)


def _begin_or_go_on(step: Step) -> None:
    """Before the first micro-batch of a step, or the next."""
    if not step.micro_batches.closures:
        step.begin()
    elif step.micro_batches.back_at_w:
        step.swap()
        step.micro_batches.back_at_w = False


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return sum(losses[1:], losses[0])  # of one element each, in whatever shape


def evaluate_each(step: Step, closures: Sequence[Closure], params: Sequence[Tensor], ends: bool) -> list[Tensor]:
    """A pass of several micro-batches, or a part of one: their gradients are summed in .grad.

    ends: whether the last of these is the last of the pass.
    """
    losses, processes = [], step.run.processes
    for i, closure in enumerate(closures):
        is_last = ends and i == len(closures) - 1
        if processes is not None:
            processes.hold_back(not is_last)
        step.micro_batches.in_one_of_several = several = not is_last or step.micro_batches.arrivals is not None
        with step.around_pass():
            losses.append(evaluate(closure, params, step))
        step.micro_batches.in_one_of_several = False
        step.run.refuse_interference(step)
        if several:
            _take_in(step, params, is_last)
    if processes is not None:
        processes.hold_back(False)
        if ends:
            processes.refuse_unaveraged(step.groups)
    return losses


def _take_in(step: Step, params: Sequence[Tensor], is_last: bool) -> None:
    """Takes in one of the several micro-batches of a pass; its gradients stay for the next to add to."""
    batches, takes = step.micro_batches, step.awaits_products
    had_graph = not takes and bool(detach(params))  # of a closure that builds one unasked
    if batches.arrivals is not None:
        batches.arrivals.refuse_cleared(params, in_place=not takes and not had_graph)
        batches.arrivals = None  # not kept while products are taken
    if takes:
        take_part(step, is_last)
    if step.scale is not None and not is_last:
        step.scale.next_micro_batch()
    batches.arrivals = None if is_last else Arrivals(params)


@torch.enable_grad()
def evaluate(closure: Closure, params: Sequence[Tensor], step: Step) -> Tensor:
    """One pass: the closure, and backward unless the closure has run it; returns the loss, detached."""
    scale, before = step.scale, step.micro_batches.arrivals
    if before is None:
        for param in params:
            param.grad = None
    else:
        before.refuse_others(params)
    with scale.around_closure() if scale is not None else nullcontext():
        loss = closure()
    if not isinstance(loss, Tensor):
        raise TypeError(f"closure must return the loss as a tensor, got {loss!r}")
    if loss.numel() != 1:
        raise ValueError(f"closure must return a scalar loss, got a tensor of shape {tuple(loss.shape)}")
    if all(param.grad is None for param in params) if before is None else before.are_all(params):
        _run_backward(loss, params, step)
    elif scale is not None:
        scale.refuse_unscaled_backward()
    return loss.detach()


def _run_backward(loss: Tensor, params: Sequence[Tensor], step: Step) -> None:
    trainable = any(map(_requires_grad, params))
    if trainable and not loss.requires_grad:
        raise ValueError(
            "closure must return a loss that requires grad, or call loss.backward() itself; got one "
            "that was detached or computed under torch.no_grad()"
        )
    try:
        if loss.requires_grad:
            (loss if step.scale is None else step.scale.scaled(loss)).backward()
    except RuntimeError as error:
        # Where all is frozen, a closure that runs backward itself leaves nothing to know it by.
        if trainable or "backward through the graph a second time" not in str(error):
            raise


def ends_step(closures: Sequence[Closure], params: Sequence[Tensor], perturbed: bool) -> bool:
    """Whether a closure that does nothing, as Lightning makes, stands for none at the end of a step in phase style."""
    if all(param.grad is None for param in params):
        return False
    if len(closures) > 1 or closures[0]() is not None:
        if not perturbed:
            refuse_dropping()
        raise ValueError(
            "step(closure) after perturb() and a second backward: the step under way would be dropped. Call step() "
            "without a closure, or restore() and zero_grad() first"
        )
    return True
