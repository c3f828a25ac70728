"""Optimizers over given shapes, whose parts of a training step can be timed without forward and backward."""

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.budgets import LAZY_BYTES_READ
from bench.shapes import Shape
from sassha_fused import Sassha
from sassha_fused.curvature.exact import SOURCES, HessianSource
from tests.support.reference import ReferenceSassha

LAZY, HESSIAN = "lazy step", "Hessian step"
HESSIAN_INTERVAL = 2


class Problem:
    """Parameters, the gradients of both passes and Hessian products, shared by all contenders of a run."""

    def __init__(self, shapes: tuple[Shape, ...], seed: int = 0, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(scale: float) -> list[Tensor]:
            return [torch.empty(shape, device=device).normal_(0, scale, generator=generator) for shape in shapes]

        self.parameters = [tensor.requires_grad_() for tensor in normal(0.05)]
        self.first_gradients = normal(0.01)
        self.second_gradients = normal(0.01)
        self.products = normal(0.1)
        self.count = sum(parameter.numel() for parameter in self.parameters)

    def in_groups(self, groups: int) -> list[dict[str, Any]]:
        """The parameters in groups of neighbours, which differ in lr and weight decay."""
        bounds = [len(self.parameters) * i // groups for i in range(groups + 1)]
        return [
            {"params": self.parameters[begin:end], "lr": 1e-4 * (1 + i / groups), "weight_decay": 1e-4 * (1 + i)}
            for i, (begin, end) in enumerate(pairwise(bounds))
        ]

    def assign(self, gradients: list[Tensor]) -> None:
        """What backward would have left, new to every optimizer; never timed, for any contender."""
        torch.autograd.graph.increment_version(gradients)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient


class TwoPass:
    """Sassha: `perturb` between the two gradients and `step` after them; Hessian steps and lazy steps alternate.

    With rho 0 there is one gradient, and `step` alone.
    """

    def __init__(self, name: str, problem: Problem, backend: str | None, groups: int = 1, rho: float = 0.2) -> None:
        self.name = name
        self.problem = problem
        self.steps = 0
        settings = {"rho": rho, "hessian_interval": HESSIAN_INTERVAL}
        if backend is None:
            self.optimizer = ReferenceSassha(problem.in_groups(groups), **settings)
            self.finish = self._finish_reference
        else:
            SOURCES["given"] = HessianSource(lambda *_: problem.products, needs_graph=False)
            self.optimizer = Sassha(problem.in_groups(groups), **settings, hvp="given", backend=backend)
            self.finish = self.optimizer.step
        self.perturb = self.optimizer.perturb if rho else None

    def _finish_reference(self) -> None:
        self.optimizer.update(self.problem.products if self.optimizer.hessian_due else None)

    def step(self) -> tuple[str, float]:
        kind = LAZY if self.steps % HESSIAN_INTERVAL else HESSIAN
        self.steps += 1
        perturbing = 0.0
        if self.perturb:
            self.problem.assign(self.problem.first_gradients)
            start = time.perf_counter()
            self.perturb()
            perturbing = time.perf_counter() - start
        self.problem.assign(self.problem.second_gradients)
        start = time.perf_counter()
        self.finish()
        return kind, perturbing + time.perf_counter() - start

    def round(self) -> dict[str, float]:
        return dict((self.step(), self.step()))


class OnePass:
    """An optimizer of torch.optim; its step stands beside Sassha's lazy step."""

    def __init__(self, name: str, problem: Problem, optimizer: torch.optim.Optimizer) -> None:
        self.name = name
        self.problem = problem
        self.optimizer = optimizer

    def round(self) -> dict[str, float]:
        self.problem.assign(self.problem.first_gradients)
        start = time.perf_counter()
        self.optimizer.step()
        return {LAZY: time.perf_counter() - start}


class Reads:
    """No optimizer: what reading as many bytes as a lazy step does takes, with torch.sum."""

    name = "reads alone"

    def __init__(self, problem: Problem) -> None:
        self.arrays = [torch.ones(problem.count) for _ in range(4)]
        self.passes = LAZY_BYTES_READ // (4 * len(self.arrays))

    def round(self) -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(self.passes):
            for array in self.arrays:
                array.sum()
        return {LAZY: time.perf_counter() - start}


def sassha(problem: Problem, backend: str) -> TwoPass:
    return TwoPass(f"sassha {backend}", problem, backend)


def sassha_in_groups(problem: Problem, groups: int) -> TwoPass:
    return TwoPass(f"sassha cpu, {groups} groups", problem, "cpu", groups=groups)


def sassha_without_perturbation(problem: Problem) -> TwoPass:
    return TwoPass("sassha cpu, rho 0", problem, "cpu", rho=0.0)


def per_tensor_loop(problem: Problem) -> TwoPass:
    return TwoPass("per-tensor loop", problem, None)


def adamw(problem: Problem, **implementation: bool) -> OnePass:
    (name,) = implementation
    return OnePass(f"AdamW {name}", problem, torch.optim.AdamW(problem.parameters, lr=1e-4, **implementation))


def sgd(problem: Problem) -> OnePass:
    return OnePass("SGD momentum", problem, torch.optim.SGD(problem.parameters, lr=1e-4, momentum=0.9))
