"""restore() and what follows it: the step takes the gradients that are there, and Hessian products of no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.kinds import assert_clean, assert_close, assert_goes_on, by_reference, refused
from tests.support.problems import Problem, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
each_step = pytest.mark.parametrize("steps", [0, 1, 3], ids=["first", "lazy", "Hessian"])


def at_w(problem: Problem) -> None:
    """A step up to restore()."""
    problem.perturb()
    problem.loss().backward(create_graph=problem.opt.hessian_due)
    problem.opt.restore()


def assigned(problem: Problem) -> None:
    for param in problem.params:
        param.grad = torch.full_like(param, 0.5)


def in_place(problem: Problem) -> None:
    for param in problem.params:
        param.grad.fill_(0.5)


def backward_again(problem: Problem) -> None:
    problem.opt.zero_grad()
    sum(0.5 * param.sum() for param in problem.params).backward()


def added_to(problem: Problem) -> None:
    for param in problem.params:
        param.grad.mul_(0)
    sum(0.5 * param.sum() for param in problem.params).backward()


CHANGES = [assigned, in_place, backward_again, added_to]


@each_step
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_gradients_given_after_restore_are_the_ones_that_count(change: Callable[[Problem], None], steps: int) -> None:
    problem, whole = Problem(dtype=torch.float64).train(steps), Problem(dtype=torch.float64).train(steps)
    averages = [problem.opt.state[p]["exp_avg"].clone() if steps else 0 * p.detach() for p in problem.params]
    at_w(problem)
    change(problem)
    problem.opt.step()
    whole.step()
    for before, mine, theirs in zip(averages, problem.params, whole.params):
        state = problem.opt.state[mine]
        torch.testing.assert_close(state["exp_avg"], 0.9 * before + 0.1 * 0.5, rtol=1e-12, atol=1e-13)
        # The products are those of the second pass, at w'.
        assert_same(state["exp_hessian"], whole.opt.state[theirs]["exp_hessian"])
    problem.opt.zero_grad()
    assert_clean(problem.params)


@each_step
@pytest.mark.parametrize("own", [slice(0, 3), slice(1, 2)], ids=["fewer", "one"])
def test_gradients_of_other_parameters(own: slice, steps: int) -> None:
    problem = Problem().train(steps)
    at_w(problem)
    problem.opt.zero_grad()
    before = problem.snapshot()["weights"]
    for param in problem.params[own]:
        param.grad = torch.ones_like(param)
    if steps == 1:
        problem.opt.step()
        taken = [any(param is one for one in problem.params[own]) for param in problem.params]
        assert [not torch.equal(p, b) for p, b in zip(problem.params, before)] == taken
        return
    with pytest.raises(ValueError, match="gradients of other parameters than restore"):
        problem.opt.step()
    assert_same(weights(problem.params), before)
    assert_goes_on(problem)


@each_step
def test_clipping_after_restore_is_clipping_before_step(steps: int) -> None:
    one, two = Problem().train(steps), Problem().train(steps)
    at_w(one)
    torch.nn.utils.clip_grad_norm_(one.params, 0.01)
    one.opt.step()
    two.perturb()
    two.loss().backward(create_graph=two.opt.hessian_due)
    torch.nn.utils.clip_grad_norm_(two.params, 0.01)
    two.opt.step()
    assert_same(one.snapshot(), two.snapshot())


@each_step
def test_no_gradients_after_restore_are_no_step(steps: int) -> None:
    problem = Problem().train(steps)
    before = weights(problem.params)
    at_w(problem)
    problem.opt.zero_grad()
    try:
        problem.opt.step()
    except ValueError as error:
        assert "second backward is missing" in str(error)
    assert_same(weights(problem.params), before)
    assert_goes_on(problem)


@pytest.mark.parametrize("times", [1, 3])
def test_restore_any_number_of_times_is_the_reference_step(times: int) -> None:
    problem = Problem(dtype=torch.float64)
    for _ in range(5):
        problem.perturb()
        problem.loss().backward(create_graph=problem.opt.hessian_due)
        for _ in range(times):
            problem.opt.restore()
        problem.opt.step()
        for _ in range(times):
            problem.opt.restore()
        problem.steps += 1
    assert_close(problem, by_reference(Problem, 5))


def test_a_step_restored_without_a_graph_is_given_up_and_said_so() -> None:
    problem = Problem().train(3)
    with refused(problem, "without perturb|no graph"):
        problem.perturb()
        problem.loss().backward()
        problem.opt.restore()
        problem.opt.step()
    assert_goes_on(problem)


# ---------------------------------------------------------------------------------------------------------------------
# Used gradients, and calls made twice


USED: dict[str, Callable[[Problem], Any]] = {
    "phase": lambda problem: problem.step("phase"),
    "closure": lambda problem: problem.step("closure"),
    "standard": lambda problem: problem.step("standard"),
    "restored": lambda problem: (at_w(problem), problem.opt.step()),
    "skipped": lambda problem: problem.opt.step(lambda: problem.loss() * float("nan")),
}


@each_step
@pytest.mark.parametrize("how", USED)
def test_perturb_by_used_gradients_is_refused(how: str, steps: int) -> None:
    problem = Problem().train(steps)
    USED[how](problem)
    problem.steps = steps + (how != "skipped")
    if all(param.grad is None for param in problem.params):
        pytest.skip("no gradients are left")
    with refused(problem, r"perturb\(\) found gradients that were used by the step before"):
        problem.opt.perturb()
    if how != "skipped":
        assert_goes_on(problem)


@each_step
@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("how", ["phase", "closure", "restored"])
def test_step_twice_is_refused(how: str, rho: float, steps: int) -> None:
    problem = Problem(rho=rho).train(steps)
    USED[how](problem)
    problem.steps = steps + 1
    with refused(problem, "used by the step before|without perturb"):
        problem.opt.step()
    assert_goes_on(problem, rho=rho)


@each_step
def test_perturb_twice_is_refused_and_the_step_goes_on(steps: int) -> None:
    problem = Problem().train(steps)
    problem.perturb()
    there = weights(problem.params)
    problem.loss().backward(create_graph=problem.opt.hessian_due)
    with pytest.raises(ValueError, match=r"perturb\(\) called twice: call step\(\), or restore\(\)"):
        problem.opt.perturb()
    assert_same(weights(problem.params), there)
    problem.opt.step()
    problem.steps += 1
    assert_goes_on(problem)
