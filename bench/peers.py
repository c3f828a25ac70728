"""How one training step is taken with each library, as its documentation says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import sassha_fused
from tests.support.reference_family import ReferenceMember

Loss = Callable[[], Tensor]
Step = Callable[[], object]
# From a model's parameters and its loss to what takes a training step.
Make = Callable[[Sequence[Tensor], Loss], Step]


def of_sassha_fused(member: str, **options: Any) -> Make:
    return lambda params, loss: partial(getattr(sassha_fused, member)(params, **options).step, loss)


def of_loop(member: str, **options: Any) -> Make:
    """A loop over the parameters, in plain torch."""

    def make(params: Sequence[Tensor], loss: Loss) -> Step:
        optimizer = ReferenceMember(params, member, **options)

        def step() -> None:
            # The reference draws its signs in numpy, to have ours; a loop would leave that to torch.
            with patch("tests.support.reference.signs", _signs):
                optimizer.step(loss)

        return step

    return make


def _signs(start: int, count: int, *_: int) -> Tensor:
    return torch.randint(0, 2, (count,), dtype=torch.float32).mul_(2).sub_(1)


def of_torch(base: type[torch.optim.Optimizer], **options: Any) -> Make:
    def make(params: Sequence[Tensor], loss: Loss) -> Step:
        optimizer = base(params, **options)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    return make


def of_pytorch_optimizer(member: type[Any], update_period: int, **options: Any) -> Make:
    """With an optimizer that takes its products from the gradients; they get a graph where it is going to."""

    def make(params: Sequence[Tensor], loss: Loss) -> Step:
        optimizer = member(params, update_period=update_period, **options)
        taken = 0

        def step() -> None:
            nonlocal taken
            optimizer.zero_grad()
            loss().backward(create_graph=taken % update_period == 0)
            optimizer.step()
            taken += 1

        return step

    return make


def of_pytorch_optimizer_sam(sam: type[Any], base: type[torch.optim.Optimizer], **options: Any) -> Make:
    def make(params: Sequence[Tensor], loss: Loss) -> Step:
        optimizer = sam(params, base, **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        def step() -> None:
            closure()
            optimizer.step(closure)

        return step

    return make


def of_torchzero(tz: ModuleType, *modules: Callable[[], Any]) -> Make:
    def make(params: Sequence[Tensor], loss: Loss) -> Step:
        optimizer = tz.Optimizer(params, *(module() for module in modules))

        def closure(backward: bool = True) -> Tensor:
            value = loss()
            if backward:
                optimizer.zero_grad()
                value.backward()
            return value

        return partial(optimizer.step, closure)

    return make
