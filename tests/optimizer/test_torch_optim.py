"""What torch's optimizers do beside what its generic tests ask of them, which stand in torch_optim/."""

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.problems import BACKENDS, Problem, assert_same, undisturbed, weights

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@both_backends
def test_weight_decay_acts_where_the_gradient_does_not(backend: str) -> None:
    decayed, plain = (nn.Parameter(torch.tensor([2.0, -4.0])) for _ in range(2))
    opt = Sassha([{"params": [decayed], "weight_decay": 0.5}, {"params": [plain]}], lr=0.1, backend=backend)
    for _ in range(3):
        opt.step(lambda: 0 * (decayed.sum() + plain.sum()))
    assert_same(plain.detach(), torch.tensor([2.0, -4.0]))
    torch.testing.assert_close(decayed.detach(), torch.tensor([2.0, -4.0]) * 0.95**3)


@both_backends
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_without_gradients_does_nothing(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    problem.opt.zero_grad()
    for call in (problem.opt.step, problem.opt.perturb, problem.opt.step, problem.opt.perturb, problem.opt.restore):
        assert call() is None
        assert_same(weights(problem.params), undisturbed(Problem, backend, steps)["weights"])
    assert not problem.opt.perturbed
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, backend, steps + 4))


@pytest.mark.slow
@both_backends
def test_a_large_tensor_is_stepped_as_its_pieces_are(backend: str) -> None:
    n, pieces = 3_000_003, 7
    values = torch.linspace(-2, 2, n)
    whole, parts = nn.Parameter(values.clone()), [nn.Parameter(part.clone()) for part in values.chunk(pieces)]
    for params in ([whole], parts):
        opt = Sassha(params, lr=0.01, rho=0.0, hessian_interval=2, backend=backend)
        for _ in range(3):
            opt.step(lambda: torch.cat([param.view(-1) for param in params]).pow(4).sum())
    assert_same(whole.detach(), torch.cat(weights(parts)))
    assert not torch.equal(whole, values)


def test_zero_grad_drops_gradients_or_makes_them_zero() -> None:
    problem = Problem().train(1)
    problem.opt.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in problem.params)
    problem.opt.zero_grad()
    assert all(param.grad is None for param in problem.params)


@both_backends
def test_a_parameter_put_in_the_place_of_another_is_trained_with_the_state_it_is_given(backend: str) -> None:
    old, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    opt = Sassha([old, other], lr=0.01, backend=backend)

    def loss() -> Tensor:
        return sum((param**3).sum() for group in opt.param_groups for param in group["params"])

    opt.step(loss)
    new = torch.ones(5, requires_grad=True)
    state = opt.state.pop(old)
    opt.param_groups[0]["params"][0] = new
    state["exp_avg"] = torch.cat([state["exp_avg"], torch.zeros(2)])
    state["exp_hessian"] = torch.cat([state["exp_hessian"], torch.ones(2)])
    opt.state[new] = state
    kept = old.detach().clone()
    opt.step(loss)
    assert torch.equal(old, kept)
    assert (new[3:] < 1).all() and not torch.equal(new[:2], new[3:])
    assert [int(opt.state[param]["step"]) for param in (new, other)] == [2, 2]


@both_backends
def test_a_cleared_state_begins_again(backend: str) -> None:
    param = torch.full((3,), 2.0, requires_grad=True)
    opt, fresh = (Sassha([param], lr=0.01, backend=backend) for _ in range(2))
    opt.step(lambda: (param**3).sum())
    opt.state.clear()
    start = param.detach().clone()
    opt.step(lambda: (param**3).sum())
    stepped = param.detach().clone()
    with torch.no_grad():
        param.copy_(start)
    fresh.step(lambda: (param**3).sum())
    assert torch.equal(param, stepped)
    assert int(opt.state_dict()["state"][0]["step"]) == 1


@both_backends
def test_gradients_zeroed_in_place_serve_a_whole_run(backend: str) -> None:
    problem = Problem(backend)
    for _ in range(4):
        problem.opt.zero_grad(set_to_none=False)
        problem.loss().backward()
        problem.opt.perturb()
        due = problem.opt.hessian_due
        for param, grad in zip(problem.params, torch.autograd.grad(problem.loss(), problem.params, create_graph=due)):
            param.grad = grad
        problem.opt.step()
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


def test_it_is_a_torch_optimizer() -> None:
    problem = Problem()
    assert isinstance(problem.opt, torch.optim.Optimizer)
    swa = torch.optim.swa_utils.SWALR(problem.opt, swa_lr=0.01)
    problem.step()
    swa.step()
    assert problem.opt.param_groups[0]["lr"] != 0.05


def test_rosenbrocks_valley_is_descended() -> None:
    point = nn.Parameter(torch.tensor([-1.5, 1.5], dtype=torch.float64))
    opt = Sassha([point], lr=0.02, rho=0.001, hessian_interval=1, hessian_power=1.0, hessian_samples=4)
    first = last = None
    for _ in range(200):
        last = opt.step(lambda: (1 - point[0]) ** 2 + 100 * (point[1] - point[0] ** 2) ** 2)
        first = first if first is not None else last
    assert last < 0.1 * first
