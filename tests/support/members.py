"""Problems that every member of the family trains, and the styles of its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH
from sassha_fused.optimizer import FusedOptimizer
from tests.support.problems import Problem, assert_same, weights

Loss = Callable[[], Tensor]

# By name: a member and options, every third step a Hessian step where there are any.
MEMBERS: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]] = {
    "Sassha": (Sassha, {"lr": 0.05, "hessian_interval": 3}),
    "Sassha by blocks": (Sassha, {"lr": 0.05, "hessian_interval": 3, "hessian_block": 4}),
    "MSassha": (MSassha, {"lr": 0.05, "hessian_interval": 3}),
    "MSassha by blocks": (MSassha, {"lr": 0.05, "hessian_interval": 3, "hessian_block": 16, "exact_restore": False}),
    "SAMSGD": (SAMSGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "SAMSGD along momentum": (SAMSGD, {"lr": 0.05, "momentum": 0.9, "ascent": "momentum"}),
    "SAMSGD without copy": (SAMSGD, {"lr": 0.05, "momentum": 0.9, "ascent": "momentum", "exact_restore": False}),
    "SAMAdamW": (SAMAdamW, {"lr": 0.01}),
    "SAMAdamW along momentum": (SAMAdamW, {"lr": 0.01, "ascent": "momentum"}),
    "AdaHessian": (AdaHessian, {"lr": 0.05, "hessian_interval": 3}),
    "AdaHessian by blocks": (AdaHessian, {"lr": 0.05, "hessian_interval": 3, "hessian_block": 8}),
    "SophiaH": (SophiaH, {"lr": 0.01, "hessian_interval": 3, "hessian_samples": 2}),
}
each_member = pytest.mark.parametrize("member", MEMBERS)
each_inexact = pytest.mark.parametrize(
    "member", [m for m, (_, o) in MEMBERS.items() if not o.get("exact_restore", True)]
)
ALONG_MOMENTUM = [m for m, (kind, o) in MEMBERS.items() if kind is MSassha or o.get("ascent") == "momentum"]
each_along_momentum = pytest.mark.parametrize("member", ALONG_MOMENTUM)


class OfMember(Problem):
    """The problem with a member of the family."""

    def __init__(self, member: str, backend: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(backend, dtype)
        kind, defaults = MEMBERS[member]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.03, "weight_decay": 0.1}]
        self.opt: Any = kind(groups, **{**defaults, "backend": backend, **options})
        self.along_momentum = kind is MSassha or self.opt.defaults.get("ascent") == "momentum"

    def step(self, style: str = "closure") -> Tensor:
        self.opt.zero_grad()
        loss = STYLES[style](self, self.loss)
        self.steps += 1
        return loss.detach()


def _closure(problem: OfMember, loss: Loss) -> Tensor:
    return problem.opt.step(loss)


def _standard(problem: OfMember, loss: Loss) -> Tensor:
    def closure() -> Tensor:
        problem.opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return problem.opt.step(closure)


def _phases(problem: OfMember, loss: Loss) -> Tensor:
    opt = problem.opt
    if problem.along_momentum or "rho" not in opt.defaults:
        if problem.along_momentum:
            opt.perturb()
        with opt.hessian_pass():
            value = loss()
            value.backward()
    else:
        value = loss()
        value.backward()
        opt.perturb()
        with opt.hessian_pass():
            loss().backward()
    opt.step()
    return value


STYLES = {"closure": _closure, "standard": _standard, "phases": _phases}


def trained(member: str, count: int = 7, style: str = "closure", **options: Any) -> OfMember:
    problem = OfMember(member, **options)
    for _ in range(count):
        problem.step(style)
    return problem


def assert_at_w(problem: OfMember, before: list[Tensor]) -> None:
    """The weights are w again: bit for bit, or where they are worked out, to rounding."""
    if problem.opt.defaults.get("exact_restore", True):
        assert_same(weights(problem.params), before)
    else:
        for found, expected in zip(problem.params, before, strict=True):
            torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-7)
