"""When a step is a Hessian step, what hessian_due says of it, and the signs that its products take."""

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.problems import BACKENDS, Problem, backward, parameter, single_threaded
from tests.support.reference import signs

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@both_backends
def test_hessian_due_says_at_every_point_whether_a_graph_is_needed(backend: str) -> None:
    problem = Problem(backend)
    opt = problem.opt
    for due in (True, False, False, True, False):
        assert (opt.hessian_due, opt.perturbed) == (due, False)
        opt.zero_grad()
        problem.loss().backward()
        assert (opt.hessian_due, opt.perturbed) == (due, False)
        opt.perturb()
        assert (opt.hessian_due, opt.perturbed) == (due, True)
        backward(problem.loss(), create_graph=due)
        assert (opt.hessian_due, opt.perturbed) == (due, True)
        opt.restore()  # which has taken the products
        assert (opt.hessian_due, opt.perturbed) == (False, False)
        opt.step()
        problem.steps += 1


def test_reading_hessian_due_installs_nothing() -> None:
    problem = Problem()
    for _ in range(4):
        assert problem.opt.hessian_due == (problem.steps % 3 == 0)
        problem.loss().backward()
        assert problem.opt.hessian_due == (problem.steps % 3 == 0)
        assert not any(param._backward_hooks for param in problem.params)
        problem.opt.zero_grad()
        problem.step()
        assert not any(param._backward_hooks for param in problem.params)


@both_backends
def test_hessian_due_is_false_in_the_first_pass_of_a_closure(backend: str) -> None:
    problem = Problem(backend)
    seen = []

    def closure() -> Tensor:
        seen.append((problem.opt.hessian_due, problem.opt.perturbed))
        return problem.loss()

    for _ in range(3):
        problem.opt.step(closure)
    # Even where a step in the other style was begun and not finished.
    problem.perturb()
    backward(problem.loss(), create_graph=True)
    problem.opt.restore()
    problem.opt.zero_grad()
    problem.opt.step(closure)
    first, lazy, hessian = (False, False), (False, True), (True, True)
    assert seen == [first, hessian, first, lazy, first, lazy, first, hessian]


@both_backends
@pytest.mark.parametrize("interval, warmup", [(1, 0), (3, 0), (3, 2), (3, 4), (10, 3)])
def test_hessian_steps_follow_interval_and_warm_up(backend: str, interval: int, warmup: int) -> None:
    problem = Problem(backend, hessian_interval=interval, hessian_warmup=warmup)
    due = []
    for _ in range(12):
        before = problem.snapshot()["state"]
        due.append(problem.opt.hessian_due)
        problem.step()
        after = problem.snapshot()["state"]
        if before:
            changed = not torch.equal(before[0]["exp_hessian"], after[0]["exp_hessian"])
            assert changed == due[-1]
    assert due == [(t - 1) % interval == 0 or t <= warmup for t in range(1, 13)]


@both_backends
@pytest.mark.parametrize("own_group", [True, False])
def test_a_parameter_that_joins_late_makes_one_more_hessian_step(backend: str, own_group: bool) -> None:
    first, late = parameter(1.0, 2.0), parameter(1.0, 2.0)
    groups = [{"params": [first]}, {"params": [late]}] if own_group else [{"params": [first, late]}]
    opt = Sassha(groups, lr=0.01, hessian_interval=3, backend=backend)
    due = []
    for t in range(8):

        def loss(joined: bool = t >= 2) -> Tensor:
            return (first**3).sum() + (late**3).sum() if joined else (first**3).sum()

        opt.zero_grad()
        loss().backward()
        opt.perturb()
        due.append(opt.hessian_due)
        backward(loss(), create_graph=due[-1])
        opt.step()
    assert due == [True, False, True, True, False, False, True, False]
    counts = [[int(opt.state[param][name]) for name in ("step", "hessian_step")] for param in (first, late)]
    assert counts == [[8, 7], [6, 5]]
    assert opt.state_dict()["param_groups"][0]["hessian_evaluations"] == 4


@both_backends
def test_signs_of_a_late_evaluation_are_those_of_its_global_index(backend: str) -> None:
    first, late = nn.Parameter(torch.ones(130)), nn.Parameter(torch.ones(70))
    opt = Sassha(
        [{"params": [first]}, {"params": [late]}], hessian_samples=2, seed=3, betas=(0.9, 0.5), backend=backend
    )
    opt.step(lambda: first.sum() ** 2)
    # H = d^2/dw_i dw_j of (sum w)^2 = 2 for all i, j: z . Hz = 2 z_i sum z, over both parameters.
    opt.step(lambda: (first.sum() + late.sum()) ** 2)
    z = [signs(0, 200, seed=3, evaluation=1, sample=s) for s in range(2)]
    expected = sum(2 * zs * zs.sum() for zs in z).abs() / 2
    torch.testing.assert_close(2 * opt.state[late]["exp_hessian"].double(), expected[130:])
    assert (opt.state[first]["hessian_step"], opt.state[late]["hessian_step"]) == (2, 1)
