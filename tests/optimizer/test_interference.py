"""Steps within steps, beside each other in threads, and dropped half-way."""

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.problems import Problem, assert_same, parameter, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)


def perturbs(problem: Problem, passes: int) -> None:
    if passes == 1:
        problem.loss().backward()
        problem.opt.perturb()


def perturbs_in_the_second(problem: Problem, passes: int) -> None:
    if passes == 2:
        problem.opt.perturb()


def loads(problem: Problem, passes: int) -> None:
    if passes == 2:
        problem.opt.load_state_dict(problem.opt.state_dict())


@pytest.mark.parametrize("act", [perturbs, perturbs_in_the_second, loads])
@pytest.mark.parametrize("before", [0, 1])
def test_a_closure_that_interferes_with_its_step_is_refused_and_the_weights_are_w(
    act: Callable[[Problem, int], None], before: int
) -> None:
    problem = Problem().train(before)
    start, passes = weights(problem.params), []

    def closure() -> Tensor:
        passes.append(1)
        act(problem, len(passes))
        return problem.loss()

    with pytest.raises(ValueError):
        problem.opt.step(closure)
    assert not problem.opt.perturbed
    assert_same(weights(problem.params), start)
    problem.opt.zero_grad()
    problem.step()


def test_a_step_within_the_closure_of_its_own_optimizer_is_refused() -> None:
    problem = Problem().train(1)
    depth = []

    def closure() -> Tensor:
        depth.append(1)
        if len(depth) == 1:
            problem.opt.step(closure)
        return problem.loss()

    with pytest.raises(ValueError, match="closure has ended or begun a step"):
        problem.opt.step(closure)
    assert not problem.opt.perturbed


def test_restore_in_the_closure_takes_no_third_pass() -> None:
    problem = Problem().train(1)
    passes = []

    def closure() -> Tensor:
        passes.append(1)
        loss = problem.loss()
        loss.backward()
        if len(passes) == 2:
            problem.opt.restore()
        return loss

    expected = Problem().train(2)
    problem.opt.step(closure)
    assert len(passes) == 2
    assert_same(weights(problem.params), weights(expected.params))


def test_optimizers_in_threads_know_nothing_of_each_other() -> None:
    ends: dict[str, list[Tensor]] = {}

    def train(name: str) -> None:
        ends[name] = weights(Problem(hessian_interval=2).train(60).params)

    threads = [threading.Thread(target=train, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train("alone")
    assert_same(ends["one"], ends["alone"])
    assert_same(ends["two"], ends["alone"])
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_an_optimizer_that_is_dropped_at_perturbed_weights_leaves_no_hooks() -> None:
    w = parameter(1.0, 2.0)
    opt = Sassha([w])
    (w**3).sum().backward()
    opt.perturb()
    assert w._backward_hooks
    del opt
    gc.collect()
    assert not w._backward_hooks and not w._post_accumulate_grad_hooks


def test_every_backward_of_a_closure_leaves_what_others_had_of_the_first_pass() -> None:
    w, a, b = parameter(1.0, 2.0), parameter(3.0), parameter(4.0)
    opt = Sassha([w], lr=0.0, rho=1e-9, hessian_interval=3)
    for _ in range(4):

        def closure() -> Tensor:
            first, second = (w**2).sum() * a.sum(), (w**2).sum() * b.sum()
            first.backward()
            second.backward()
            return (first + second).detach()

        a.grad = b.grad = None
        opt.step(closure)
        torch.testing.assert_close([a.grad, b.grad], [torch.tensor([5.0])] * 2)


def test_products_are_checked_without_a_trace_on_parameters_outside() -> None:
    model, outside = nn.Linear(3, 2), parameter(2.0)
    opt = Sassha(model.parameters())
    x = torch.randn(5, 3)
    opt.check_products(lambda: (outside * model(x)).square().mean())
    assert outside.grad is None


def test_products_are_checked_where_weights_are_zero_listed_twice_or_frozen() -> None:
    w, frozen = parameter(0.0, 0.0), parameter(1.0)
    frozen.requires_grad_(False)
    with pytest.warns(UserWarning):  # torch's, of the duplicate
        opt = Sassha([w, w, frozen])
    assert max(opt.check_products(lambda: (torch.exp(w) * frozen).sum()).values()) < 1e-2
    w.requires_grad_(False)
    assert opt.check_products(lambda: frozen.sum()) == {}


def test_after_restore_no_graph_is_asked_for_and_products_stay_those_at_perturbed_weights() -> None:
    problem, plain = Problem(), Problem()
    problem.perturb()
    with problem.opt.hessian_pass():
        problem.loss().backward()
    problem.opt.restore()
    assert not problem.opt.hessian_due
    problem.opt.zero_grad()
    problem.loss().backward(create_graph=True)
    problem.opt.step()
    plain.step()
    for one, other in zip(problem.params, plain.params):
        assert_same(problem.opt.state[one]["exp_hessian"], plain.opt.state[other]["exp_hessian"])
