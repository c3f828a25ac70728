"""Steps of the reference that go wrong."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.quadratic import assert_bitwise, parameter, quadratic, snapshot
from tests.support.reference import ReferenceSassha

NAN = float("nan")


def nan_gradient(w: Tensor) -> Tensor:
    return (0 * w).sqrt().sum()


def nan_product(w: Tensor) -> Tensor:
    return (w - w.detach()).abs().pow(1.5).sum()


@pytest.mark.parametrize(
    "bad_pass, fault",
    [
        pytest.param(0, nan_gradient, id="first gradient"),
        pytest.param(1, nan_gradient, id="second gradient"),
        pytest.param(1, nan_product, id="product"),
        pytest.param(0, lambda w: torch.tensor(math.inf), id="first loss"),
        pytest.param(1, lambda w: torch.tensor(NAN), id="second loss"),
    ],
)
def test_a_step_that_is_not_finite_leaves_no_trace(bad_pass: int, fault: Callable[[Tensor], Tensor]) -> None:
    runs = []
    for bad_steps in ([0, 4], []):  # both are Hessian steps: signs and schedule must not move either
        _, _, params, loss = quadratic()
        opt = ReferenceSassha(params, hessian_interval=3, hessian_samples=3)
        for step in range(7):
            if step in bad_steps:
                calls = iter(range(2))
                before = snapshot(opt)
                opt.step(
                    lambda params=params, loss=loss, calls=calls: (
                        loss() + (fault(params[3]) if next(calls) == bad_pass else 0)
                    )
                )
                assert_bitwise(snapshot(opt), before)
            if step not in (0, 4):
                opt.step(loss)
        assert opt.skipped_steps == len(bad_steps)
        runs.append(snapshot(opt))
    assert_bitwise(*runs)


def test_a_bad_gradient_or_product_given_by_hand_skips_the_step() -> None:
    w = parameter(1.0, 2.0)
    opt = ReferenceSassha([w])
    good, bad = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, NAN], dtype=torch.float64)
    for first, second, product in [(bad, good, good), (good, bad, good), (good, good, bad)]:
        w.grad = first
        opt.perturb()
        w.grad = second
        opt.update([product])
        assert_bitwise(w.detach(), torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert w not in opt.state
    assert (opt.skipped_steps, opt.hessian_evaluations) == (3, 0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, NAN])
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_stay_where_the_norm_of_the_first_pass_is_not_finite(value: float, adaptive: bool) -> None:
    a, b = parameter(1.0, -0.0, 3.0), parameter(2.0)
    opt = ReferenceSassha([a, b], adaptive=adaptive)
    seen = []

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in (a, b)])
        return (a * torch.tensor([1.0, 1.0, value], dtype=torch.float64)).sum() + b.square().sum()

    opt.step(closure)
    assert len(seen) == 2
    assert_bitwise(*seen)
    assert bool(seen[1][0].signbit()[1])
    assert_bitwise([a.detach(), b.detach()], seen[0])
    assert (opt.skipped_steps, opt.steps_taken) == (1, 0)


def test_large_finite_gradients_are_not_skipped() -> None:
    w = torch.nn.Parameter(torch.ones(100))
    opt = ReferenceSassha([w])
    w.grad = torch.full((100,), 1e30)  # its norm squared exceeds float32
    opt.update([torch.full((100,), 1e30)])
    assert opt.skipped_steps == 0
    assert opt.state[w]["step"] == 1


def test_an_exception_in_the_second_pass_restores_the_weights() -> None:
    _, _, params, loss = quadratic()
    opt = ReferenceSassha(params)
    before = snapshot(opt)
    calls = iter([None, KeyboardInterrupt()])

    def closure() -> Tensor:
        if (error := next(calls)) is not None:
            raise error
        return loss()

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_bitwise(snapshot(opt), before)
