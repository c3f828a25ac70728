"""The parameters of the groups, their names, and the graphs of their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from torch import Tensor

from .flat import Groups


def of_groups(groups: Groups) -> list[Tensor]:
    """Every parameter of the optimizer."""
    return [param for group in groups for param in group["params"]]


def grads_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of those that have one."""
    return [grad for param in params if (grad := param.grad) is not None]


def name_of(param: Tensor, groups: Groups) -> str:
    """A parameter as messages call it: by its name where the optimizer was given names, else by its place."""
    for number, group in enumerate(groups):
        for i, other in enumerate(group["params"]):
            if other is param:
                place = f"parameter {i} of group {number}"
                return repr(group["param_names"][i]) if "param_names" in group else f"{place}, {tuple(param.shape)}"
    raise KeyError("not a parameter of these groups")


def detach(params: Iterable[Tensor]) -> list[Tensor]:
    """Lets go of the graphs of their gradients, which form cycles with the parameters; returns those that had one."""
    holding = [param for param in params if param.grad is not None and param.grad.requires_grad]
    for param in holding:
        param.grad = param.grad.detach()  # type: ignore[union-attr]
    return grads_of(holding)


def take_graphs(params: Iterable[Tensor]) -> None:
    """Lets go of the graphs of gradients that somebody else may still have to use, and marks these."""
    for grad in detach(params):
        grad._graph_taken = True  # type: ignore[attr-defined]


def is_graph_taken(grad: Tensor) -> bool:
    """Whether the step of another optimizer has used the graph of this gradient."""
    return getattr(grad, "_graph_taken", False)


# Marks on the tensor itself: they end with it, where an id or an address may be another tensor's next, and a weak
# reference would keep torch from swapping the tensor. Each holds for the version that it was made in.
def refuse_used(grads: Iterable[Tensor], call: str) -> None:
    """ValueError where one of these was used by the step before."""
    if any(getattr(grad, "_used_in_version", None) == grad._version for grad in grads):
        raise ValueError(
            f"{call} found gradients that were used by the step before: a step() was called twice after one perturb(), "
            "or zero_grad() and the backward of this step are missing"
        )


def mark_droppable(params: Iterable[Tensor]) -> None:
    """Remembers that nothing is lost with the gradients of these: a closure's own, or cleared in place."""
    for param in params:
        if (grad := param.grad) is not None:
            grad._droppable_in_version = grad._version  # type: ignore[attr-defined]


def is_droppable(grad: Tensor) -> bool:
    """Whether nothing is lost with this gradient, nothing having been added to it since."""
    return getattr(grad, "_droppable_in_version", None) == grad._version


def drop_spent(params: Iterable[Tensor]) -> None:
    """Clears gradients that a step has used or that were cleared in place; ValueError where there are others."""
    left = [(param, param.grad) for param in params if param.grad is not None]
    used = any(getattr(grad, "_used_in_version", None) == grad._version for _, grad in left)
    if not used and not all(is_droppable(grad) for _, grad in left):
        raise ValueError(
            "perturb() along the momentum found gradients, of which it takes none: it comes before the one backward of "
            "a step. Call zero_grad(), perturb(), and then backward"
        )
    for param, _ in left:
        param.grad = None


def would_drop(params: Iterable[Tensor]) -> bool:
    """Whether somebody has left gradients that a closure's step would drop."""
    return not all(map(is_droppable, grads_of(params)))


def refuse_dropping() -> NoReturn:
    """ValueError: a closure's step would drop gradients."""
    raise ValueError(
        "step(closure) found gradients that it would drop: of a backward outside the closure, as in gradient "
        "accumulation, or left by a step without a closure, this optimizer's or another's. Several "
        "micro-batches: opt.accumulate(closure) for all but the last, or opt.step([closure, closure, ...]). If "
        "these gradients are not needed, call opt.zero_grad() before step(closure)"
    )


def refuse_clearing() -> NoReturn:
    """ValueError: the closure of a micro-batch has cleared the gradients of those before it."""
    raise ValueError(
        "the closure of a micro-batch has cleared the gradients of those before it: leave model.zero_grad() out of it; "
        "the optimizer clears gradients, and its own zero_grad() does nothing there"
    )
