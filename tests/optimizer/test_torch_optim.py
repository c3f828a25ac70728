"""What torch holds its own optimizers to (its test/test_optim.py), where no other file here has it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from sassha_fused import Sassha
from tests.support.problems import BACKENDS, STYLES, Problem, assert_differ, assert_same, undisturbed, weights
from tests.support.reference import ReferenceSassha

both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)
SCHEDULERS: dict[str, Callable[[Sassha], Any]] = {
    "none": lambda opt: None,
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 5, 0.9),
    "ExponentialLR and StepLR": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(opt, 0.99), lr_scheduler.StepLR(opt, 10, 0.99)]
    ),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.4, total_iters=4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 10),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=30),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.05, 5, cycle_momentum=True),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=3),
}


def regression(contiguous: bool) -> tuple[nn.Parameter, nn.Parameter, Callable[[], Tensor]]:
    """A weight and a bias, slices of larger memory where not contiguous, and a loss."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(10, 5, 2, generator=generator), torch.randn(10, 2, generator=generator)
    weight, bias = (nn.Parameter(t[..., 0].contiguous() if contiguous else t[..., 0]) for t in (weight, bias))
    assert weight.is_contiguous() == bias.is_contiguous() == contiguous
    inputs = torch.randn(5, generator=generator)
    return weight, bias, lambda: (weight.mv(inputs) + bias).square().sum()


@both_backends
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_goes_in_the_right_direction_with_each_scheduler(backend: str, contiguous: bool, name: str) -> None:
    weight, bias, loss = regression(contiguous)
    opt = Sassha([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=0.02, hessian_interval=3, backend=backend)
    scheduler = SCHEDULERS[name](opt)
    start = loss().item()
    for _ in range(20):
        value = opt.step(loss)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(value)
        elif scheduler is not None:
            scheduler.step()
    assert loss().item() < 0.5 * start
    assert weight.is_contiguous() == contiguous


@both_backends
@all_styles
def test_strides_with_gaps_change_no_number(backend: str, style: str) -> None:
    results = []
    for contiguous in (True, False):
        weight, bias, loss = regression(contiguous)
        opt = Sassha([weight, bias], lr=0.01, hessian_interval=2, hessian_samples=2, backend=backend)
        for _ in range(5):
            STYLES[style](opt, loss)
        results.append([weight.detach().contiguous(), bias.detach().contiguous()])
        results[-1] += [opt.state[weight]["exp_avg"], opt.state[weight]["exp_hessian"]]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@both_backends
def test_weight_decay_acts_where_the_gradient_does_not(backend: str) -> None:
    decayed, plain = (nn.Parameter(torch.tensor([2.0, -4.0])) for _ in range(2))
    opt = Sassha([{"params": [decayed], "weight_decay": 0.5}, {"params": [plain]}], lr=0.1, backend=backend)
    for _ in range(3):
        opt.step(lambda: 0 * (decayed.sum() + plain.sum()))
    assert_same(plain.detach(), torch.tensor([2.0, -4.0]))
    torch.testing.assert_close(decayed.detach(), torch.tensor([2.0, -4.0]) * 0.95**3)


@both_backends
@all_styles
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"hessian_samples": 3}], ids=str)
def test_zero_gradients_move_nothing_and_count(backend: str, style: str, options: dict[str, Any]) -> None:
    problem = Problem(backend, **options)
    problem.opt.param_groups[1]["weight_decay"] = 0.0
    before = weights(problem.params)
    for _ in range(4):
        STYLES[style](problem.opt, lambda: 0 * problem.loss())
    assert_same(weights(problem.params), before)
    for state in problem.opt.state.values():
        assert int(state["step"]) == 4
        assert not state["exp_avg"].any() and not state["exp_hessian"].any()
    assert problem.opt.skipped_steps == 0


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


@both_backends
@pytest.mark.parametrize("style", ["closure", "standard"])
def test_the_closure_is_called_twice_and_its_first_loss_returned(backend: str, style: str) -> None:
    problem = Problem(backend)
    losses: list[Tensor] = []

    def loss() -> Tensor:
        losses.append(problem.loss())
        return losses[-1]

    for t in range(4):
        result = STYLES[style](problem.opt, loss)
        assert len(losses) == 2 * (t + 1)
        assert_same(result, losses[-2].detach())
        assert not torch.equal(losses[-2], losses[-1])


class Several(nn.Module):
    """Parameters of every rank, of which one is frozen now and then."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes: tuple[tuple[int, ...], ...] = ((), (3,), (4, 5), (2, 3, 4), (129,))
        values = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]
        self.tensors = nn.ParameterList(values)

    def loss(self, t: int) -> Tensor:
        total = sum(((p.double() + t / 7).cos() * (i + 1)).sum() for i, p in enumerate(self.tensors))
        return total + self.tensors[1].double().sum().sin() * self.tensors[0].double()


def steps_of_every_kind(model: Several, opt: Any) -> list[list[Tensor]]:
    """Seven steps, one without gradients, one parameter frozen and thawed; the weights after each."""
    history = []
    for t in range(7):
        model.tensors[2].requires_grad_(t not in (2, 3))
        if t == 4:
            opt.zero_grad()
            opt.perturb()
            opt.restore()
        else:
            opt.step(lambda: model.loss(t))
        history.append(weights(model.tensors))
    return history


HYPERPARAMETERS = {
    "plain": {},
    "three samples": {"hessian_samples": 3, "seed": 12345678901},
    "adaptive": {"adaptive": True, "rho": 0.5, "weight_decay": 0.1},
    "update": {"bias_correction": "update", "hessian_warmup": 2, "hessian_power": 1.0},
    "maximize": {"maximize": True},
}


@both_backends
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_seven_steps_match_the_per_tensor_loop(backend: str, name: str) -> None:
    options = {"lr": 0.01, "hessian_interval": 3, **HYPERPARAMETERS[name]}
    model, other = Several(torch.float64), Several(torch.float64)
    opt = Sassha(model.parameters(), backend=backend, **options)
    reference = ReferenceSassha(other.parameters(), **options)
    ours, theirs = steps_of_every_kind(model, opt), steps_of_every_kind(other, reference)
    for t in range(7):
        torch.testing.assert_close(ours[t], theirs[t], rtol=1e-11, atol=1e-12)
    for param, same in zip(model.parameters(), other.parameters()):
        for key in ("exp_avg", "exp_hessian"):
            torch.testing.assert_close(opt.state[param][key], reference.state[same][key], rtol=1e-10, atol=1e-12)
        for key in ("step", "hessian_step"):
            assert int(opt.state[param][key]) == reference.state[same][key]
    assert opt.state_dict()["param_groups"][0]["hessian_evaluations"] == reference.hessian_evaluations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_the_backends_agree_over_seven_steps_and_bit_for_bit_up_to_float32(dtype: torch.dtype, name: str) -> None:
    histories, states = [], []
    for backend in BACKENDS:
        model = Several(dtype)
        opt = Sassha(model.parameters(), lr=0.01, hessian_interval=3, backend=backend, **HYPERPARAMETERS[name])
        histories.append(steps_of_every_kind(model, opt))
        states.append(opt.state_dict()["state"])
    assert_differ(histories[0][0], histories[0][6])
    if dtype == torch.float64:  # where the norm, also summed in float64, is not rounded once more
        torch.testing.assert_close(histories[0], histories[1], rtol=1e-12, atol=1e-13)
    else:
        assert_same(histories[0], histories[1])
        assert_same(states[0], states[1])


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


@pytest.mark.parametrize("shape", [(300_001,), (70, 40, 50), (2, 100_000), (3, 64, 30, 30)], ids=str)
def test_the_backends_agree_bit_for_bit_on_a_large_tensor(shape: tuple[int, ...]) -> None:
    results = []
    for backend in BACKENDS:
        w = nn.Parameter(torch.linspace(-2, 2, math.prod(shape)).reshape(shape))
        if len(shape) == 4:
            w = nn.Parameter(w.detach().to(memory_format=torch.channels_last))
        opt = Sassha([w], lr=0.01, hessian_interval=2, hessian_samples=2, backend=backend)
        for _ in range(3):
            opt.step(lambda: w.pow(4).mean() * 1000)
        results.append([w.detach(), opt.state[w]["exp_avg"], opt.state[w]["exp_hessian"]])
    assert_same(*results)


@all_styles
def test_meta_parameters_go_through_every_step_without_numbers(style: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        inputs = torch.empty(5, 3)
    opt = Sassha(model.parameters(), hessian_interval=2)
    for _ in range(4):
        assert STYLES[style](opt, lambda: model(inputs).square().mean()).is_meta
    assert all(value.is_meta for state in opt.state.values() for value in state.values())
    assert opt.skipped_steps == 0


def test_repr_shows_each_group_with_its_options() -> None:
    text = repr(Problem(rho=0.125).opt)
    assert text.startswith("Sassha (\nParameter Group 0\n")
    assert "Parameter Group 1\n" in text
    for line in ("lr: 0.05", "lr: 0.03", "rho: 0.125", "hessian_interval: 3", "bias_correction: step", "seed: 0"):
        assert f"    {line}\n" in text


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
