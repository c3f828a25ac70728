"""The order of calls in a hand-written loop, and the errors where it is another."""

import math
from contextlib import nullcontext, suppress

import pytest

from tests.support.problems import (
    BACKENDS,
    Problem,
    assert_same,
    backward,
    refused,
    single_threaded,
    undisturbed,
    weights,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
NAN = math.nan


class OnePass(Problem):
    """Without perturbation: one pass is enough, and perturb() is not needed."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend, rho=0.0)


AGAIN = {Problem: r"step\(\) without perturb\(\)", OnePass: r"step\(\) was called twice"}


@both_backends
@pytest.mark.parametrize("kind", AGAIN)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_second_step_by_the_same_gradients_is_refused(backend: str, kind: type[Problem], steps: int) -> None:
    problem = kind(backend).train(steps)
    problem.step("phase")
    with refused(problem, ValueError, AGAIN[kind]):
        problem.opt.step()


@both_backends
@pytest.mark.parametrize("kind", AGAIN)
def test_a_second_step_is_refused_after_an_early_restore_a_skip_and_a_closure(
    backend: str, kind: type[Problem]
) -> None:
    problem = kind(backend)
    problem.loss().backward()
    problem.opt.perturb()
    backward(problem.loss(), create_graph=True)
    problem.opt.restore()
    problem.opt.step()
    problem.steps += 1
    with refused(problem, ValueError, AGAIN[kind]):
        problem.opt.step()
    problem.step()
    with refused(problem, ValueError, AGAIN[kind]):
        problem.opt.step()
    problem.opt.step(lambda: problem.loss() * NAN)
    before = problem.snapshot()
    with pytest.raises(ValueError, match=AGAIN[kind]):
        problem.opt.step()
    assert_same(problem.snapshot(), before)


@both_backends
@pytest.mark.parametrize("which", [0, 1], ids=["first", "last"])
def test_also_where_the_first_or_last_of_every_group_have_gone(backend: str, which: int) -> None:
    problem = Problem(backend).train(2, "phase")
    for param in problem.params[which::2]:
        param.requires_grad_(False).grad = None
    before = weights(problem.params)
    with pytest.raises(ValueError, match="used by the step before"):
        problem.opt.perturb()
    assert_same(weights(problem.params), before)


@both_backends
@pytest.mark.parametrize("style", ["closure", "phase"])
def test_a_perturbation_by_the_gradients_of_the_step_before_is_refused(backend: str, style: str) -> None:
    problem = Problem(backend)
    problem.step(style)
    with pytest.raises(ValueError, match=r"perturb\(\) found gradients that were used by the step before"):
        problem.opt.perturb()
    assert_same(problem.train(3, "phase").snapshot(), undisturbed(Problem, backend, 4))


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
    problem = Problem(backend).train(steps)
    problem.perturb()
    there = weights(problem.params)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"perturb\(\) called twice"):
            problem.opt.perturb()
        assert_same(weights(problem.params), there)
        problem.opt.zero_grad()
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
    problem.opt.step()
    assert_same(problem.snapshot(), undisturbed(Problem, backend, steps + 1))


NO_GRAPH = r"(?s)create_graph=opt\.hessian_due.*closure"  # the ways out


@both_backends
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("heal", ["restore", "step", "state_dict"])
def test_a_backward_that_builds_no_graph_in_a_hessian_step_is_told_the_ways_out_and_healed(
    backend: str, steps: int, heal: str
) -> None:
    problem = Problem(backend).train(steps)
    problem.opt.zero_grad()
    before = weights(problem.params)
    problem.loss().backward()
    problem.opt.perturb()
    problem.loss().backward()
    with pytest.raises(ValueError, match=NO_GRAPH):
        problem.opt.step()
    with suppress(ValueError) if heal == "step" else nullcontext():  # a second step may say it again
        getattr(problem.opt, heal)()
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))
