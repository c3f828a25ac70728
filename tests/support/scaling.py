"""Loops with a torch.amp.GradScaler: every way to take a step with one, for every member of the family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from tests.support.members import MEMBERS, OfMember
from tests.support.pairs import every_pair

Loss = Callable[[], Tensor]
Loop = Callable[[OfMember, GradScaler, Loss], None]

# By name: a member, and options beside those that it has in the tests of the family.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{member: (member, {}) for member in MEMBERS},
    "Sassha": ("Sassha by blocks", {"hessian_block": 1}),
    "Sassha, adaptive, 3 probes": ("Sassha by blocks", {"hessian_block": 1, "adaptive": True, "hessian_samples": 3}),
    "Sassha, rho 0": ("Sassha by blocks", {"rho": 0.0}),
    "MSassha, rho 0, 2 probes": ("MSassha", {"rho": 0.0, "hessian_samples": 2}),
    "SAMSGD, adaptive": ("SAMSGD", {"adaptive": True, "maximize": True}),
    "SAMAdamW, rho 0": ("SAMAdamW", {"rho": 0.0}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)

# Below the norms of the problem's gradients, so that it clips.
_MAX_NORM = 0.1


def scaler_of(scale: float, **options: Any) -> GradScaler:
    """A scaler that starts here; of 1.0, one that is off."""
    return GradScaler("cpu", init_scale=scale, enabled=scale != 1, **options)


def pairs(**arguments: Sequence[Any]) -> Any:
    """Parametrizes by few combinations of these, in which every two values meet."""
    cases = [list(case.values()) for case in every_pair(**arguments)]
    ids = ["-".join(getattr(value, "__name__", str(value)) for value in case) for case in cases]
    return pytest.mark.parametrize(list(arguments), cases, ids=ids)


def variant_of(name: str, **options: Any) -> OfMember:
    """The problem with one of VARIANTS."""
    member, own = VARIANTS[name]
    return OfMember(member, **{**own, **options})


def _clip(problem: OfMember, scaler: GradScaler) -> None:
    scaler.unscale_(problem.opt)
    clip_grad_norm_(problem.params, _MAX_NORM)


def _closure(problem: OfMember, scaler: GradScaler, loss: Loss) -> None:
    problem.opt.step(loss, scaler=scaler)


def _standard(problem: OfMember, scaler: GradScaler, loss: Loss, clips: bool = False) -> None:
    def closure() -> Tensor:
        problem.opt.zero_grad()
        value = loss()
        scaler.scale(value).backward()
        if clips:
            _clip(problem, scaler)
        return value

    problem.opt.step(closure, scaler=scaler)


def _standard_clipped(problem: OfMember, scaler: GradScaler, loss: Loss) -> None:
    _standard(problem, scaler, loss, clips=True)


def passes(problem: OfMember, scaler: GradScaler, loss: Loss, told: GradScaler | None = None) -> None:
    """What comes before scaler.step() in a hand-written loop; told: the scaler that the optimizer is told of."""
    opt = problem.opt
    single = not any(group.get("rho", 0) for group in opt.param_groups)
    if single or problem.along_momentum:
        if not single:
            opt.perturb(told)
        with opt.hessian_pass(told):
            scaler.scale(loss()).backward()
    else:
        scaler.scale(loss()).backward()
        opt.perturb(told)
        with opt.hessian_pass():
            scaler.scale(loss()).backward()


def _phases(problem: OfMember, scaler: GradScaler, loss: Loss) -> None:
    passes(problem, scaler, loss)
    scaler.step(problem.opt)


def _told(problem: OfMember, scaler: GradScaler, loss: Loss) -> None:
    passes(problem, scaler, loss, scaler)
    scaler.step(problem.opt)


def _told_clipped(problem: OfMember, scaler: GradScaler, loss: Loss) -> None:
    passes(problem, scaler, loss, scaler)
    _clip(problem, scaler)
    scaler.step(problem.opt)


LOOPS: dict[str, Loop] = {
    "closure": _closure,
    "standard": _standard,
    "standard, clipped": _standard_clipped,
    "phases": _phases,
    "told": _told,
    "told, clipped": _told_clipped,
}
each_loop = pytest.mark.parametrize("loop", LOOPS)
# Where the optimizer knows the scaler, and so can tell it of what torch's scaler does not see.
KNOWING = [name for name in LOOPS if name != "phases"]
each_knowing = pytest.mark.parametrize("loop", KNOWING)


def step(problem: OfMember, scaler: GradScaler, loop: str, loss: Loss | None = None) -> OfMember:
    """A whole step on the current batch, the scaler's update() included; the next step takes the next batch."""
    problem.opt.zero_grad()
    LOOPS[loop](problem, scaler, loss or problem.loss)
    scaler.update()
    problem.steps += 1
    return problem


def train(problem: OfMember, scaler: GradScaler, loop: str, count: int) -> OfMember:
    """Several steps."""
    for _ in range(count):
        step(problem, scaler, loop)
    return problem


class Amplified(torch.autograd.Function):
    """x -> 0, whose gradient is 0 and its last element `gradient`; its product is 0 and the last element `product`.

    Both times what came from above, so that a loss scale enters them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: float, product: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.amplified = gradient, product
        return torch.zeros((), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        return _AmplifiedGradient.apply(*ctx.saved_tensors, above, *ctx.amplified), None, None


class _AmplifiedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, above: Tensor, gradient: float, product: float) -> Tensor:
        ctx.save_for_backward(above)
        ctx.product = product
        return _last_of(x, above * gradient)

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor, None, None, None]:
        (above,) = ctx.saved_tensors
        return _last_of(z, above * ctx.product * z.flatten()[-1]), None, None, None


def _last_of(like: Tensor, value: Tensor) -> Tensor:
    found = torch.zeros_like(like)
    found.view(-1)[-1] = value
    return found
