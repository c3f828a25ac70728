"""A batch in several micro-batches, every way to give them to an optimizer, and the same batch in one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sassha_fused import AdaHessian, SAMAdamW, Sassha, SophiaH
from sassha_fused.optimizer import FusedOptimizer
from tests.support.members import MEMBERS
from tests.support.problems import weights

Loss = Callable[[], Tensor]

# By name: a member and options; beside every member what changes the passes of a step, or what products are made of.
KINDS: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]] = {
    **MEMBERS,
    "Sassha": (Sassha, {"lr": 0.05, "hessian_interval": 3}),
    "Sassha with samples": (Sassha, {"lr": 0.05, "hessian_interval": 3, "hessian_samples": 3}),
    "Sassha in one pass": (Sassha, {"lr": 0.05, "hessian_interval": 3, "rho": 0.0}),
    "Sassha after a warm-up": (Sassha, {"lr": 0.05, "hessian_interval": 3, "hessian_warmup": 2, "adaptive": True}),
    "SAMAdamW in one pass": (SAMAdamW, {"lr": 0.01, "rho": 0.0}),
    "AdaHessian at every step": (AdaHessian, {"lr": 0.05}),
    "SophiaH with one sample": (SophiaH, {"lr": 0.01, "hessian_interval": 3}),
}


class Batches:
    """A network in float64, another batch of micro-batches for every step, and an optimizer.

    Some micro-batches alone use one parameter, the others another; a third enters linearly, a fourth is frozen, a fifth
    never used, and a sixth belongs to no optimizer.
    """

    def __init__(self, kind: str = "Sassha", parts: int = 4, **options: Any) -> None:
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
        of_some, linear, frozen, unused = (nn.Parameter(random(3, size) / 2) for size in (2, 3, 4, 5))
        self.of_first, self.of_some, self.linear, self.frozen = nn.Parameter(random(2)), of_some, linear, frozen
        self.outside = nn.Parameter(random(2))
        self.params = [*self.model.parameters(), self.of_first, of_some, linear, frozen.requires_grad_(False), unused]
        for param in self.params[:4]:
            param.data = random(*param.shape) / 2
        self.inputs, self.targets = random(12, parts, 4, 5), random(12, parts, 4, 2)
        groups = [
            {"params": self.params[:3]},
            {"params": self.params[3:5], "lr": 0.03, "weight_decay": 0.1},
            {"params": self.params[5:], "betas": (0.8, 0.9)},
        ]
        member, defaults = KINDS[kind]
        if "betas" not in member([nn.Parameter(random(2))]).defaults:
            del groups[2]["betas"]
        self.opt: Any = member(groups, **{"backend": "cpu", **defaults, **options})
        self.along_momentum = kind.startswith("MSassha") or self.opt.defaults.get("ascent") == "momentum"
        self.kind, self.parts, self.steps = kind, parts, 0

    def losses(self) -> list[Loss]:
        """Of each micro-batch of this step its share of the loss."""
        return [self.loss_of(self.steps, part) for part in range(self.parts)]

    def loss_of(self, step: int, part: int) -> Loss:
        inputs, targets = self.inputs[step, part], self.targets[step, part]

        def loss() -> Tensor:
            outputs = self.model(inputs) * (1 + self.outside**2) + self.frozen.sum()
            if part == 0:
                outputs = outputs + self.of_first**3
            elif part % 2:
                outputs = outputs + self.of_some.sin().sum()
            return (outputs - targets).square().sum() / (8 * self.parts) + inputs.mean() * self.linear.sum()

        return loss

    def whole(self) -> Tensor:
        """The loss of the batch."""
        losses = [loss() for loss in self.losses()]
        return torch.stack(losses).sum()

    def step(self, style: str = "list") -> Tensor:
        """Takes a step in one of STYLES; returns its loss."""
        self.opt.zero_grad()
        loss = STYLES[style](self, self.losses())
        self.steps += 1
        return loss.detach()

    def step_of_whole(self) -> Tensor:
        """Takes the same step in one batch."""
        self.opt.zero_grad()
        loss = self.opt.step(self.whole)
        self.steps += 1
        return loss

    def train(self, count: int, style: str = "list") -> Batches:
        for _ in range(count):
            self.step(style)
        return self

    def train_whole(self, count: int) -> Batches:
        for _ in range(count):
            self.step_of_whole()
        return self

    def snapshot(self) -> dict[str, Any]:
        """Weights and whole state."""
        return {"weights": weights([*self.params, self.outside]), **copy.deepcopy(self.opt.state_dict())}


# ---------------------------------------------------------------------------------------------------------------------
# The styles


def standard(problem: Batches, loss: Loss, **of_backward: Any) -> Loss:
    """The closure that torch's own optimizers take: it clears gradients and runs backward."""

    def closure() -> Tensor:
        problem.opt.zero_grad()
        value = loss()
        value.backward(**of_backward)
        return value

    return closure


def with_graph(problem: Batches, loss: Loss) -> Loss:
    """One that sees to the graph itself."""
    return lambda: standard(problem, loss, create_graph=problem.opt.hessian_due)()


def in_turns(problem: Batches, losses: Sequence[Loss]) -> list[Loss]:
    """Closures of every kind."""
    return [(lambda p, f: f, standard, with_graph)[i % 3](problem, loss) for i, loss in enumerate(losses)]


def accumulated(problem: Batches, closures: Sequence[Loss]) -> Tensor:
    losses = [problem.opt.accumulate(closure) for closure in closures[:-1]]
    loss = problem.opt.step(closures[-1])
    assert len(losses) == 0 or all(not one.requires_grad for one in losses)
    return loss


def half_accumulated(problem: Batches, closures: Sequence[Loss]) -> Tensor:
    half = len(closures) // 2
    for closure in closures[:half]:
        problem.opt.accumulate(closure)
    return problem.opt.step(closures[half:])


def phases(problem: Batches, losses: Sequence[Loss]) -> Tensor:
    """A hand-written loop with a backward for each micro-batch, in each pass."""
    opt = problem.opt
    single = not problem.along_momentum and not any(group.get("rho") for group in opt.param_groups)
    values = []
    if problem.along_momentum:
        opt.perturb()
    if not (single or problem.along_momentum):
        for loss in losses:
            values.append(loss())
            values[-1].backward()
        opt.perturb()
    with opt.hessian_pass():
        for loss in losses:
            value = loss()
            value.backward()
            if single or problem.along_momentum:
                values.append(value.detach())
    opt.step()
    return torch.stack(values).sum()


STYLES: dict[str, Callable[[Batches, Sequence[Loss]], Tensor]] = {
    "list": lambda problem, losses: problem.opt.step(list(losses)),
    "list of standard closures": lambda problem, losses: problem.opt.step([standard(problem, f) for f in losses]),
    "list with graphs": lambda problem, losses: problem.opt.step([with_graph(problem, f) for f in losses]),
    "list of every kind": lambda problem, losses: problem.opt.step(tuple(in_turns(problem, losses))),
    "accumulate": accumulated,
    "accumulate every kind": lambda problem, losses: accumulated(problem, in_turns(problem, losses)),
    "accumulate half": lambda problem, losses: half_accumulated(problem, in_turns(problem, losses)),
    "phases": phases,
}


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def assert_equal_to_rounding(actual: Any, expected: Any, rtol: float = 1e-12, where: str = "") -> None:
    """Tensor by tensor, relative to the largest element of each; counts exactly."""
    if isinstance(expected, Tensor) and expected.is_floating_point() and expected.dim():
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=rtol * largest, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(expected, dict):
        assert set(actual) == set(expected), where
        for key in expected:
            assert_equal_to_rounding(actual[key], expected[key], rtol, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected)):
            assert_equal_to_rounding(*pair, rtol, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"
