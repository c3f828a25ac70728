"""The training loops of the published code, and what METHOD makes of the same batches by the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.problems import backward
from tests.support.reference import ReferenceSassha

INTERVAL = 3


class Schedule:
    """A function of the step as a scheduler, which both versions ask for the next value."""

    def __init__(self, value: Callable[[int], float]) -> None:
        self.value, self.t = value, 0

    def step(self) -> float:
        self.t += 1
        return self.value(self.t - 1)


class Training:
    """A network of two layers in float64, and a batch for every step."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 2)
        self.params = list(self.model.parameters())
        self.groups = [{"params": self.params[:2], "weight_decay": 0.1}, {"params": self.params[2:]}]
        self.inputs = torch.randn(32, 16, 6, generator=generator, dtype=torch.float64)
        self.targets = torch.randint(0, 3, (32, 16), generator=generator)

    def loss(self, t: int, rows: slice = slice(None)) -> Tensor:
        """Of some rows of a batch."""
        return nn.functional.cross_entropy(self.model(self.inputs[t, rows]), self.targets[t, rows])


def image_step(training: Training, opt: Any, t: int) -> None:
    """A step of the version for images."""
    backward(training.loss(t))
    opt.perturb_weights(zero_grad=True)
    backward(training.loss(t), create_graph=True)
    opt.unperturb()
    opt.step()
    opt.zero_grad()


def gpt2_step(
    losses: Sequence[Callable[[], Tensor]], opt: Any, t: int, warmup: int, params: Sequence[Tensor], clip: float = 0.1
) -> None:
    """A step of the version for GPT-2: micro-batches, no perturbation for so many steps, gradients clipped."""

    def passes(with_hessian: bool) -> None:
        for loss in losses:
            backward(loss() / len(losses), create_graph=with_hessian)
            if with_hessian:
                opt.set_hessian()
        opt._sync_gradient()

    on_hessian_step = t % INTERVAL == 0
    if on_hessian_step:
        opt.zero_hessian()
    passes(on_hessian_step and t <= warmup)
    if t > warmup:
        nn.utils.clip_grad_norm_(params, clip)
        opt.perturb_weights()
        opt.zero_grad(set_to_none=True)
        passes(on_hessian_step)
        opt.unperturb()
    nn.utils.clip_grad_norm_(params, clip)
    opt.step(t)
    opt.zero_grad(set_to_none=True)


def reference_step(
    reference: ReferenceSassha, loss: Callable[[], Tensor], params: Sequence[Tensor], perturbed: bool, clip: float = 0.1
) -> None:
    """The same step of the reference, of the batch as a whole."""
    _, grads = reference._backward(loss, create_graph=not perturbed)
    if perturbed:
        nn.utils.clip_grad_norm_(params, clip)
        reference.perturb()
        _, grads = reference._backward(loss, create_graph=True)
    products = reference._hessian_products(grads)
    nn.utils.clip_grad_norm_(params, clip)
    reference.update(products)
