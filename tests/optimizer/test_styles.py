"""The ways to take a step agree bit for bit."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.problems import BACKENDS, STYLES, Problem, assert_same, backward, single_threaded, undisturbed

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "adaptive": {"adaptive": True, "rho": 0.5},
    "three samples": {"hessian_samples": 3, "seed": 11},
    "warm-up, power, update": {"hessian_warmup": 2, "hessian_power": 0.8, "bias_correction": "update"},
    "maximize": {"maximize": True, "lr": 0.001},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


@both_backends
@pytest.mark.parametrize("name", OPTIONS)
def test_every_style_takes_bitwise_the_same_steps_and_returns_the_first_loss(backend: str, name: str) -> None:
    problems = [Problem(backend, **OPTIONS[name]) for _ in STYLES]
    for _ in range(7):
        expected = problems[0].loss().detach()
        for problem, style in zip(problems, STYLES):
            loss = problem.step(style)
            assert_same(loss, expected)
            assert not loss.requires_grad
    first, *others = [problem.snapshot() for problem in problems]
    assert all(state["step"] == 7 for state in first["state"].values())
    for other in others:
        assert_same(other, first)


@both_backends
def test_styles_mix_freely(backend: str) -> None:
    problem = Problem(backend)
    for style in ("phase", "standard", "closure", "closure", "phase", "phase", "standard", "phase"):
        problem.step(style)
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 8))


def test_two_runs_agree_bit_for_bit() -> None:
    assert_same(Problem(hessian_samples=2).train(7).snapshot(), Problem(hessian_samples=2).train(7).snapshot())


@both_backends
def test_a_closure_that_clears_gradients_itself_changes_nothing(backend: str) -> None:
    problem = Problem(backend)

    def closure() -> Tensor:
        problem.opt.zero_grad()
        loss = problem.loss()
        backward(loss, create_graph=problem.opt.hessian_due)
        return loss

    for _ in range(4):
        problem.opt.step(closure)
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


@pytest.mark.parametrize("style", ["standard", "phase"])
def test_a_graph_built_where_none_is_needed_does_no_harm(style: str) -> None:
    problem = Problem()
    for _ in range(7):
        if style == "standard":

            def closure() -> Tensor:
                loss = problem.loss()
                backward(loss, create_graph=True)
                return loss

            problem.opt.step(closure)
        else:
            problem.opt.zero_grad()
            backward(problem.loss(), create_graph=True)
            problem.opt.perturb()
            backward(problem.loss(), create_graph=True)
            problem.opt.step()
        assert not any(param.grad.requires_grad for param in problem.params)
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, "cpu", 7))


@both_backends
def test_within_hessian_pass_a_plain_backward_does(backend: str) -> None:
    problem = Problem(backend)
    for _ in range(7):
        problem.perturb()
        with problem.opt.hessian_pass():
            problem.loss().backward()
        problem.opt.step()
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 7))


@pytest.mark.parametrize("create_graph", [False, True])
@both_backends
def test_without_perturbation_one_pass_by_hand_is_a_step_with_a_closure(backend: str, create_graph: bool) -> None:
    by_hand, closure = Problem(backend, rho=0.0), Problem(backend, rho=0.0).train(7)
    for _ in range(7):
        by_hand.opt.zero_grad()
        if create_graph:
            backward(by_hand.loss(), create_graph=by_hand.opt.hessian_due)
        else:
            with by_hand.opt.hessian_pass():
                by_hand.loss().backward()
        by_hand.opt.step()
        by_hand.steps += 1
    assert_same(by_hand.snapshot(), closure.snapshot())


@pytest.mark.slow
def test_closure_style_shows_no_warning_about_graphs() -> None:
    code = (
        "from tests.support.problems import Problem\n"
        "problem = Problem()\n"
        "for _ in range(4): problem.opt.step(problem.loss)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_torch_still_warns_of_graphs_that_others_build() -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        Problem().train(1)
        with pytest.warns(UserWarning, match="create_graph=True"):
            Problem().loss().backward(create_graph=True)
    finally:
        torch.set_warn_always(before)
