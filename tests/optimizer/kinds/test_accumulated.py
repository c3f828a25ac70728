"""Gradients that a closure's step would drop: refused by name, and the optimizer works afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.kinds import assert_goes_on, refused
from tests.support.problems import ALL_STYLES, Problem, assert_same, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)
closures = pytest.mark.parametrize("style", ["closure", "standard"])
each_step = pytest.mark.parametrize("steps", [0, 1, 3], ids=["first", "lazy", "Hessian"])


def a_micro_batch(problem: Problem) -> None:
    problem.loss().backward()


def with_a_graph(problem: Problem) -> None:
    problem.loss().backward(create_graph=True)


def assigned(problem: Problem) -> None:
    problem.params[3].grad = torch.ones_like(problem.params[3])


def on_top_of_the_last_step(problem: Problem) -> None:
    problem.opt.zero_grad(set_to_none=False)
    problem.loss().backward()


WAYS = [a_micro_batch, with_a_graph, assigned, on_top_of_the_last_step]


@closures
@each_step
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_before_a_closures_step_are_refused(way: Callable[[Problem], None], steps: int, style: str) -> None:
    problem = Problem().train(steps)
    with refused(problem, r"found gradients that it would drop.*call opt.zero_grad\(\) before step\(closure\)"):
        way(problem)
        ALL_STYLES[style](problem.opt, problem.loss)
    assert_goes_on(problem)


@closures
def test_gradients_on_top_of_those_of_a_step_are_refused(style: str) -> None:
    problem = Problem().train(2)
    with refused(problem, "found gradients that it would drop"):
        problem.loss().backward()  # without zero_grad: added to what the step has left
        ALL_STYLES[style](problem.opt, problem.loss)


@pytest.mark.parametrize("before", ["closure", "standard"])
@closures
def test_those_that_a_closure_has_left_are_dropped(style: str, before: str) -> None:
    problem = Problem()
    for one in (before, style) * 3:
        ALL_STYLES[one](problem.opt, problem.loss)
        problem.steps += 1
    assert_same(problem.snapshot(), Problem().train(6).snapshot())


@pytest.mark.parametrize("before", ["phase", "hessian_pass"])
@closures
def test_those_of_a_step_without_a_closure_are_its_callers(style: str, before: str) -> None:
    problem = Problem().train(2, before)
    with refused(problem, r"left by a step without a closure.*opt.zero_grad\(\)"):
        ALL_STYLES[style](problem.opt, problem.loss)
    problem.opt.zero_grad()
    ALL_STYLES[style](problem.opt, problem.loss)


@closures
@pytest.mark.parametrize("set_to_none", [False, True])
def test_nor_are_those_of_zero_grad(set_to_none: bool, style: str) -> None:
    problem = Problem()
    for _ in range(4):
        problem.loss().backward()
        problem.opt.zero_grad(set_to_none)
        ALL_STYLES[style](problem.opt, problem.loss)
        problem.steps += 1
    assert_same(problem.snapshot(), Problem().train(4).snapshot())


@closures
def test_nor_are_those_of_a_skipped_step_or_of_one_that_raised(style: str) -> None:
    problem = Problem().train(1)
    problem.opt.step(lambda: problem.loss() * float("nan"))
    ALL_STYLES[style](problem.opt, problem.loss)
    problem.steps += 1

    def closure() -> torch.Tensor:
        problem.loss().backward()
        raise KeyError("as a loader does")

    with pytest.raises(KeyError):
        problem.opt.step(closure)
    ALL_STYLES[style](problem.opt, problem.loss)
    assert problem.opt.skipped_steps == 1
    torch.testing.assert_close(problem.params, Problem().train(3).params, rtol=0, atol=0)
