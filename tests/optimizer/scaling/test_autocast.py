"""Autocast inside closures and around whole steps: the second pass sees the weights where they are, at w'."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, autocast, nn

from tests.support.members import MEMBERS, OfMember
from tests.support.problems import assert_same, single_threaded, weights
from tests.support.reference import ReferenceSassha
from tests.support.scaling import LOOPS, each_loop, pairs, scaler_of, step, variant_of

one_thread = pytest.fixture(autouse=True)(single_threaded)
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
each_half = pytest.mark.parametrize("half", HALVES)

Around = Callable[[], AbstractContextManager[Any]]


def run(
    problem: OfMember, loop: str, scale: float, inside: Around = nullcontext, around: Around = nullcontext
) -> tuple[list[Tensor], dict[str, Any]]:
    """The losses of all passes of five steps, and where they lead; a context is inside the loss or around the step."""
    losses, scaler = [], scaler_of(scale)

    def loss() -> Tensor:
        with inside():
            value = problem.loss()
        losses.append(value.detach())
        return value

    for _ in range(5):
        with around():
            step(problem, scaler, loop, loss)
    assert problem.opt.skipped_steps == 0
    return losses, problem.snapshot()


def casting(half: str, cache: bool) -> Around:
    return lambda: autocast("cpu", dtype=HALVES[half], cache_enabled=cache)


# Without a cache every pass casts the weights anew: the meaning that the cache must not change.
@pairs(
    variant=["Sassha", "MSassha by blocks", "SAMAdamW", "AdaHessian"],
    scale=[1.0, 2.0**10],
    half=list(HALVES),
    loop=list(LOOPS),
)
def test_casts_that_are_cached_around_a_step_are_of_the_weights_as_they_are(
    variant: str, scale: float, half: str, loop: str
) -> None:
    cached = run(variant_of(variant), loop, scale, around=casting(half, cache=True))
    assert_same(cached, run(variant_of(variant), loop, scale, around=casting(half, cache=False)))


@pairs(loop=["closure", "told"], half=list(HALVES), member=list(MEMBERS))
def test_autocast_in_the_loss_and_around_the_step_are_the_same(loop: str, half: str, member: str) -> None:
    inside = run(variant_of(member), loop, 2.0**10, inside=casting(half, cache=True))
    around = run(variant_of(member), loop, 2.0**10, around=casting(half, cache=False))
    assert inside[0][0].isfinite()
    assert_same(inside, around)


# In bfloat16, whose range is that of float32, a power of two rounds nothing.
@each_loop
@pytest.mark.parametrize("variant", ["Sassha", "MSassha", "SAMSGD", "SophiaH"])
def test_a_scale_changes_nothing_in_bfloat16(variant: str, loop: str) -> None:
    around = casting("bfloat16", cache=True)
    assert_same(*(run(variant_of(variant), loop, scale, around=around) for scale in (2.0**20, 1.0)))


class ByHand:
    """Sassha's loop written out with the float64 reference, whose passes run in autocast without a cache."""

    def __init__(self, problem: OfMember, half: str, scale: float) -> None:
        self.problem, self.cast, self.scale = problem, casting(half, cache=False), scale
        groups = [
            {k: v for k, v in group.items() if k in ("params", "lr", "weight_decay")}
            for group in problem.opt.param_groups
        ]
        self.opt = ReferenceSassha(groups, hessian_interval=3)

    def step(self) -> None:
        def loss() -> Tensor:
            with self.cast():
                return self.problem.loss()

        self.opt.step(loss)
        self.problem.steps += 1


@each_half
@pytest.mark.parametrize("style", ["closure", "told"])
@pytest.mark.parametrize("place", ["inside", "around"])
def test_the_steps_are_those_of_a_loop_written_by_hand(place: str, style: str, half: str) -> None:
    mine, theirs = variant_of("Sassha"), variant_of("Sassha")
    by_hand = ByHand(theirs, half, 2.0**10)
    for _ in range(2):
        by_hand.step()
    scaler = scaler_of(2.0**10)
    contexts = {"inside": nullcontext, "around": nullcontext, place: casting(half, cache=True)}

    def loss() -> Tensor:
        with contexts["inside"]():
            return mine.loss()

    for _ in range(2):
        with contexts["around"]():
            step(mine, scaler, style, loss)
    # A last bit of w' decides how a cast of it is rounded, and so the gradients' third digit in bfloat16.
    near = {"bfloat16": 0.05, "float16": 0.01}[half]
    start = weights(variant_of("Sassha").params)
    for param, other, was in zip(mine.params, theirs.params, start, strict=True):
        for name in ("exp_avg", "exp_hessian"):
            found, expected = (opt.state[p][name].double() for opt, p in ((mine.opt, param), (by_hand.opt, other)))
            assert (found - expected).norm() <= near * expected.norm(), name
        assert (param - other).norm() <= near * (other - was).norm()


@pytest.mark.parametrize("loop", ["closure", "standard", "told"])
def test_a_network_in_float16_learns_with_a_scale_that_adapts(loop: str) -> None:
    problem, scaler, losses = variant_of("Sassha"), scaler_of(2.0**16, growth_interval=5), []
    problem.targets = problem.model(problem.inputs).detach() + 1

    def loss() -> Tensor:
        with autocast("cpu", dtype=torch.float16):
            value = nn.functional.mse_loss(problem.model(problem.inputs[0]).float(), problem.targets[0])
        losses.append(value.detach())
        return value

    for _ in range(40):
        step(problem, scaler, loop, loss)
    assert 2.0**8 < scaler.get_scale() < 2.0**17
    assert 0 < problem.opt.skipped_steps < 20
    assert losses[-1] < losses[0] / 4
