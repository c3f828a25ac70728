"""restore(): the weights are back bit for bit, and the step goes on or is given up."""

from typing import Any

import pytest
import torch

from sassha_fused import passes
from tests.support.problems import (
    BACKENDS,
    Problem,
    assert_differ,
    assert_same,
    backward,
    single_threaded,
    undisturbed,
    weights,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@both_backends
@pytest.mark.parametrize("samples", [1, 2])
def test_an_early_restore_changes_nothing_in_the_step(backend: str, samples: int) -> None:
    early, plain = Problem(backend, hessian_samples=samples), Problem(backend, hessian_samples=samples)
    for _ in range(7):
        before = weights(early.params)
        early.perturb()
        backward(early.loss(), create_graph=early.opt.hessian_due)
        for _ in range(2):
            early.opt.restore()
            assert_same(weights(early.params), before)
        early.opt.step()
        early.steps += 1
        plain.step("phase")
    assert_same(early.snapshot(), plain.snapshot())


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_restore_before_the_second_pass_gives_the_step_up(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    problem.perturb()
    assert_differ(weights(problem.params), before)
    problem.opt.restore()
    problem.opt.step()
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_a_new_perturb_after_restore_gives_the_old_step_up(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    problem.perturb()
    backward(problem.loss(), create_graph=problem.opt.hessian_due)
    problem.opt.restore()
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("second_pass", [False, True])
def test_a_closure_step_after_perturb_starts_from_the_restored_weights(
    backend: str, steps: int, second_pass: bool
) -> None:
    problem = Problem(backend).train(steps)
    problem.perturb()
    if second_pass:
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
    problem.opt.zero_grad()
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, backend, steps + 4))


def test_restore_and_step_without_a_perturbation_do_nothing() -> None:
    problem = Problem().train(2)
    before = problem.snapshot()
    problem.opt.zero_grad()
    problem.opt.restore()
    problem.opt.step()
    assert_same(problem.snapshot(), before)


def test_a_graph_from_before_perturb_can_no_longer_be_used() -> None:
    problem = Problem().train(1)
    stale = problem.loss()
    problem.perturb()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    stale = problem.loss()
    problem.opt.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@both_backends
def test_weights_that_were_written_after_restore_are_not_lost_without_a_word(backend: str) -> None:
    problem = Problem(backend).train(1)
    problem.perturb()
    problem.loss().backward()
    problem.opt.restore()
    with torch.no_grad():
        problem.params[1].clamp_(-0.1, 0.1)
    written = weights(problem.params)
    with pytest.raises(ValueError, match="weights were written"):
        problem.opt.step()
    assert_same(weights(problem.params), written)


@both_backends
def test_a_step_at_w_that_fails_before_its_update_leaves_the_weights(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(backend, rho=0.0).train(4)
    before = weights(problem.params)

    def failing(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(passes, "update", failing)
    with pytest.raises(MemoryError):
        problem.step()
    assert_same(weights(problem.params), before)
