"""What torch's generic tests of optimizers need, for every member of the family: options, a model, a regression."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.members import MEMBERS
from tests.support.problems import weights
from tests.support.reference import ReferenceSassha

# Beside a member's own: the options that torch sets in its tests, and those of two passes and of the Hessian.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "one pass": {"rho": 0.0},
    "adaptive": {"adaptive": True},
    "two samples": {"hessian_samples": 2, "seed": 12345678901},
    "update": {"bias_correction": "update", "hessian_warmup": 2},
}


def inputs_of(member: str) -> dict[str, dict[str, Any]]:
    """All of a member's arguments beside its parameters, by the name of the option that is added."""
    kind, own = MEMBERS[member]
    known = inspect.signature(kind).parameters.keys()
    taken = {name: more for name, more in OPTIONS.items() if more.keys() <= known}
    if not own.get("exact_restore", True):
        del taken["adaptive"]  # refused: w cannot be worked out from w'
    return {name: {**own, **more} for name, more in taken.items()}


INPUTS = [(member, option) for member in MEMBERS for option in inputs_of(member)]
each_input = pytest.mark.parametrize("member, option", INPUTS)


def make(member: str, params: Any, option: str = "plain", **more: Any) -> Any:
    """The optimizer of a member with an option, and more arguments."""
    return MEMBERS[member][0](params, **{**inputs_of(member)[option], **more})


class Several(nn.Module):
    """Parameters of every rank, dtypes in turn, and one that never has a gradient."""

    SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (4, 5), (2, 3, 4), (129,))

    def __init__(self, *dtypes: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in (*self.SHAPES, (2,))]
        kinds = [dtypes[i % len(dtypes)] for i in range(len(values))]
        self.tensors = nn.ParameterList([value.to(device, dtype) for value, dtype in zip(values, kinds)])

    def loss(self, t: int) -> Tensor:
        """That of step t, in float64."""
        used = [tensor.double() for tensor in self.tensors][:-1]
        total = sum(((tensor + t / 7).cos() * (i + 1)).sum() for i, tensor in enumerate(used))
        return total + used[1].sum().sin() * used[0]


def seven_steps(model: Several, opt: Any) -> list[list[Tensor]]:
    """Seven steps by closure, one without gradients, one parameter frozen and thawed; the weights after each."""
    history = []
    for t in range(7):
        model.tensors[2].requires_grad_(t not in (2, 3))
        if t == 4:
            opt.zero_grad()
            if not isinstance(opt, ReferenceSassha):  # which only knows closures
                opt.step()
        else:
            opt.step(lambda: model.loss(t))
        history.append(weights(model.tensors))
    return history


def regression(contiguous: bool = True, device: str = "cpu") -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """A weight and a bias, slices of larger memory where not contiguous, and a loss."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(*shape, 2, generator=generator).to(device)[..., 0] for shape in ((10, 5), (10,))]
    weight, bias = (nn.Parameter(t.contiguous() if contiguous else t) for t in wide)
    assert weight.is_contiguous() == bias.is_contiguous() == contiguous
    inputs = torch.randn(5, generator=generator).to(device)
    return [weight, bias], lambda: (weight.mv(inputs) + bias).square().sum()


def states_of(opt: Any, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Copies of the states, with a number for each element; empty where a parameter has none."""
    states = opt.state_dict()["state"]
    return [{name: value.clone() for name, value in states.get(i, {}).items()} for i in range(len(params))]
