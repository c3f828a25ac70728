"""Where the steps of each member go: down, by each group's options and each of torch's schedulers, or nowhere."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler, swa_utils

from tests.support.backends import QUICK, device_of, each_quick_backend, marks_of
from tests.support.generic import INPUTS, each_input, inputs_of, make, regression, states_of
from tests.support.members import ALONG_MOMENTUM, MEMBERS, each_member
from tests.support.problems import assert_differ, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.9),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 4]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.4, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 8, 2.0),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(opt, 0.99), lr_scheduler.StepLR(opt, 3, 0.5)]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.05, 3, cycle_momentum=True),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=10),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, mode="max", patience=2),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.01, anneal_epochs=4),
}


def in_turn(cases: Iterable[tuple[str, str]], backends: Sequence[str]) -> list[Any]:
    """Cases on each of some backends, every other one on memory that is not contiguous."""
    turns = itertools.cycle([True, False])
    rows = [(*case, backend, next(turns)) for case in cases for backend in backends]
    return [pytest.param(*row, marks=marks_of(row[2])) for row in rows]


@pytest.mark.parametrize("member, option, backend, contiguous", in_turn(INPUTS, QUICK))
def test_it_goes_in_the_right_direction(member: str, option: str, backend: str, contiguous: bool) -> None:
    params, loss = regression(contiguous, device_of(backend))
    opt = make(member, params, option, backend=backend)
    start = loss().item()
    for _ in range(12):
        opt.step(loss)
    assert (loss().item() > 1.1 * start) if option == "maximize" else (loss().item() < 0.9 * start)
    assert all(param.is_contiguous() == contiguous for param in params)


@each_quick_backend
@each_member
def test_strides_with_gaps_change_no_number(backend: str, member: str) -> None:
    found = []
    for contiguous in (True, False):
        params, loss = regression(contiguous, device_of(backend))
        opt = make(member, params, lr=0.01, backend=backend)
        for _ in range(5):
            opt.step(loss)
        found.append([[w.contiguous() for w in weights(params)], states_of(opt, params)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_no_scheduler_of_torch_is_missing() -> None:
    found = {
        name for name, kind in inspect.getmembers(lr_scheduler, inspect.isclass)
        if kind.__module__ == lr_scheduler.__name__ and not name.startswith("_") and name != "LRScheduler"
    }  # fmt: skip
    assert found <= SCHEDULERS.keys()


@pytest.mark.parametrize("member, name, backend, contiguous", in_turn(itertools.product(MEMBERS, SCHEDULERS), ["cpu"]))
def test_a_scheduler_sets_what_it_sets_of_torchs_sgd(member: str, name: str, backend: str, contiguous: bool) -> None:
    runs = [regression(contiguous, device_of(backend)) for _ in range(2)]
    opts = [make(member, [{"params": w[:1]}, {"params": w[1:], "lr": 0.01}], backend=backend) for w, _ in runs]
    lr = opts[0].param_groups[0]["lr"]
    sgd = SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (lr, 0.01)], momentum=0.9)
    schedulers = [SCHEDULERS[name](opt) for opt in (opts[0], sgd)]
    cycles_momentum = name in ("CyclicLR", "OneCycleLR")
    start, rates = runs[0][1]().item(), set()
    for _ in range(7):
        value = opts[0].step(runs[0][1])
        rates.add(sgd.param_groups[0]["lr"])
        for group, of_sgd in zip(opts[1].param_groups, sgd.param_groups):
            group["lr"] = of_sgd["lr"]
            if cycles_momentum and "betas" in group:
                group["betas"] = (of_sgd["momentum"], group["betas"][1])
            elif cycles_momentum:
                group["momentum"] = of_sgd["momentum"]
        opts[1].step(runs[1][1])
        sgd.step()
        for scheduler in schedulers:
            scheduler.step(*([value] if name == "ReduceLROnPlateau" else []))
    assert len(rates) > 1
    assert_same(weights(runs[0][0]), weights(runs[1][0]))
    assert runs[0][1]().item() < start


@each_quick_backend
@each_member
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_learning_rate_in_a_tensor_of_one_element_is_that_number(backend: str, member: str, shape: Any) -> None:
    found = []
    for lr in (0.03125, torch.full(shape, 0.03125)):
        params, loss = regression(device=device_of(backend))
        opt = make(member, params, lr=lr, backend=backend)
        for t in range(4):
            opt.step(loss)
            if t == 1:
                opt.param_groups[0]["lr"] *= 0.5  # in place, where it is a tensor
        found.append(weights(params))
    assert_same(*found)


@each_quick_backend
@each_member
def test_groups_are_optimizers_of_their_own_where_no_norm_is_shared(backend: str, member: str) -> None:
    # Where the loss is a sum over the elements, the signs of the Hessian have no influence.
    arguments = {**MEMBERS[member][1], "backend": backend}
    arguments |= {"rho": 0.0} if "rho" in make(member, [nn.Parameter(torch.ones(1))]).defaults else {}
    groups = [{}, {"lr": 0.001}, {"weight_decay": 0.3}, {"lr": 0.0}]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 7, generator=generator).to(device_of(backend)) for _ in groups]
    together, apart = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))

    def loss(*params: Tensor) -> Tensor:
        return torch.stack([(param - 0.5).pow(4).sum() for param in params]).sum()

    kind = MEMBERS[member][0]
    opt = kind([{"params": [param], **own} for param, own in zip(together, groups)], **arguments)
    opts = [kind([param], **{**arguments, **own}) for param, own in zip(apart, groups)]
    for _ in range(4):
        opt.step(lambda: loss(*together))
        for one, param in zip(opts, apart):
            one.step(lambda: loss(param))
    assert_same(weights(together), weights(apart))
    assert_same(together[3].detach(), values[3])
    assert_differ(weights(together[:3]), values[:3])


# ---------------------------------------------------------------------------------------------------------------------
# Nowhere


@each_quick_backend
@each_input
def test_zero_gradients_move_nothing_and_count(backend: str, member: str, option: str) -> None:
    params, loss = regression(device=device_of(backend))
    opt = make(member, params, **{**inputs_of(member)[option], "weight_decay": 0.0, "backend": backend})
    before = weights(params)
    for _ in range(4):
        opt.step(lambda: 0 * loss())
    assert_same(weights(params), before)
    for state in states_of(opt, params):
        assert int(state.pop("step")) == 4
        state.pop("hessian_step", None)
        assert not any(value.any() for value in state.values())
    assert opt.skipped_steps == 0


@each_quick_backend
@each_member
@pytest.mark.parametrize("steps", [0, 2])
def test_without_gradients_nothing_moves_and_nothing_counts(backend: str, member: str, steps: int) -> None:
    found = []
    for idle in (True, False):
        params, loss = regression(device=device_of(backend))
        opt = make(member, params, backend=backend)
        for _ in range(steps):
            opt.step(loss)
        if idle:
            before = weights(params)
            opt.zero_grad()
            assert opt.step() is None
            for param in params:
                param.requires_grad_(False)
            assert_same(opt.step(lambda: loss() + 1), loss() + 1)
            for param in params:
                param.requires_grad_(True)
            assert_same(weights(params), before)
        for _ in range(4):
            opt.step(loss)
        found.append([weights(params), states_of(opt, params), opt.param_groups[0]["steps"]])
    assert_same(*found)


@each_quick_backend
@each_member
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_step_returns_the_loss_of_its_first_pass(backend: str, member: str, shape: Any) -> None:
    params, loss = regression(device=device_of(backend))
    opt = make(member, params, backend=backend)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        losses.append(loss().reshape(shape))
        return losses[-1]

    passes = 1 if member in ALONG_MOMENTUM or "rho" not in opt.defaults else 2
    for t in range(3):
        returned = opt.step(closure)
        assert len(losses) == (t + 1) * passes
        assert not returned.requires_grad
        assert_same(returned, losses[-passes].detach())
