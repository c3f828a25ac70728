"""What a loss scale makes overflow, in either pass or in the products: no trace of the step, and the scale recovers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.members import OfMember, assert_at_w
from tests.support.pairs import every_pair
from tests.support.problems import assert_same, single_threaded, weights
from tests.support.scaling import (
    KNOWING,
    LOOPS,
    VARIANTS,
    Amplified,
    each_knowing,
    each_loop,
    pairs,
    passes,
    scaler_of,
    step,
    train,
    variant_of,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)

# Times 2^80 these gradients and products overflow, times 2^78 they do not, and H^2 is finite.
_SCALE = 2.0**80
_TOO_LARGE = 1e15

Spoil = Callable[[OfMember], Tensor]


def _in_first(problem: OfMember) -> Tensor:
    """A gradient that overflows at w alone."""
    return Amplified.apply(problem.params[-1], 0.0 if problem.opt.second_pass else _TOO_LARGE, 0.0)


def _in_last(problem: OfMember) -> Tensor:
    """A gradient that overflows in the last pass alone."""
    two = problem.opt.defaults.get("rho", 0) and not problem.along_momentum
    return Amplified.apply(problem.params[0], _TOO_LARGE if problem.opt.second_pass or not two else 0.0, 0.0)


def _in_products(problem: OfMember) -> Tensor:
    """A product that overflows while no gradient does."""
    return Amplified.apply(problem.params[-1], 0.0, _TOO_LARGE)


def _in_loss(problem: OfMember) -> Tensor:
    """A loss that overflows, and every gradient with it."""
    return problem.loss() * 1e30


PLACES: dict[str, Spoil] = {"first pass": _in_first, "last pass": _in_last, "products": _in_products, "loss": _in_loss}


def everything(problem: OfMember) -> list[Any]:
    """Weights, state and the counts of steps and Hessian evaluations, but for that of skipped steps."""
    snapshot = problem.snapshot()
    counts = [{k: v for k, v in group.items() if k != "skipped_steps"} for group in snapshot["param_groups"]]
    return [snapshot["weights"], snapshot["state"], counts]


def without_copy(problem: OfMember) -> bool:
    return not problem.opt.defaults.get("exact_restore", True)


def assert_same_run(problem: OfMember, other: OfMember, exact: bool = True) -> None:
    """Bit for bit, but where a skipped step takes w back to rounding."""
    if exact and not without_copy(problem):
        assert_same(everything(problem), everything(other))
    else:
        for mine, theirs in zip(everything(problem)[:2], everything(other)[:2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def has(place: str, problem: OfMember) -> bool:
    """Whether something of this member's step may overflow there."""
    if place == "first pass":
        return bool(problem.opt.defaults.get("rho", 0)) and not problem.along_momentum
    return place != "products" or "hessian_interval" in problem.opt.defaults


def cases(*names: str, **more: Any) -> Any:
    """Loops, members and places such that every two of them meet, where a member has that place."""
    found = every_pair(place=list(PLACES), variant=list(VARIANTS), **more)
    found = [case for case in found if has(case["place"], variant_of(case["variant"]))]
    return pytest.mark.parametrize(
        names, [pytest.param(*map(case.get, names), id=str([*case.values()])) for case in found]
    )


@cases("before", "place", "loop", "variant", before=[0, 3], loop=KNOWING)
def test_a_step_that_overflows_leaves_no_trace_and_halves_the_scale(
    before: int, place: str, loop: str, variant: str
) -> None:
    problem, scaler = variant_of(variant), scaler_of(_SCALE)
    train(problem, scaler, loop, before)
    expected = everything(problem)
    spoil = PLACES[place]
    for skipped in (1, 2):
        problem.opt.zero_grad()
        LOOPS[loop](problem, scaler, lambda: problem.loss() + spoil(problem))
        assert not problem.opt.perturbed
        scaler.update()
        assert problem.opt.skipped_steps == skipped
        assert scaler.get_scale() == _SCALE / 2**skipped
        if without_copy(problem):
            assert_at_w(problem, expected[0])
            expected[0] = weights(problem.params)
        found = everything(problem)
        if before == 0:  # state is made at the first gradient, as torch.optim does
            assert not any(value.any() for entry in found[1].values() for value in entry.values())
            found[1] = expected[1]
        assert_same(found, expected)


@cases("place", "loop", "variant", loop=list(LOOPS))
def test_training_goes_on_as_if_the_step_had_not_been(place: str, loop: str, variant: str) -> None:
    problem, scaler = variant_of(variant), scaler_of(_SCALE)
    spoil = PLACES[place]
    train(problem, scaler, loop, 3)
    step(problem, scaler, loop, lambda: problem.loss() + spoil(problem))
    assert problem.opt.skipped_steps == 1
    problem.steps -= 1  # the same batch, this time as it is
    train(problem, scaler, loop, 4)
    assert_same_run(problem, train(variant_of(variant), scaler_of(1.0), loop, 7))


@pairs(loop=["closure", "standard, clipped", "told"], variant=list(VARIANTS))
def test_a_scale_that_is_far_too_large_comes_down_and_training_is_that_without_one(loop: str, variant: str) -> None:
    problem, twin = variant_of(variant), variant_of(variant)
    for each in (problem, twin):  # large losses
        each.inputs *= 8
        each.targets *= 64
    # Gradients just below the largest float make rho / N a subnormal number, which is not as precise.
    exact = not has("first pass", problem)
    taken = 4 if exact else 1
    scaler, steps = scaler_of(2.0**127), 0
    while problem.steps < taken and steps < 50:
        skipped = problem.opt.skipped_steps
        step(problem, scaler, loop)
        problem.steps -= problem.opt.skipped_steps - skipped  # the same batch again
        steps += 1
    assert problem.opt.skipped_steps == steps - taken > 2
    assert scaler.get_scale() == 2.0 ** (127 - problem.opt.skipped_steps)
    assert_same_run(problem, train(twin, scaler_of(1.0), loop, taken), exact)


# ---------------------------------------------------------------------------------------------------------------------
# What a scaler that the optimizer does not know hears of, and what it does not.


@pytest.mark.parametrize("place", ["first pass", "products"])
def test_a_scaler_that_is_not_told_keeps_its_scale_where_its_own_gradients_are_finite(place: str) -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(_SCALE)
    before = weights(problem.params)
    for skipped in (1, 2, 3):
        step(problem, scaler, "phases", lambda: problem.loss() + PLACES[place](problem))
        assert problem.opt.skipped_steps == skipped
        assert scaler.get_scale() == _SCALE
        assert_same(weights(problem.params), before)


@pytest.mark.parametrize("variant, place", [("Sassha", "first pass"), ("AdaHessian", "products")])
def test_a_warning_says_so_where_no_step_is_taken_any_more(variant: str, place: str) -> None:
    problem, scaler = variant_of(variant), scaler_of(_SCALE)

    def spoilt_steps(count: int, loop: str = "phases") -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                step(problem, scaler, loop, lambda: problem.loss() + PLACES[place](problem))
        assert all("the scaler keeps its scale, unless opt.perturb(scaler=scaler)" in str(w.message) for w in caught)
        return len(caught)

    assert spoilt_steps(20) == 0
    assert spoilt_steps(1) == 1
    assert spoilt_steps(20) == 0  # once
    problem.steps = 0
    train(problem, scaler, "phases", 1 if variant == "Sassha" else 3)
    assert spoilt_steps(20) == 0
    assert spoilt_steps(2) == 1
    assert spoilt_steps(50, "told") == 0


@pytest.mark.parametrize("place", ["last pass", "loss"])
def test_it_halves_its_scale_where_they_are_not(place: str) -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(_SCALE)
    before = weights(problem.params)
    for skipped in (1, 2, 3):
        step(problem, scaler, "phases", lambda: problem.loss() + PLACES[place](problem) * 8)
        assert problem.opt.skipped_steps == skipped
        assert scaler.get_scale() == _SCALE / 2**skipped
        assert_same(weights(problem.params), before)


@each_knowing
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_without_a_scale_either_is_skipped(value: float, loop: str) -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(2.0**10)
    train(problem, scaler, loop, 2)
    before = everything(problem)
    step(problem, scaler, loop, lambda: problem.loss() * value)
    assert problem.opt.skipped_steps == 1
    assert_same(everything(problem), before)


@pytest.mark.parametrize("loop", ["closure", "standard", "standard, clipped"])
def test_a_loss_alone_that_is_not_finite_is_skipped_and_the_scale_halved(loop: str) -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(2.0**10)
    train(problem, scaler, loop, 2)
    before = everything(problem)
    step(problem, scaler, loop, lambda: problem.loss() + torch.inf)
    assert (problem.opt.skipped_steps, scaler.get_scale()) == (1, 2.0**9)
    assert_same(everything(problem), before)


@each_loop
def test_of_two_optimizers_with_one_scaler_the_other_takes_its_step(loop: str) -> None:
    scaler, both = scaler_of(_SCALE), [variant_of("Sassha"), variant_of("SAMAdamW")]
    before = weights(both[0].params)
    for problem in both:
        spoil = _in_last if problem is both[0] else (lambda problem: problem.params[0].sum() * 0)
        LOOPS[loop](problem, scaler, lambda problem=problem, spoil=spoil: problem.loss() + spoil(problem))
        problem.steps += 1
    scaler.update()
    assert scaler.get_scale() == _SCALE / 2
    assert [problem.opt.skipped_steps for problem in both] == [1, 0]
    assert_same(weights(both[0].params), before)
    twin = train(variant_of("SAMAdamW"), scaler_of(1.0), loop, 1)
    assert_same(both[1].snapshot(), twin.snapshot())


@pytest.mark.parametrize("spoilt", [0, 1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_one_micro_batch_that_overflows_skips_its_step(place: str, spoilt: int) -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(_SCALE)
    before = weights(problem.params)

    def closure(i: int) -> Tensor:
        return problem.loss() + (PLACES[place](problem) if i == spoilt else 0)

    for i in range(2):
        problem.opt.accumulate(lambda i=i: closure(i), scaler=scaler)
    problem.opt.step(lambda: closure(2), scaler=scaler)
    scaler.update()
    assert (problem.opt.skipped_steps, scaler.get_scale()) == (1, _SCALE / 2)
    assert_same(weights(problem.params), before)


@pytest.mark.parametrize("place", PLACES)
def test_one_bucket_that_overflows_skips_the_step_of_all(place: str) -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(_SCALE)
    problem.opt.param_groups[1]["eps"] = 0.01  # a bucket of its own
    before = weights(problem.params)
    for loop in ("closure", "told"):
        step(problem, scaler, loop, lambda: problem.loss() + PLACES[place](problem))
        assert_same(weights(problem.params), before)
    assert (problem.opt.skipped_steps, scaler.get_scale()) == (2, _SCALE / 4)


def test_batch_norm_statistics_and_weights_stay_finite_at_a_first_pass_that_overflows() -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(_SCALE)
    seen = []

    def loss() -> Tensor:
        seen.append(weights(problem.params))
        return problem.loss() + _in_first(problem)

    step(problem, scaler, "closure", loss)
    assert len(seen) == 2
    assert_same(seen[1], seen[0])  # w' is w where N is not finite


@pytest.mark.parametrize("variant", ["Sassha", "MSassha", "SAMAdamW", "SophiaH"])
@pytest.mark.parametrize("place", ["first pass", "last pass"])
def test_what_clipping_by_value_hides_in_a_closure_is_not_taken(place: str, variant: str) -> None:
    problem, scaler = variant_of(variant), scaler_of(_SCALE)
    if not has(place, problem):
        place = "last pass"
    before = weights(problem.params)

    def closure() -> Tensor:
        value = problem.loss() + PLACES[place](problem) * 8
        scaler.scale(value).backward()
        scaler.unscale_(problem.opt)
        nn.utils.clip_grad_value_(problem.params, 0.1)
        assert all(param.grad.isfinite().all() for param in problem.params)
        return value

    for skipped in (1, 2, 3):
        problem.opt.step(closure, scaler=scaler)
        scaler.update()
        assert (problem.opt.skipped_steps, scaler.get_scale()) == (skipped, _SCALE / 2**skipped)
        assert_same(weights(problem.params), before)


@pytest.mark.parametrize("variant", ["Sassha", "MSassha", "SAMAdamW", "SophiaH"])
def test_nor_in_a_hand_written_loop(variant: str) -> None:
    problem, scaler = variant_of(variant), scaler_of(_SCALE)
    before = weights(problem.params)
    passes(problem, scaler, lambda: problem.loss() + _in_last(problem), scaler)
    scaler.unscale_(problem.opt)
    nn.utils.clip_grad_value_(problem.params, 0.1)
    scaler.step(problem.opt)
    scaler.update()
    assert (problem.opt.skipped_steps, scaler.get_scale()) == (1, _SCALE / 2)
    assert_same(weights(problem.params), before)


def test_what_restore_took_products_of_overflows_too() -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(_SCALE)
    before = weights(problem.params)
    passes(problem, scaler, lambda: problem.loss() + _in_products(problem), scaler)
    problem.opt.restore()
    scaler.step(problem.opt)
    scaler.update()
    assert (problem.opt.skipped_steps, scaler.get_scale()) == (1, _SCALE / 2)
    assert_same(weights(problem.params), before)
