"""An optimizer that a trainer has wrapped in a dynamic subclass, whose reads fall through and whose writes do not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, running_stats_once
from tests.support.kinds import Net, all_styles, assert_clean
from tests.support.problems import ALL_STYLES, Problem, assert_same, parameter, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)


class FallsThrough:
    """As Fabric's optimizer is made: nothing of the wrapped one's own, all reads fall through."""

    def __init__(self, optimizer: Sassha) -> None:
        self._inner = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (FallsThrough, type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._inner.step() if closure is None else self._inner.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Copied:
    """As Lightning's is made: with a copy of the wrapped one's attributes, and a closure that does nothing."""

    def __init__(self, optimizer: Sassha) -> None:
        self.__dict__ = {k: v for k, v in vars(optimizer).items() if k not in ("step", "__del__")}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Copied, type(optimizer)), {})
        self._inner = optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._inner.step(closure=closure or (lambda: None))

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()


WRAPPERS = {"falls through": FallsThrough, "copied": Copied}
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


@pytest.fixture
def wrapped(wrapper: str) -> Iterator[Problem]:
    problem = Problem()
    problem.inner = problem.opt
    problem.opt = WRAPPERS[wrapper](problem.opt)
    yield problem
    problem.opt.zero_grad()
    assert_clean(problem.params)


def snapshot(problem: Problem) -> dict[str, Any]:
    return {"weights": weights(problem.params), **copy.deepcopy(getattr(problem, "inner", problem.opt).state_dict())}


@each_wrapper
@all_styles
def test_every_style_takes_the_same_steps(style: str, wrapped: Problem) -> None:
    assert_same(snapshot(wrapped.train(7, style)), snapshot(Problem().train(7)))


@each_wrapper
def test_phases_of_steps_of_one_pass(wrapper: str) -> None:
    wrapped = Problem(rho=0.0)
    wrapped.inner = wrapped.opt
    wrapped.opt = WRAPPERS[wrapper](wrapped.opt)
    for _ in range(7):
        wrapped.opt.zero_grad()
        with wrapped.opt.hessian_pass():
            wrapped.loss().backward()
        wrapped.opt.step()
        wrapped.steps += 1
    assert_same(snapshot(wrapped), snapshot(Problem(rho=0.0).train(7)))


@each_wrapper
@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_gradients_that_a_closures_step_would_drop_are_refused(rho: float, wrapper: str) -> None:
    wrapped = Problem(rho=rho)
    wrapped.opt = WRAPPERS[wrapper](wrapped.opt)
    before = weights(wrapped.params)
    wrapped.loss().backward()
    with pytest.raises(ValueError, match="found gradients that it would drop"):
        wrapped.opt.step(wrapped.loss)
    assert_same(weights(wrapped.params), before)


@each_wrapper
@all_styles
def test_steps_through_wrapper_and_optimizer_mix(style: str, wrapped: Problem) -> None:
    wrapper = wrapped.opt
    for i in range(7):
        wrapped.opt = wrapper if i % 2 else wrapped.inner
        wrapped.step(style)
    assert_same(snapshot(wrapped), snapshot(Problem().train(7)))
    wrapped.opt = wrapper


@each_wrapper
@pytest.mark.parametrize("perturb, step", [(True, False), (False, True)], ids=["perturb wrapped", "step wrapped"])
def test_a_step_may_begin_here_and_end_there(perturb: bool, step: bool, wrapped: Problem) -> None:
    for _ in range(4):
        wrapped.opt.zero_grad()
        wrapped.loss().backward()
        (wrapped.opt if perturb else wrapped.inner).perturb()
        assert wrapped.opt.perturbed and wrapped.inner.perturbed and wrapped.opt.second_pass
        with (wrapped.inner if perturb else wrapped.opt).hessian_pass():
            wrapped.loss().backward()
        (wrapped.opt if step else wrapped.inner).step()
        assert not wrapped.opt.perturbed and not wrapped.inner.perturbed
        wrapped.steps += 1
    assert_same(snapshot(wrapped), snapshot(Problem().train(4)))


@each_wrapper
@pytest.mark.parametrize("second_pass", [False, True])
def test_restore_through_the_wrapper(second_pass: bool, wrapped: Problem) -> None:
    wrapped.train(1)
    before = weights(wrapped.params)
    wrapped.perturb()
    if second_pass:
        wrapped.loss().backward()
    wrapped.opt.restore()
    assert_same(weights(wrapped.params), before)
    assert not wrapped.inner.perturbed
    if second_pass:
        wrapped.inner.step()
        wrapped.steps += 1
    assert_same(snapshot(wrapped.train(2)), snapshot(Problem().train(wrapped.steps)))


@each_wrapper
def test_state_dict_through_the_wrapper_is_of_w_with_all_counts(wrapped: Problem) -> None:
    wrapped.train(2)
    before = weights(wrapped.params)
    wrapped.opt.step(lambda: wrapped.loss() * float("nan"))
    assert wrapped.opt.skipped_steps == 1 and wrapped.opt.skipped_steps == 1
    assert wrapped.inner.skipped_steps == 1
    wrapped.perturb()
    state = copy.deepcopy(wrapped.opt.state_dict())
    assert_same(weights(wrapped.params), before)
    assert not wrapped.inner.perturbed and state["param_groups"][0]["steps"] == 2
    other = Problem()
    other.model.load_state_dict(wrapped.model.state_dict())
    other.opt.load_state_dict(state)
    other.steps = 2
    wrapped.opt.zero_grad()
    assert_same(weights(wrapped.train(4).params), weights(other.train(4).params))


@each_wrapper
def test_loading_through_the_wrapper(wrapped: Problem) -> None:
    source = Problem().train(4)
    wrapped.train(2)
    wrapped.model.load_state_dict(source.model.state_dict())
    wrapped.inner.load_state_dict(source.opt.state_dict())
    wrapped.steps = 4
    assert_same(snapshot(wrapped.train(3)), snapshot(source.train(3)))


@each_wrapper
def test_groups_of_the_optimizer_count_after_loading_through_the_wrapper_itself(wrapped: Problem) -> None:
    wrapped.train(2)
    wrapped.opt.load_state_dict(copy.deepcopy(wrapped.inner.state_dict()))
    for group in wrapped.inner.param_groups:
        group.update(lr=0.0)
    before = weights(wrapped.params)
    wrapped.train(1)
    assert_same(weights(wrapped.params), before)


@each_wrapper
def test_a_batch_norm_helped_through_the_wrapper(wrapper: str) -> None:
    results = []
    for wrap in (True, False):
        net = Net(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        inner = Sassha(net.parameters(), lr=0.01, backend="cpu")
        opt = WRAPPERS[wrapper](inner) if wrap else inner
        running_stats_once(net, opt)
        for style in (*ALL_STYLES, *ALL_STYLES):
            opt.zero_grad()
            ALL_STYLES[style](opt, net.loss)
        results.append([*weights(net.parameters()), *weights(net.buffers())])
    assert_same(*results)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing stays behind


def raised(problem: Problem) -> None:
    def closure() -> Tensor:
        problem.loss().backward()
        if problem.opt.perturbed:
            raise KeyError("as a loader does")
        return problem.loss()

    with pytest.raises(KeyError):
        problem.opt.step(closure)


def raised_in_hessian_pass(problem: Problem) -> None:
    problem.perturb()
    with pytest.raises(KeyError), problem.opt.hessian_pass():
        problem.loss().backward()
        raise KeyError
    problem.opt.restore()


def given_up(problem: Problem) -> None:
    problem.perturb()
    problem.loss().backward(create_graph=True)
    problem.opt.state_dict()


def restored(problem: Problem) -> None:
    problem.perturb()
    problem.opt.restore()


def restored_and_stepped(problem: Problem) -> None:
    problem.perturb()
    problem.loss().backward(create_graph=True)
    problem.opt.restore()
    problem.opt.step()


def hessian_pass_alone(problem: Problem) -> None:
    with problem.opt.hessian_pass():
        problem.loss().backward()


def hessian_pass_for_nothing(problem: Problem) -> None:
    with problem.opt.hessian_pass():
        pass


def refused(problem: Problem) -> None:
    problem.loss().backward(create_graph=True)
    with contextlib.suppress(ValueError):
        problem.opt.step()


def skipped(problem: Problem) -> None:
    problem.opt.step(lambda: problem.loss() * float("inf"))


def checked(problem: Problem) -> None:
    problem.opt.check_products(problem.loss)


def asked(problem: Problem) -> None:
    assert problem.opt.hessian_due in (True, False) and problem.opt.skipped_steps == 0


ENDINGS = [raised, raised_in_hessian_pass, given_up, restored, restored_and_stepped, hessian_pass_alone]
ENDINGS += [hessian_pass_for_nothing, refused, skipped, checked, asked]


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("steps", [0, 1, 3], ids=["first", "lazy", "Hessian"])
@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
def test_no_hook_and_no_mode_is_left_behind(end: Callable[[Problem], None], steps: int, rho: float) -> None:
    if end in (raised, raised_in_hessian_pass) and rho == 0:
        pytest.skip("there is no second pass")
    problem = Problem(rho=rho).train(steps)
    problem.opt.zero_grad()
    end(problem)
    problem.opt.zero_grad()
    assert_clean(problem.params)
    mine = problem.params[0].register_hook(lambda grad: None)
    assert list(problem.params[0]._backward_hooks) == [mine.id]
    mine.remove()
    problem.step()
    problem.opt.zero_grad()
    assert_clean(problem.params)


def test_the_users_own_hooks_stay_in_their_order() -> None:
    problem, order = Problem(), []
    first = problem.params[0].register_hook(lambda grad: order.append("first"))
    second = problem.params[0].register_hook(lambda grad: order.append("second"))
    for style in ALL_STYLES:
        problem.step(style)
    assert list(problem.params[0]._backward_hooks) == [first.id, second.id]
    assert order == ["first", "second"] * 8


@pytest.mark.parametrize("style", ALL_STYLES)
def test_a_hook_that_scales_gradients_scales_their_products_once(style: str) -> None:
    def curvature(scale: float) -> Tensor:
        w = parameter(1.0, -2.0, 3.0, dtype=torch.float64)
        w.register_hook(lambda grad: scale * grad)
        opt = Sassha([w], rho=1e-12)
        ALL_STYLES[style](opt, lambda: (w**4).sum())
        return opt.state[w]["exp_hessian"]

    torch.testing.assert_close(curvature(3.0), 3 * curvature(1.0), rtol=1e-9, atol=0)
