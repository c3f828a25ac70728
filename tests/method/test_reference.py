"""The reference itself, held to facts that do not come from it: hand-worked numbers, closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.quadratic import (
    Attempt,
    assert_bitwise,
    check_against_closed_form,
    parameter,
    quadratic,
    snapshot,
)
from tests.support.reference import ReferenceSassha, signs

# ---------------------------------------------------------------------------------------------------------------------
# Steps worked by hand


@pytest.mark.parametrize("correction, third_power", [("step", 1.75 / (1 - 0.75**3)), ("update", 1.75 / (1 - 0.75**2))])
def test_three_steps_on_a_parabola_are_those_worked_by_hand(correction: str, third_power: float) -> None:
    w = parameter(1.0)
    opt = ReferenceSassha(
        [w], 0.1, (0.5, 0.75), 0.5, 0.5, rho=0.25, hessian_interval=2, bias_correction=correction, seed=3
    )

    loss = opt.step(lambda: (2 * w**2).sum())  # g = 4, w' = 1.25, g~ = 5, H = 4
    assert loss == 2
    state = opt.state[w]
    assert (state["step"], state["hessian_step"]) == (1, 1)
    assert (state["exp_avg"].item(), state["exp_hessian"].item()) == (pytest.approx(2.5, rel=1e-12), 1.0)
    assert w.item() == pytest.approx(0.95 - 0.1 * 5 / (2 + 0.5), rel=1e-12)  # 0.75

    opt.step(lambda: (2 * w**2).sum())  # w' = 1, g~ = 4, lazy
    assert (state["step"], state["hessian_step"]) == (2, 1)
    assert (state["exp_avg"].item(), state["exp_hessian"].item()) == (pytest.approx(3.25, rel=1e-12), 1.0)
    second = 0.75 * 0.95 - 0.1 * (3.25 / 0.75) / 2.5
    assert w.item() == pytest.approx(second, rel=1e-12)

    opt.step(lambda: (2 * w**2).sum())  # w' = w + 0.25
    m = 0.5 * 3.25 + 0.5 * 4 * (second + 0.25)
    assert (state["step"], state["hessian_step"]) == (3, 3 if correction == "step" else 2)
    assert state["exp_hessian"].item() == pytest.approx(1.75, rel=1e-15)
    third = second * 0.95 - 0.1 * (m / 0.875) / (math.sqrt(third_power) + 0.5)
    assert w.item() == pytest.approx(third, rel=1e-12)


def test_two_steps_without_bias_correction_are_those_worked_by_hand() -> None:
    w = parameter(1.0)
    opt = ReferenceSassha([w], 0.1, (0.5, 0.75), 0.5, rho=0.25, hessian_interval=1, bias_correction="none")
    opt.step(lambda: (2 * w**2).sum())  # g~ = 5, m = 2.5, H = 4, D = 1
    first = 1 - 0.1 * 2.5 / (1 + 0.5)
    assert w.item() == pytest.approx(first, rel=1e-12)
    opt.step(lambda: (2 * w**2).sum())  # D = 1.75
    m = 0.5 * 2.5 + 0.5 * 4 * (first + 0.25)
    assert w.item() == pytest.approx(first - 0.1 * m / (math.sqrt(1.75) + 0.5), rel=1e-12)
    assert (opt.state[w]["step"], opt.state[w]["hessian_step"]) == (2, 2)


def test_defaults_are_the_published_ones() -> None:
    opt = ReferenceSassha([parameter(1.0)])
    (group,) = opt.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.15, (0.9, 0.999), 1e-4, 0.0)
    assert (group["rho"], group["hessian_power"], group["bias_correction"]) == (0.2, 0.5, "step")
    assert (opt.hessian_interval, opt.hessian_warmup, opt.hessian_samples, opt.seed) == (10, 0, 1, 0)


def test_hessian_is_taken_at_the_perturbed_weights() -> None:
    w = parameter(1.0, -2.0, 0.5)
    opt = ReferenceSassha([w], betas=(0.9, 0.5), rho=0.3)
    g = w.detach() ** 3
    moved = w.detach() + 0.3 * g / g.norm()
    opt.step(lambda: (w**4 / 4).sum())
    torch.testing.assert_close(opt.state[w]["exp_hessian"], 0.5 * 3 * moved**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(opt.state[w]["exp_avg"], 0.1 * moved**3, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Steps on a quadratic, against its closed form


@pytest.mark.parametrize(
    "groups, schedule, problem",
    [
        pytest.param([{}], {}, 0, id="base"),
        pytest.param([{}], {"hessian_interval": 1, "hessian_samples": 3, "seed": 1}, 1, id="k=1, S=3"),
        pytest.param(
            [{}], {"hessian_interval": 10, "hessian_samples": 2, "seed": 2**63 + 5}, 2, id="k=10, S=2, 64-bit seed"
        ),
        pytest.param([{}], {"hessian_warmup": 4, "seed": 2}, 3, id="warm-up"),
        pytest.param([{"adaptive": True}], {"seed": 3}, 4, id="adaptive"),
        pytest.param([{"bias_correction": "update"}], {"seed": 4}, 5, id="update correction"),
        pytest.param(
            [{"bias_correction": "update"}],
            {"hessian_warmup": 5, "hessian_samples": 3, "seed": 5},
            6,
            id="update correction, warm-up",
        ),
        pytest.param([{"bias_correction": "none"}], {"hessian_warmup": 2, "seed": 11}, 7, id="no correction"),
        pytest.param([{"hessian_power": 1.0}], {"hessian_samples": 3, "seed": 6}, 8, id="power 1"),
        pytest.param([{"hessian_power": 0.7}], {"seed": 7}, 9, id="power 0.7"),
        pytest.param([{"maximize": True, "adaptive": True}], {"seed": 8}, 10, id="maximize"),
        pytest.param([{"rho": 0.0, "weight_decay": 0.0}], {"seed": 9}, 11, id="no perturbation, no decay"),
        pytest.param(
            [
                {"lr": 0.02, "rho": 0.5, "weight_decay": 0.3, "betas": (0.5, 0.8), "bias_correction": "none"},
                {"adaptive": True, "bias_correction": "update", "hessian_power": 1.0, "eps": 0.1},
                {"rho": 0.0, "maximize": True, "betas": (0.0, 0.0)},
            ],
            {"hessian_interval": 5, "hessian_warmup": 2, "hessian_samples": 3, "seed": 10},
            12,
            id="groups that differ in everything",
        ),
    ],
)
def test_twelve_steps_on_a_quadratic_match_the_closed_form(
    groups: list[dict], schedule: dict[str, int], problem: int
) -> None:
    opt = check_against_closed_form(groups, schedule, [Attempt()] * 12, problem)
    assert opt.steps_taken == 12


# ---------------------------------------------------------------------------------------------------------------------
# The estimator


def test_mean_of_z_times_Hz_over_many_seeds_approaches_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A = A + A.T
    count = 4000
    z = torch.stack([signs(200, 6, seed, 0, 0) for seed in range(count)])
    deviation = (A.square().sum(1) - A.diagonal().square()).sqrt()
    assert (((z * (z @ A)).mean(0) - A.diagonal()).abs() < 5 * deviation / math.sqrt(count)).all()


def test_many_samples_in_one_step_give_the_absolute_diagonal() -> None:
    A = torch.tensor([[2.0, 3.0, 0.0], [3.0, -1.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    w = parameter(0.1, 0.2, 0.3)
    count = 2000
    opt = ReferenceSassha([w], betas=(0.9, 0.5), hessian_samples=count)
    opt.step(lambda: 0.5 * w @ A @ w)
    # The mean of |z . Hz| would be 3, 3.4 and 1: the absolute value comes after the mean.
    torch.testing.assert_close(
        opt.state[w]["exp_hessian"] / 0.5, A.diagonal().abs(), rtol=0, atol=5 * math.sqrt(10 / count)
    )


def test_sign_does_not_matter_for_one_sample() -> None:
    runs = []
    for flip in (1, -1):
        w = parameter(1.0, 2.0)
        opt = ReferenceSassha([w], hessian_interval=1)
        for product in torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
            w.grad = w.detach().clone()
            opt.update([flip * product])
        runs.append(snapshot(opt))
    assert_bitwise(*runs)


# ---------------------------------------------------------------------------------------------------------------------
# Perturbation


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.floats(0, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_perturbation_has_length_rho_along_the_gradient(
    sizes: list[int], rho: float, adaptive: bool, maximize: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in sizes]
    opt = ReferenceSassha(params, rho=rho, adaptive=adaptive, maximize=maximize)
    before = torch.cat([p.detach().clone() for p in params])
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    g = torch.cat([p.grad for p in params])
    opt.perturb()
    assert opt.perturbed and all(p.grad is None for p in params)
    moved = torch.cat([p.detach() for p in params]) - before
    scaled, along = (moved / before.abs(), g * before.abs()) if adaptive else (moved, g)
    assert scaled.norm().item() == pytest.approx(rho, rel=1e-8, abs=1e-12)
    assert scaled.dot(along).item() == pytest.approx((-1 if maximize else 1) * rho * along.norm().item(), rel=1e-8)
    opt.restore()
    assert_bitwise(torch.cat([p.detach() for p in params]), before)
    assert not opt.perturbed


def test_weights_are_restored_bit_for_bit_when_nothing_is_learned() -> None:
    w = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16())
    before = w.detach().clone()
    opt = ReferenceSassha([w], lr=0.0, rho=0.7)
    for _ in range(10):
        opt.step(lambda: w.float().cos().sum())
        assert_bitwise(w.detach(), before)


def test_maximizing_a_function_is_minimizing_its_negative() -> None:
    runs = []
    for sign, maximize in [(1, False), (-1, True)]:
        _, _, params, loss = quadratic()
        opt = ReferenceSassha(params, maximize=maximize, hessian_interval=3, hessian_samples=3)
        for _ in range(5):
            opt.step(lambda sign=sign, loss=loss: sign * loss())
        runs.append(snapshot(opt))
    assert_bitwise(*runs)


def test_a_step_without_perturbation_is_one_with_rho_zero() -> None:
    runs = []
    for perturbed in (True, False):
        w = parameter(1.0, -2.0)
        opt = ReferenceSassha([w], rho=0.0, weight_decay=0.1)
        for step in range(4):
            if perturbed:
                w.grad = 2 * w.detach()
                opt.perturb()
            w.grad = 2 * w.detach()
            opt.update([w.grad.clone()] if step == 0 else None)
        runs.append(snapshot(opt))
    assert_bitwise(*runs)


@pytest.mark.parametrize("radii, passes", [((0.0, 0.0), 1), ((0.0, 0.1), 2)])
def test_one_pass_is_enough_where_rho_is_zero_in_every_group(radii: tuple[float, ...], passes: int) -> None:
    a, b = parameter(1.0, 2.0), parameter(3.0)
    opt = ReferenceSassha([{"params": [p], "rho": rho} for p, rho in zip((a, b), radii)], hessian_interval=2)
    for _ in range(4):
        seen = []

        def closure() -> Tensor:
            seen.append([p.detach().clone() for p in (a, b)])
            return a.prod() * b.sum() + a.pow(4).sum()

        opt.step(closure)
        assert len(seen) == passes
        assert_bitwise(seen[-1][0], seen[0][0])
        assert bool(seen[-1][1] == seen[0][1]) == (passes == 1)
    assert (opt.steps_taken, opt.hessian_evaluations) == (4, 2)


def test_one_pass_takes_the_steps_of_two_with_a_radius_that_moves_nothing() -> None:
    runs = []
    for rho in (0.0, 1e-300):
        _, _, params, loss = quadratic()
        opt = ReferenceSassha(params, rho=rho, hessian_interval=3, hessian_samples=3)
        for _ in range(7):
            opt.step(loss)
        runs.append(snapshot(opt))
    assert_bitwise(*runs)


def test_norm_of_a_large_float32_gradient_is_as_exact_as_float64() -> None:
    w = torch.nn.Parameter(torch.zeros(3_000_001))
    w.grad = torch.full_like(w, 1.1).requires_grad_(False)
    opt = ReferenceSassha([w])
    opt.perturb()
    assert opt._grad_norm == pytest.approx(math.sqrt(w.numel()) * torch.tensor(1.1).item(), rel=1e-12)


def test_perturbing_twice_and_a_missing_product_are_errors() -> None:
    w, other = parameter(1.0), parameter(2.0)
    opt = ReferenceSassha([w, other])
    w.grad = torch.ones_like(w).detach()
    with pytest.raises(ValueError, match="first step of a parameter needs"):
        opt.update()
    w.grad, other.grad = (torch.ones_like(p).detach() for p in (w, other))
    opt.update([w.grad, other.grad])
    w.grad, other.grad = (torch.ones_like(p).detach() for p in (w, other))
    with pytest.raises(ValueError, match="every parameter that takes part"):
        opt.update([w.grad, None])
    opt.perturb()
    with pytest.raises(ValueError, match="twice"):
        opt.perturb()
