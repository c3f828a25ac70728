"""Whose gradients they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .flat import Groups


def of_groups(groups: Groups) -> list[Tensor]:
    """Every parameter of the optimizer."""
    return [param for group in groups for param in group["params"]]


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
