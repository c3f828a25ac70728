"""Options of the groups, and learning rates that move."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.problems import BACKENDS, Problem, assert_same, parameter, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


# ---------------------------------------------------------------------------------------------------------------------
# Options of the groups


@both_backends
@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0.01},
        {"betas": (0.5, 0.5)},
        {"eps": 0.5},
        {"weight_decay": 0.3},
        {"hessian_power": 1.0},
        {"bias_correction": "update"},
        {"maximize": True},
    ],
    ids=str,
)
def test_an_option_of_one_group_concerns_that_group_alone(backend: str, option: dict[str, Any]) -> None:
    def run(first: dict[str, Any], second: dict[str, Any]) -> list[Tensor]:
        params = [parameter(1.0, -2.0), parameter(1.0, -2.0)]
        groups = [{"params": [params[0]], **first}, {"params": [params[1]], **second}]
        opt = Sassha(groups, rho=0.0, hessian_interval=4, backend=backend)
        for _ in range(6):  # a separable loss, without perturbation: nothing but the option links the groups
            opt.step(lambda: (params[0] ** 4).sum() + (params[1] ** 4).sum())
        return weights(params)

    plain, mixed, changed = run({}, {}), run({}, option), run(option, option)
    assert_same(mixed[0], plain[0])
    assert_same(mixed[1], changed[1])
    assert not torch.equal(mixed[1], plain[1])


@both_backends
def test_the_norm_is_one_over_all_groups_and_the_radius_each_groups_own(backend: str) -> None:
    params = [parameter(1.0, 2.0, dtype=torch.float64), parameter(3.0), parameter(5.0, dtype=torch.bfloat16)]
    groups = [{"params": [params[0]], "rho": 0.1}, {"params": params[1:], "rho": 0.6}]
    opt = Sassha(groups, backend=backend)
    (params[0] * torch.tensor([2.0, 3.0])).sum().backward()
    (params[1] * 6 + params[2].float() * 24).sum().backward()
    opt.perturb()
    norm = (4 + 9 + 36 + 576) ** 0.5  # = 25
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected += torch.tensor([2.0, 3.0], dtype=torch.float64) * 0.1 / norm
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(params[1].detach(), torch.tensor([3.0 + 6 * 0.6 / 25]))
    assert_same(params[2].detach(), torch.tensor([5.0 + 24 * 0.6 / 25]).bfloat16())


@both_backends
def test_maximize_is_minimizing_the_negative(backend: str) -> None:
    up, down = parameter(1.0, -2.0), parameter(1.0, -2.0)
    climb, fall = Sassha([up], maximize=True, backend=backend), Sassha([down], backend=backend)
    for _ in range(5):
        climb.step(lambda: -(up**4).sum())
        fall.step(lambda: (down**4).sum())
    assert_same(up.detach(), down.detach())


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


@both_backends
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
def test_a_tensor_learning_rate_equals_the_float_bit_for_bit(
    backend: str, shape: tuple[int, ...], lr_dtype: torch.dtype
) -> None:
    lr = torch.full(shape, 0.0625, dtype=lr_dtype)
    params = [[parameter(1.0, -2.0), nn.Parameter(torch.tensor(3.0)), parameter(1.0).bfloat16()] for _ in range(2)]
    params = [[nn.Parameter(p.detach().clone()) for p in some] for some in params]
    opts = [Sassha(some, lr=rate, weight_decay=0.1, backend=backend) for some, rate in zip(params, (lr, 0.0625))]
    for t in range(4):
        for opt, some in zip(opts, params):
            opt.step(lambda: sum((p.float() ** 4).sum() for p in some))
        if t == 1:
            lr.fill_(0.125)
            opts[1].param_groups[0]["lr"] = 0.125
    assert_same(weights(params[0]), weights(params[1]))
    assert opts[0].param_groups[0]["lr"] is lr
    assert_same(lr, torch.full(shape, 0.125, dtype=lr_dtype))


SCHEDULERS: dict[str, Callable[[Sassha], Any]] = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
    "ExponentialLR": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5),
    "LinearLR": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.25, total_iters=4),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6),
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8),
    "SequentialLR": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [torch.optim.lr_scheduler.ConstantLR(opt, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)],
        [2],
    ),
}


@both_backends
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_moves_a_tensor_learning_rate_as_it_moves_a_float(backend: str, name: str) -> None:
    rates: list[list[float]] = []
    finals = []
    for lr in (0.125, torch.tensor(0.125, dtype=torch.float64)):
        w = parameter(1.0, -2.0)
        opt = Sassha([w], lr=lr, backend=backend)
        scheduler = SCHEDULERS[name](opt)
        rates.append([])
        for _ in range(6):
            rates[-1].append(float(opt.param_groups[0]["lr"]))
            opt.step(lambda: (w**4).sum())
            scheduler.step()
        assert isinstance(opt.param_groups[0]["lr"], Tensor) == isinstance(lr, Tensor)
        finals.append(w.detach())
    assert len(set(rates[0])) > 1
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-6, atol=0)


@both_backends
def test_the_learning_rate_of_the_moment_is_used(backend: str) -> None:
    problem = Problem(backend).train(2)
    before = weights(problem.params)
    for group in problem.opt.param_groups:
        group["lr"] = 0.0
    problem.step()
    assert_same(weights(problem.params), before)
