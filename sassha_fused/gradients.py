"""The parameters of the groups, their names, and the graphs of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

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


def detach(params: Iterable[Tensor]) -> None:
    """Lets go of the graphs of their gradients, which form cycles with the parameters."""
    for param in params:
        if param.grad is not None and param.grad.requires_grad:
            param.grad = param.grad.detach()


def take_graphs(params: Iterable[Tensor]) -> None:
    """Lets go of the graphs of gradients that somebody else may still have to use, and marks these."""
    for param in params:
        if param.grad is not None and param.grad.requires_grad:
            param.grad = param.grad.detach()
            param.grad._graph_taken = True  # type: ignore[attr-defined]


def is_graph_taken(grad: Tensor) -> bool:
    """Whether the step of another optimizer has used the graph of this gradient."""
    return getattr(grad, "_graph_taken", False)


# A mark on the tensor itself: it ends with it, where an id or an address may be another tensor's next, and a weak
# reference would keep torch from swapping the tensor.
def mark_used(grads: Iterable[Tensor]) -> None:
    """Remembers that a step has used these gradients as they now are."""
    for grad in grads:
        grad._used_in_version = grad._version  # type: ignore[attr-defined]


def is_used(grad: Tensor) -> bool:
    """Whether a step has used this gradient, and nobody has written into it since."""
    used: bool = getattr(grad, "_used_in_version", None) == grad._version
    return used


def mark_cleared(params: Iterable[Tensor]) -> None:
    """Remembers that the gradients of these are 0, cleared in place, and that nothing is lost with them."""
    for grad in grads_of(params):
        grad._cleared_in_version = grad._version  # type: ignore[attr-defined]


def _is_cleared(grad: Tensor) -> bool:
    cleared: bool = getattr(grad, "_cleared_in_version", None) == grad._version
    return cleared


def refuse_used(grads: Iterable[Tensor], call: str) -> None:
    """ValueError where one of these was used by the step before."""
    if any(map(is_used, grads)):
        raise ValueError(
            f"{call} found gradients that were used by the step before: a step() was called twice after one perturb(), "
            "or zero_grad() and the backward of this step are missing"
        )


def refuse_accumulated(params: Iterable[Tensor]) -> None:
    """ValueError where somebody has left gradients that a closure's step would drop."""
    for grad in grads_of(params):
        if not is_used(grad) and not _is_cleared(grad):
            raise ValueError(
                "step(closure) found gradients that it would drop: of a backward outside the closure, as in gradient "
                "accumulation, which is not supported yet, or left by another optimizer's step. Have the closure "
                "return the sum of the losses of all micro-batches; or, if these gradients are not needed, call "
                "opt.zero_grad() before step(closure)"
            )
