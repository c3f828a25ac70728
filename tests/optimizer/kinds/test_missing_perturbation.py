"""A step() without perturb() or closure, as of a trainer that knows nothing of two passes: an error where rho > 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.kinds import all_styles, assert_close, assert_goes_on, by_reference, refused
from tests.support.problems import ALL_STYLES, Problem, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)


def backward(problem: Problem) -> None:
    problem.loss().backward()


def backward_with_graph(problem: Problem) -> None:
    problem.loss().backward(create_graph=True)


def backward_in_hessian_pass(problem: Problem) -> None:
    with problem.opt.hessian_pass():
        problem.loss().backward()


def assigned(problem: Problem) -> None:
    for param in problem.params:
        param.grad = torch.ones_like(param)


def of_one_parameter(problem: Problem) -> None:
    problem.params[2].grad = torch.ones_like(problem.params[2])


WAYS = [backward, backward_with_graph, backward_in_hessian_pass, assigned, of_one_parameter]


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["first", "lazy", "Hessian"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_it_is_refused_at_w_and_training_goes_on(way: Callable[[Problem], None], steps: int) -> None:
    problem = Problem().train(steps)
    with refused(problem, r"step\(\) without perturb\(\), though rho is 0.2"):
        problem.opt.zero_grad()
        way(problem)
        problem.opt.step()
    assert_goes_on(problem)


@pytest.mark.parametrize("group", [0, 1])
def test_one_group_with_a_radius_is_enough(group: int) -> None:
    problem = Problem(rho=0.0).train(2, "phase")
    problem.opt.param_groups[group]["rho"] = 0.1
    with refused(problem, "rho is 0.1"):
        problem.opt.zero_grad()
        problem.loss().backward()
        problem.opt.step()


def test_a_step_given_up_by_restore_is_no_perturbation() -> None:
    problem = Problem().train(1)
    problem.perturb()
    problem.opt.restore()
    with refused(problem, r"step\(\) without perturb\(\)"):
        problem.loss().backward()
        problem.opt.step()
    assert_goes_on(problem)


def test_a_scheduler_that_brings_rho_from_0_changes_what_is_asked_for() -> None:
    problem = Problem(rho=0.0)
    for _ in range(2):
        problem.opt.zero_grad()
        problem.loss().backward(create_graph=problem.opt.hessian_due)
        problem.opt.step()
        problem.steps += 1
    for group in problem.opt.param_groups:
        group["rho"] = 0.2
    with refused(problem, r"without perturb\(\)"):
        problem.opt.zero_grad()
        problem.loss().backward(create_graph=problem.opt.hessian_due)
        problem.opt.step()
    problem.opt.zero_grad()
    for style in ALL_STYLES:
        problem.step(style)


# ---------------------------------------------------------------------------------------------------------------------
# What is right


def plain(problem: Problem) -> None:
    problem.opt.zero_grad()
    problem.loss().backward(create_graph=problem.opt.hessian_due)
    problem.opt.step()


def within_hessian_pass(problem: Problem) -> None:
    problem.opt.zero_grad()
    with problem.opt.hessian_pass():
        problem.loss().backward()
    problem.opt.step()


@pytest.mark.parametrize("way", [plain, within_hessian_pass], ids=lambda way: way.__name__)
def test_without_a_radius_one_pass_is_the_reference_step(way: Callable[[Problem], None]) -> None:
    problem = Problem(dtype=torch.float64, rho=0.0)
    for _ in range(7):
        way(problem)
        problem.steps += 1
    assert_close(problem, by_reference(Problem, 7, rho=0.0))


@all_styles
@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_every_style_is_the_reference_step(style: str, rho: float) -> None:
    assert_close(Problem(dtype=torch.float64, rho=rho).train(7, style), by_reference(Problem, 7, rho=rho))


@pytest.mark.parametrize("steps", [0, 2])
def test_without_gradients_nothing_happens(steps: int) -> None:
    problem = Problem().train(steps)
    problem.opt.zero_grad()
    before = problem.snapshot()
    for _ in range(3):
        problem.opt.step()
    assert_same(problem.snapshot(), before)
    assert_goes_on(problem)


def test_torchs_initialisation_makes_state_and_counts_nothing() -> None:
    problem = Problem()
    for group in problem.opt.param_groups:
        group["kept"], group["lr"] = group["lr"], 0.0
    for param in problem.params:
        param.grad = torch.zeros_like(param)
    before = weights(problem.params)
    problem.opt.step()
    assert_same(weights(problem.params), before)
    assert len(problem.opt.state) == 4 and problem.opt.skipped_steps == 0 and problem.opt.hessian_due
    for group in problem.opt.param_groups:
        group["lr"] = group.pop("kept")
    assert_goes_on(problem)


@pytest.mark.parametrize("steps, graph", [(1, False), (0, True)], ids=["state is there", "gradients with a graph"])
def test_a_step_with_lr_0_that_is_not_torchs_initialisation_is_refused(steps: int, graph: bool) -> None:
    problem = Problem().train(steps)
    for group in problem.opt.param_groups:
        group["lr"] = 0.0
    with refused(problem, r"without perturb\(\)"):
        problem.opt.zero_grad()
        problem.loss().backward(create_graph=graph)
        problem.opt.step()
