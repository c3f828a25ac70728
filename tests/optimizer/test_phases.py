"""The order of calls in a hand-written loop, and the errors where it is another."""

import math

import pytest

from tests.support.problems import (
    BACKENDS,
    Problem,
    assert_same,
    backward,
    refused,
    single_threaded,
    weights,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
NAN = math.nan


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_a_second_step_after_one_perturb_is_refused(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    problem.step("phase")
    with refused(problem, ValueError, r"step\(\) called twice after one perturb"):
        problem.opt.step()


@both_backends
def test_a_second_step_is_refused_after_an_early_restore_a_skip_and_a_closure(backend: str) -> None:
    problem = Problem(backend)
    problem.loss().backward()
    problem.opt.perturb()
    backward(problem.loss(), create_graph=True)
    problem.opt.restore()
    problem.opt.step()
    problem.steps += 1
    with refused(problem, ValueError, "twice"):
        problem.opt.step()
    problem.step()
    with refused(problem, ValueError, "twice"):
        problem.opt.step()
    problem.opt.step(lambda: problem.loss() * NAN)
    before = problem.snapshot()
    with pytest.raises(ValueError, match="twice"):
        problem.opt.step()
    assert_same(problem.snapshot(), before)


@both_backends
def test_a_step_without_gradients_after_a_step_is_no_error(backend: str) -> None:
    problem = Problem(backend)
    problem.step("phase")
    before = problem.snapshot()
    problem.opt.zero_grad()
    problem.opt.step()
    assert_same(problem.snapshot(), before)


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_a_second_perturb_is_refused_and_the_step_goes_on(backend: str, steps: int) -> None:
    problem, undisturbed = Problem(backend).train(steps), Problem(backend).train(steps + 1)
    problem.perturb()
    there = weights(problem.params)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"perturb\(\) called twice"):
            problem.opt.perturb()
        assert_same(weights(problem.params), there)
        problem.opt.zero_grad()
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
    problem.opt.step()
    assert_same(problem.snapshot(), undisturbed.snapshot())
