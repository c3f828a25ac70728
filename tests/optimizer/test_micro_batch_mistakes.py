"""Micro-batches that raise, are not finite, or are given wrongly: w comes back, and training goes on."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from sassha_fused import SAMSGD, Sassha
from tests.support.kinds import assert_clean
from tests.support.members import assert_at_w
from tests.support.micro_batches import STYLES, Batches, Loss
from tests.support.problems import assert_same, backward, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
# Two passes; one along the momentum; one at w; two without a Hessian; with w worked out from w'.
MEMBERS = ["Sassha", "MSassha", "AdaHessian", "SAMSGD", "MSassha by blocks"]
each_member = pytest.mark.parametrize("kind", MEMBERS)
each_step = pytest.mark.parametrize("steps", [1, 3], ids=["lazy", "Hessian"])
each_style = pytest.mark.parametrize("style", ["list of every kind", "accumulate every kind"])
each_set = pytest.mark.parametrize("set_to_none", [True, False])


def passes_of(problem: Batches) -> int:
    return 2 if problem.opt.defaults.get("rho") and not problem.along_momentum else 1


@functools.cache
def undisturbed(kind: str, count: int) -> dict[str, Any]:
    """The snapshot after some steps that nothing disturbs; read it only."""
    return Batches(kind).train(count).snapshot()


def assert_goes_on(problem: Batches, count: int = 2) -> None:
    """The next steps are those of a run that nothing has disturbed, bit for bit."""
    if not problem.opt.defaults.get("exact_restore", True):
        return  # its weights have come back to rounding
    found, expected = problem.train(count).snapshot(), undisturbed(problem.kind, problem.steps)
    assert_same(found["weights"], expected["weights"])
    assert_same(*({key: state[key] for key in sorted(state)} for state in (found["state"], expected["state"])))


@contextmanager
def refused(problem: Batches, match: str, error: type[BaseException] = ValueError) -> Iterator[None]:
    """The block raises; the weights are then w, and the next steps are those of an undisturbed run."""
    before = weights(problem.params)
    with pytest.raises(error, match=match):
        yield
    assert not problem.opt.perturbed
    assert_at_w(problem, before)
    assert problem.opt._run.step is None
    problem.opt.zero_grad()
    assert_clean(problem.params)
    assert_goes_on(problem)


# ---------------------------------------------------------------------------------------------------------------------
# What breaks a step


@each_member
@each_style
@each_step
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_in_any_micro_batch_of_any_pass_takes_the_weights_back(
    error: type[BaseException], steps: int, style: str, kind: str
) -> None:
    for place in range(0, 4 * passes_of(Batches(kind)), 3):
        problem = Batches(kind).train(steps)
        calls = itertools.count()

        def raising(loss: Loss) -> Loss:
            def raise_in_turn() -> Tensor:
                value = loss()
                if next(calls) == place:
                    raise error("in the loader")
                return value

            return raise_in_turn

        with refused(problem, "in the loader", error):
            STYLES[style](problem, [raising(loss) for loss in problem.losses()])


@each_member
@each_style
@each_step
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_one_micro_batch_that_is_not_finite_skips_the_step(value: float, steps: int, style: str, kind: str) -> None:
    for place in range(1, 4 * passes_of(Batches(kind)), 2):
        problem = Batches(kind).train(steps)
        before = problem.snapshot()
        calls = itertools.count()

        def spoiled(loss: Loss) -> Loss:
            return lambda: loss() * (value if next(calls) == place else 1)

        problem.opt.zero_grad()
        STYLES[style](problem, [spoiled(loss) for loss in problem.losses()])
        assert problem.opt.skipped_steps == 1
        after = problem.snapshot()
        assert_same(after["state"], before["state"])
        assert_at_w(problem, before["weights"][:-1])
        assert_goes_on(problem)


@each_style
def test_closures_die_with_the_step(style: str) -> None:
    problem = Batches().train(1)
    closures = problem.losses()
    alive = [weakref.ref(closure) for closure in closures]
    STYLES[style](problem, closures)
    del closures
    assert [ref() for ref in alive] == [None] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Between accumulate() and step()


def begun(kind: str, steps: int = 3) -> tuple[Batches, list[Loss]]:
    """A problem whose first two micro-batches have been accumulated, and the others."""
    problem = Batches(kind).train(steps)
    problem.opt.zero_grad()
    first, second, *others = problem.losses()
    problem.opt.accumulate(first)
    problem.opt.accumulate(second)
    return problem, others


@each_member
@each_step
def test_restore_gives_the_step_up(steps: int, kind: str) -> None:
    problem = Batches(kind).train(steps)
    before = weights(problem.params)
    first, second, *_ = problem.losses()
    problem.opt.accumulate(first)
    problem.opt.accumulate(second)
    problem.opt.restore()
    assert_at_w(problem, before)
    loss = problem.opt.step(problem.losses())  # without zero_grad(): what was given up is dropped
    problem.steps += 1
    assert loss.isfinite()
    assert_goes_on(problem)


@each_member
def test_step_without_a_closure_is_refused(kind: str) -> None:
    problem = Batches(kind).train(3)
    with refused(problem, r"step\(\) after accumulate\(\) needs the closure of the last micro-batch"):
        problem.opt.accumulate(problem.losses()[0])
        problem.opt.step()


@each_member
def test_perturb_is_refused_and_changes_nothing(kind: str) -> None:
    problem, others = begun(kind)
    with pytest.raises(ValueError, match=r"perturb\(\) after accumulate\(\): call step\(\), or restore\(\)"):
        problem.opt.perturb()
    problem.opt.step(others)
    problem.steps += 1
    assert_goes_on(problem)


@each_member
@pytest.mark.parametrize("closure", [None, 3, [list], []], ids=str)
def test_what_is_no_closure_is_refused_and_changes_nothing(closure: Any, kind: str) -> None:
    problem, others = begun(kind)
    with pytest.raises(TypeError, match="closure must be callable"):
        problem.opt.accumulate(closure)
    problem.opt.step(others)
    problem.steps += 1
    assert_goes_on(problem)


@each_member
def test_saving_changes_nothing(kind: str) -> None:
    problem, others = begun(kind)
    saved = problem.opt.state_dict()
    assert_same(saved["state"], Batches(kind).train(3).snapshot()["state"])
    pickle.dumps(problem.opt), copy.deepcopy(problem.opt)
    problem.opt.step(others)
    problem.steps += 1
    assert_goes_on(problem)


@pytest.mark.parametrize("kind", ["Sassha", "MSassha", "AdaHessian"])
def test_loading_ends_the_step(kind: str) -> None:
    problem = Batches(kind).train(3)
    state = problem.opt.state_dict()
    with refused(problem, r"found gradients that it would drop|the step under way was given up"):
        problem.opt.accumulate(problem.losses()[0])
        problem.opt.load_state_dict(state)
        problem.opt.step(problem.losses()[1:])


@each_member
@each_set
def test_zero_grad_between_micro_batches_is_refused(set_to_none: bool, kind: str) -> None:
    problem = Batches(kind).train(3)
    with refused(problem, "were changed between them: call zero_grad.. after step.. only"):
        problem.opt.accumulate(problem.losses()[0])
        problem.opt.zero_grad(set_to_none)
        problem.opt.accumulate(problem.losses()[1])


def test_another_parameter_between_micro_batches_is_refused() -> None:
    problem = Batches().train(3)
    problem.opt.accumulate(problem.losses()[0])
    problem.opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="gradients or parameters of a step's micro-batches were changed"):
        problem.opt.step(problem.losses()[1])


def test_the_scaler_is_the_same_for_all() -> None:
    scaler = GradScaler("cpu")
    for first, last in ((scaler, None), (None, scaler)):
        problem = Batches().train(3)
        with refused(problem, r"scaler must be the same in accumulate\(\) and step\(\), got"):
            problem.opt.accumulate(problem.losses()[0], scaler=first)
            problem.opt.step(problem.losses()[1], scaler=last)


# ---------------------------------------------------------------------------------------------------------------------
# In a closure


@each_member
@each_step
@pytest.mark.parametrize("used", ["all", "some"])
def test_a_closure_that_clears_the_models_gradients_is_refused(used: str, steps: int, kind: str) -> None:
    problem = Batches(kind).train(steps)
    losses = problem.losses()
    cleared = problem.model if used == "all" else nn.ParameterList([problem.of_first])  # of the first micro-batch alone

    def closure() -> Tensor:
        cleared.zero_grad()
        value = losses[1]()
        value.backward()
        return value

    with refused(problem, "has cleared the gradients of those before it: leave model.zero_grad.. out"):
        problem.opt.step([losses[0], closure])


@pytest.mark.parametrize("kind", ["Sassha", "MSassha", "AdaHessian"])
def test_also_one_that_clears_them_in_place_on_a_hessian_step(kind: str) -> None:
    problem = Batches(kind).train(3)
    losses = problem.losses()

    def closure() -> Tensor:
        problem.model.zero_grad(set_to_none=False)
        value = losses[1]()
        value.backward()
        return value

    with refused(problem, "has cleared the gradients of those before it"):
        problem.opt.step([losses[0], closure])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_unscaling_in_a_micro_batch_that_is_not_the_last_is_refused(part: int) -> None:
    problem, scaler = Batches().train(3), GradScaler("cpu")
    losses = problem.losses()
    loss = losses[part]

    def closure() -> Tensor:
        value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(problem.opt)
        return value

    losses[part] = closure
    with refused(problem, r"scaler.unscale_\(\) in the closure of a micro-batch that is not the last"):
        problem.opt.step(losses, scaler=scaler)


@pytest.mark.parametrize("act", [lambda opt, loss: opt.step(loss), lambda opt, loss: opt.accumulate(loss)])
def test_a_step_within_a_closure_is_refused(act: Callable[[Any, Loss], Any]) -> None:
    problem = Batches().train(3)
    losses = problem.losses()

    def closure() -> Tensor:
        act(problem.opt, losses[0])
        return losses[1]()

    with pytest.raises(ValueError, match="closure"):
        problem.opt.step([losses[0], closure])
    assert not problem.opt.perturbed


# ---------------------------------------------------------------------------------------------------------------------
# Another optimizer


@pytest.mark.parametrize("style", ["list", "accumulate"])
def test_a_hessian_step_while_another_optimizer_waits_for_its_second_backward_is_refused(style: str) -> None:
    problem = Batches().train(3)
    other = Sassha([problem.outside], lr=0.01)
    problem.losses()[0]().backward()
    other.perturb()
    problem.opt.zero_grad()
    at_w_prime = problem.outside.detach().clone()
    try:
        with pytest.raises(ValueError, match="while another optimizer waits for its second backward: take the steps"):
            STYLES[style](problem, problem.losses())
        assert_same(problem.outside.detach(), at_w_prime)
    finally:
        problem.outside.grad = None
        other.restore()
    assert_goes_on(problem)


def test_one_that_takes_no_hessian_may_wait() -> None:
    problem = Batches().train(3)
    other = SAMSGD([problem.outside], lr=0.01)
    problem.losses()[0]().backward()
    other.perturb()
    problem.opt.zero_grad()
    problem.step("list")
    backward(problem.losses()[0]())
    other.step()
    assert problem.outside.isfinite().all()
