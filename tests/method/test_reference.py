"""The reference itself, held to facts that do not come from it: hand-worked numbers, closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.quadratic import assert_bitwise, parameter, quadratic, sign_by_definition, snapshot
from tests.support.reference import ReferenceSassha, memory_order, signs

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


def test_defaults_are_the_published_ones() -> None:
    (group,) = ReferenceSassha([parameter(1.0)]).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.15, (0.9, 0.999), 1e-4, 0.0)
    assert (group["rho"], group["hessian_interval"], group["hessian_power"]) == (0.2, 10, 0.5)


def test_hessian_is_taken_at_the_perturbed_weights() -> None:
    w = parameter(1.0, -2.0, 0.5)
    opt = ReferenceSassha([w], betas=(0.9, 0.5), rho=0.3)
    g = w.detach() ** 3
    moved = w.detach() + 0.3 * g / g.norm()
    opt.step(lambda: (w**4 / 4).sum())
    torch.testing.assert_close(opt.state[w]["exp_hessian"], 0.5 * 3 * moved**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(opt.state[w]["exp_avg"], 0.1 * moved**3, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Twelve steps on a quadratic, against closed forms in numpy

BASE = {
    "lr": 0.05,
    "betas": (0.9, 0.99),
    "eps": 1e-3,
    "weight_decay": 0.01,
    "rho": 0.2,
    "adaptive": False,
    "hessian_interval": 3,
    "hessian_warmup": 0,
    "hessian_power": 0.5,
    "bias_correction": "step",
    "maximize": False,
}


def numpy_steps(A: np.ndarray, b: np.ndarray, w: np.ndarray, hyper: list[dict], samples: int, seed: int):
    """Sassha on w A w / 2 + b w; hyper holds one dict per element of w. Yields w, m, D, t and the exponent of c2."""

    def column(name: str) -> np.ndarray:
        return np.array([h[name] for h in hyper])

    beta1, beta2 = column("betas").T
    lr, eps, decay, rho, power = map(column, ["lr", "eps", "weight_decay", "rho", "hessian_power"])
    adaptive, up, by_step = column("adaptive"), column("maximize"), column("bias_correction") == "step"
    interval, warmup = column("hessian_interval"), column("hessian_warmup")
    sign = np.where(up, -1, 1)
    m, D, n, exponent, h = np.zeros(w.size), np.zeros(w.size), np.zeros(w.size), np.zeros(w.size), 0
    for t in range(1, 100):
        g = sign * (A @ w + b)
        norm = np.sqrt(np.sum((np.where(adaptive, np.abs(w), 1) * g) ** 2))
        moved = w + rho * np.where(adaptive, w**2, 1) * g / (norm + 1e-12)
        g = sign * (A @ moved + b)
        due = ((t - 1) % interval == 0) | (t <= warmup)
        if due.any():
            z = np.array([[sign_by_definition(i, seed, h, s) for i in range(w.size)] for s in range(samples)]) * due
            H = np.mean([z[s] * (A @ z[s]) for s in range(samples)], axis=0)
            D = np.where(due, beta2 * D + (1 - beta2) * np.abs(H), D)
            n = n + due
            exponent = np.where(due, np.where(by_step, t, n), exponent)
            h += 1
        m = beta1 * m + (1 - beta1) * g
        denominator = (D / (1 - beta2**exponent)) ** power + eps
        w = w * (1 - lr * decay) - lr / (1 - beta1**t) * m / denominator
        yield w, m, D, t, exponent


@pytest.mark.parametrize(
    "groups, samples, seed",
    [
        pytest.param([{}], 1, 0, id="base"),
        pytest.param([{"hessian_interval": 1}], 3, 1, id="k=1, S=3"),
        pytest.param([{"hessian_interval": 10}], 2, 2**63 + 5, id="k=10, S=2, 64-bit seed"),
        pytest.param([{"hessian_warmup": 4}], 1, 2, id="warm-up"),
        pytest.param([{"adaptive": True}], 1, 3, id="adaptive"),
        pytest.param([{"bias_correction": "update"}], 1, 4, id="update correction"),
        pytest.param([{"bias_correction": "update", "hessian_warmup": 5}], 3, 5, id="update correction, warm-up"),
        pytest.param([{"hessian_power": 1.0}], 3, 6, id="power 1"),
        pytest.param([{"hessian_power": 0.7}], 1, 7, id="power 0.7"),
        pytest.param([{"maximize": True, "adaptive": True}], 1, 8, id="maximize"),
        pytest.param([{"rho": 0.0, "weight_decay": 0.0}], 1, 9, id="no perturbation, no decay"),
        pytest.param(
            [
                {"lr": 0.02, "rho": 0.5, "hessian_interval": 2, "weight_decay": 0.3, "betas": (0.5, 0.8)},
                {"adaptive": True, "bias_correction": "update", "hessian_power": 1.0, "eps": 0.1},
                {"hessian_interval": 5, "hessian_warmup": 2, "maximize": True, "betas": (0.0, 0.0)},
            ],
            3,
            10,
            id="groups that differ in everything",
        ),
    ],
)
def test_twelve_steps_on_a_quadratic_match_the_closed_form(groups: list[dict], samples: int, seed: int) -> None:
    A, b, params, loss = quadratic(seed % 100)
    parts = [params] if len(groups) == 1 else [params[:1], params[1:2], params[2:]]
    opt = ReferenceSassha(
        [{"params": part, **group} for part, group in zip(parts, groups, strict=True)],
        hessian_samples=samples,
        seed=seed,
        **BASE,
    )
    hyper = [
        {**BASE, **group} for part, group in zip(parts, groups, strict=True) for p in part for _ in range(p.numel())
    ]
    w = torch.cat([memory_order(p.detach()) for p in params]).numpy().copy()
    simulation = numpy_steps(A.numpy(), b.numpy(), w, hyper, samples, seed)
    for _ in range(12):
        value = loss().item()
        assert opt.step(loss).item() == value
        w, m, D, t, exponent = next(simulation)
        states = [opt.state[p] for p in params]
        for name, tensors, expected in [
            ("w", params, w),
            ("m", [s["exp_avg"] for s in states], m),
            ("D", [s["exp_hessian"] for s in states], D),
        ]:
            actual = torch.cat([memory_order(tensor.detach()) for tensor in tensors]).numpy()
            scale = np.abs(expected).max()
            np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12 * scale, err_msg=f"{name}, step {t}")
        assert [s["step"] for s in states] == [t] * len(params)
        assert np.repeat([s["hessian_step"] for s in states], [p.numel() for p in params]).tolist() == exponent.tolist()


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


def test_norm_of_a_large_float32_gradient_is_as_exact_as_float64() -> None:
    w = torch.nn.Parameter(torch.zeros(3_000_001))
    w.grad = torch.full_like(w, 1.1).requires_grad_(False)
    opt = ReferenceSassha([w])
    opt.perturb()
    assert opt._grad_norm == pytest.approx(math.sqrt(w.numel()) * torch.tensor(1.1).item(), rel=1e-12)


def test_perturbing_twice_and_a_first_step_without_a_product_are_errors() -> None:
    w = parameter(1.0)
    opt = ReferenceSassha([w])
    w.grad = torch.ones_like(w).detach()
    with pytest.raises(ValueError, match="product"):
        opt.update()
    opt.perturb()
    with pytest.raises(ValueError, match="twice"):
        opt.perturb()
