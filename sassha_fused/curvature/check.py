"""A debugging aid: exact Hessian products against finite differences, parameter by parameter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batch_norm import running_stats_frozen
from ..flat import Groups
from ..gradients import name_of, of_groups
from ..hessian_pass import building_graphs, leaves_of, nodes_of, set_aside
from ..passes import forget_copies
from .exact import autograd_products, refuse_once_differentiable

# Steps h relative to the weights: kinks spoil large ones, rounding small ones, and a missing part shows in all.
_STEPS = (1e-2, 1e-3, 1e-4, 1e-5)


def check_products(closure: Callable[[], Any], groups: Groups, tolerance: float) -> dict[str, float]:
    r"""The difference between Hz by double backward and :math:`(g(w + hz) - g(w - hz)) / 2h`, for each parameter.

    Relative to the larger norm of the two, or to what is rounding beside the other parameters' products; the least of
    several h.

    Raises:
        ValueError: naming the parameters where it exceeds tolerance.
    """
    params = [param for param in dict.fromkeys(of_groups(groups)) if param.requires_grad]
    if not params:
        return {}
    outside: list[Tensor] = []
    kept = [param.grad for param in params]
    weights = [param.detach().clone() for param in params]
    try:
        with running_stats_frozen():
            gradients = _gradients(closure, params, outside, create_graph=True)
            reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
            signs = _signs(params)
            refuse_once_differentiable(nodes_of(gradient for gradient in gradients if gradient is not None))
            exact = autograd_products(
                [params[i] for i in reached],
                [gradients[i] for i in reached],  # type: ignore[misc]
                [signs[i] for i in reached],
                False,
            )
            probe = float(sum(z.numel() for z in signs)) ** 0.5
            length = float(torch.stack([w.double().norm() for w in weights]).norm()) or probe
            differences = dict.fromkeys(reached, float("inf"))
            noise = 0.0
            for step in _STEPS:
                h = step * length / probe
                ahead, behind = (_gradients(closure, _moved(params, weights, signs, s), outside) for s in (h, -h))
                _moved(params, weights, signs, 0.0)
                found = [(_or_zero(ahead[i], z) - _or_zero(behind[i], z)) / (2 * h) for i, z in zip(reached, exact)]
                noise = noise or max((_noise(product) for product in (*exact, *found)), default=0.0)
                for i, product, difference in zip(reached, exact, found, strict=True):
                    differences[i] = min(differences[i], _apart(product.double(), difference, noise))
    finally:
        with torch.no_grad():
            for param, weight, gradient in zip(params, weights, kept, strict=True):
                param.copy_(weight)
                param.grad = gradient
        forget_copies()
    names = {i: name_of(params[i], groups) for i in differences}
    wrong = [f"{names[i]} ({difference:.2g})" for i, difference in differences.items() if difference > tolerance]
    if wrong:
        raise ValueError(
            f"exact Hessian products disagree with finite differences by more than {tolerance} of their norm at: "
            f"{', '.join(wrong)}. Most likely an operation that these gradients pass through has a backward that is "
            "not made of differentiable operations, such as a kernel in a torch.autograd.Function: write its backward "
            "with torch's operations, or mark it once_differentiable, which makes double backward an error"
        )
    return {names[i].strip("'"): difference for i, difference in differences.items()}


def _gradients(
    closure: Callable[[], Any], params: Sequence[Tensor], outside: list[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """The gradients of one evaluation; those of outside parameters, which the first one finds, stay as they are."""

    def around(loss: Tensor) -> AbstractContextManager[None]:
        own = set(params)
        outside.extend(leaf for leaf in leaves_of(nodes_of([loss])) if leaf not in own)
        return set_aside(outside)

    for param in params:
        param.grad = None
    with _same_randomness(), torch.enable_grad(), building_graphs(around) if create_graph else set_aside(outside):
        loss = closure()
        if all(param.grad is None for param in params) and loss is not None and loss.requires_grad:
            loss.backward()
    gradients = [param.grad for param in params]
    for param in params:
        param.grad = None
    return gradients


def _moved(params: Sequence[Tensor], weights: Sequence[Tensor], signs: Sequence[Tensor], h: float) -> Sequence[Tensor]:
    """The parameters at w + h z."""
    for param, weight, z in zip(params, weights, signs, strict=True):
        param.copy_(weight + h * z)
    forget_copies()
    return params


def _signs(params: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 2, param.shape, generator=generator) * 2 - 1).to(param.device, param.dtype)
        for param in params
    ]


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float64) if gradient is None else gradient.detach().double()


def _noise(product: Tensor) -> float:
    """A norm of which other products may be nothing but rounding, as that of a bias in front of a batch norm."""
    return float(torch.finfo(product.dtype).eps) ** 0.5 * float(product.norm())


def _apart(one: Tensor, other: Tensor, noise: float) -> float:
    larger = max(float(one.norm()), float(other.norm()), noise)
    return float((one - other).norm()) / larger if larger > 0 else 0.0


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Dropout draws the same masks in every evaluation, and the generators are as before afterwards."""
    python = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
