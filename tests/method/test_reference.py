"""The reference itself, held to facts that do not come from it: known answers, hand-worked numbers, closed forms."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.reference import (
    ReferenceSassha,
    formula_norm,
    formula_perturb,
    formula_update,
    from_memory_order,
    memory_order,
    philox4x32,
    signs,
    ulp,
)

NAN = float("nan")


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def snapshot(opt: ReferenceSassha) -> list[Any]:
    """Everything a step may change, copied."""
    weights = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    states = [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in opt.state[p].items()}
        for group in opt.param_groups
        for p in group["params"]
        if p in opt.state
    ]
    return [weights, states, opt.hessian_evaluations, opt.perturbed]


def assert_bitwise(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Random signs


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter: str, key: str, expected: str) -> None:
    words = philox4x32(tuple(int(c, 16) for c in counter.split()), tuple(int(k, 16) for k in key.split()))
    assert " ".join(f"{word:08x}" for word in words) == expected


def test_first_signs_are_the_bits_of_the_known_answer_from_the_lowest_up() -> None:
    s = signs(0, 128, seed=0, evaluation=0, sample=0).tolist()
    assert s[:8] == [1, -1, 1, -1, 1, -1, 1, 1]  # 0xd5 = 0b11010101, the low byte of word 0
    assert s[24:32] == [-1, 1, 1, -1, -1, 1, 1, -1]  # 0x66 = 0b01100110, its high byte
    assert s[32:40] == [1, -1, 1, 1, -1, -1, -1, 1]  # 0x8d = 0b10001101, the low byte of word 1
    assert s[64:72] == [-1, -1, 1, 1, -1, -1, 1, -1]  # 0x4c = 0b01001100, the low byte of word 2
    assert s[120:128] == [1, 1, -1, 1, 1, -1, -1, 1]  # 0x9b = 0b10011011, the high byte of word 3


@functools.cache
def words_of_block(b: int, seed: int, h: int, s: int) -> tuple[int, int, int, int]:
    return philox4x32((b % 2**32, b // 2**32, h, s), (seed % 2**32, seed // 2**32))


def sign_by_definition(i: int, seed: int, h: int, s: int) -> int:
    words = words_of_block(i // 128, seed, h, s)
    return 1 if words[(i % 128) // 32] >> (i % 32) & 1 else -1


@pytest.mark.parametrize(
    "start, count",
    [(0, 0), (0, 1), (0, 400), (31, 2), (127, 2), (128, 128), (100, 300), (2**39 - 200, 400), (2**60, 99)],
)
@pytest.mark.parametrize(
    "seed, evaluation, sample", [(0, 0, 0), (1, 2, 3), (2**32, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1)]
)
def test_signs_agree_with_their_definition_one_by_one(
    start: int, count: int, seed: int, evaluation: int, sample: int
) -> None:
    expected = [sign_by_definition(i, seed, evaluation, sample) for i in range(start, start + count)]
    actual = signs(start, count, seed, evaluation, sample)
    assert actual.dtype == torch.float64
    assert actual.tolist() == expected


def test_signs_are_balanced_and_independent_across_seed_evaluation_and_sample() -> None:
    n = 1_000_000
    runs = [signs(0, n, *which) for which in [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]]
    runs.append(torch.roll(runs[0], 1))
    correlations = torch.stack(runs) @ torch.stack(runs).T / n
    assert (correlations - torch.eye(len(runs))).abs().max() < 5 / math.sqrt(n)
    assert all(abs(run.mean()) < 5 / math.sqrt(n) for run in runs)


# ---------------------------------------------------------------------------------------------------------------------
# The order of elements

LAYOUTS: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "contiguous": (lambda: torch.arange(6.0).view(2, 3), [0, 1, 2, 3, 4, 5]),
    "transposed": (lambda: torch.arange(6.0).view(2, 3).t(), [0, 1, 2, 3, 4, 5]),
    "permuted": (lambda: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1), list(range(24))),
    "unit dimensions": (lambda: torch.arange(6.0).view(2, 1, 3, 1).transpose(0, 2), [0, 1, 2, 3, 4, 5]),
    "sliced": (lambda: torch.arange(12.0).view(3, 4)[:, 1:3], [1, 2, 5, 6, 9, 10]),
    "sliced and transposed": (lambda: torch.arange(12.0).view(3, 4)[:, 1:3].t(), [1, 5, 9, 2, 6, 10]),
    "offset": (lambda: torch.arange(7.0)[1:].view(2, 3).t(), [1, 2, 3, 4, 5, 6]),
    "expanded": (lambda: torch.arange(2.0).view(2, 1).expand(2, 3), [0, 0, 0, 1, 1, 1]),
    "scalar": (lambda: torch.tensor(7.0), [7]),
    "empty": (lambda: torch.empty(3, 0), []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_follows_dense_memory_and_else_rows(layout: str) -> None:
    make, expected = LAYOUTS[layout]
    t = make()
    flat = memory_order(t)
    assert flat.tolist() == expected
    assert_bitwise(from_memory_order(flat, t), t)


def test_memory_order_of_channels_last_is_that_of_its_storage() -> None:
    t = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert_bitwise(memory_order(t), t.permute(0, 2, 3, 1).reshape(-1))
    assert memory_order(t).data_ptr() == t.data_ptr()
    assert from_memory_order(torch.arange(120), t).stride() == t.stride()


@given(st.lists(st.integers(1, 4), max_size=5), st.randoms(use_true_random=False))
def test_memory_order_of_any_permutation_is_that_of_its_storage(shape: list[int], random: Any) -> None:
    order = random.sample(range(len(shape)), len(shape))
    t = torch.arange(math.prod(shape)).view(shape).permute(order)
    assert memory_order(t).tolist() == list(range(t.numel()))
    assert_bitwise(from_memory_order(torch.arange(t.numel()), t), t)


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
SHAPES = [(3,), (4, 2), (), (130,)]
SIZE = 142


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


def quadratic(seed: int = 0) -> tuple[Tensor, Tensor, list[torch.nn.Parameter], Callable[[], Tensor]]:
    """A, b, the parameters (the second one transposed in memory) and the loss w A w / 2 + b w."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, b = randn(SIZE, SIZE), randn(SIZE)
    A = (A + A.T) / 4 + 3 * torch.diag(randn(SIZE).abs() + 1)
    params = [torch.nn.Parameter(randn(4, 2).t() if shape == (4, 2) else randn(*shape)) for shape in SHAPES]

    def loss() -> Tensor:
        w = torch.cat([p.t().reshape(-1) if p.dim() == 2 else p.reshape(-1) for p in params])
        return 0.5 * w @ A @ w + b @ w

    return A, b, params, loss


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


# ---------------------------------------------------------------------------------------------------------------------
# Who takes part, and when


def test_only_parameters_with_gradients_in_both_passes_take_part() -> None:
    both, first, second, neither = (parameter(1.0, 2.0) for _ in range(4))
    params = [both, first, second, neither]
    opt = ReferenceSassha(params)
    used = iter([[both, first], [both, second]])
    opt.step(lambda: sum((p**2).sum() for p in next(used)))
    for p in (first, second, neither):
        assert_bitwise(p.detach(), torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert p not in opt.state
    assert opt.state[both]["step"] == 1
    assert opt.hessian_evaluations == 1


def test_counters_of_a_parameter_without_gradients_stand_still() -> None:
    always, sometimes = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([always, sometimes], hessian_interval=3)
    steps, hessian_steps, evaluations = [], [], []
    for step in range(8):
        before = snapshot(opt)
        with_both = step not in (1, 2, 3)
        opt.step(lambda with_both=with_both: (always**2).sum() + ((sometimes**2).sum() if with_both else 0))
        if not with_both:
            assert_bitwise([snapshot(opt)[part][1] for part in (0, 1)], [before[part][1] for part in (0, 1)])
        steps.append((opt.state[always]["step"], opt.state[sometimes]["step"]))
        hessian_steps.append((opt.state[always]["hessian_step"], opt.state[sometimes]["hessian_step"]))
        evaluations.append(opt.hessian_evaluations)
    assert steps == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 3), (7, 4), (8, 5)]
    assert hessian_steps == [(1, 1), (1, 1), (1, 1), (4, 1), (4, 1), (4, 1), (7, 4), (7, 4)]
    assert evaluations == [1, 1, 1, 2, 2, 2, 3, 3]


def test_a_late_parameter_starts_with_a_hessian_step_of_its_own() -> None:
    early, late = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([early, late], betas=(0.9, 0.5), hessian_interval=10)
    opt.step(lambda: early.square().sum())
    curvature = opt.state[early]["exp_hessian"].clone()
    opt.step(lambda: early.square().sum() + 3 * (early * late).sum() + 2 * late.square().sum())
    # Signs are drawn for due parameters only: the mixed derivative 3 does not enter.
    assert opt.state[late]["exp_hessian"].item() == 0.5 * 4
    assert_bitwise(opt.state[early]["exp_hessian"], curvature)
    assert (opt.state[early]["hessian_step"], opt.state[late]["hessian_step"]) == (1, 1)
    assert opt.hessian_evaluations == 2


def test_groups_may_be_added_at_any_time() -> None:
    a, b = parameter(1.0), parameter(2.0)
    opt = ReferenceSassha([a])
    opt.step(lambda: (a**2).sum() + (b**2).sum())
    opt.add_param_group({"params": [b], "hessian_interval": 2})
    for _ in range(3):
        opt.step(lambda: (a**2).sum() + (b**2).sum())
    assert (opt.state[a]["step"], opt.state[a]["hessian_step"]) == (4, 1)
    assert (opt.state[b]["step"], opt.state[b]["hessian_step"]) == (3, 3)


def test_a_repeated_parameter_counts_once() -> None:
    runs = []
    for copies in (1, 2):
        a, b = parameter(1.0, 2.0), parameter(3.0)
        if copies == 2:
            with pytest.warns(UserWarning, match="duplicate"):
                opt = ReferenceSassha([a, a, b], hessian_samples=3)
        else:
            opt = ReferenceSassha([a, b], hessian_samples=3)
        for _ in range(3):
            opt.step(lambda a=a, b=b: a.prod() * b.sum() + a.pow(3).sum())
        runs.append(snapshot(opt))
    assert_bitwise(*runs)


def test_a_frozen_parameter_is_untouched() -> None:
    a, b = parameter(1.0), parameter(2.0)
    opt = ReferenceSassha([a, b])
    opt.step(lambda: (a * b).sum())
    b.requires_grad_(False)
    before = snapshot(opt)
    opt.step(lambda: (a * b).sum())
    assert_bitwise([snapshot(opt)[part][1] for part in (0, 1)], [before[part][1] for part in (0, 1)])
    assert opt.state[a]["step"] == 2


def test_a_step_without_any_gradient_changes_nothing() -> None:
    w = parameter(1.0)
    opt = ReferenceSassha([w])
    before = snapshot(opt)
    assert opt.step(lambda: torch.tensor(3.0)) == 3
    assert_bitwise(snapshot(opt), before)
    assert opt.skipped_steps == 0


def test_a_parameter_that_enters_linearly_has_hessian_zero() -> None:
    curved, linear, alone = parameter(1.0), parameter(2.0), parameter(3.0)
    opt = ReferenceSassha([curved, linear], betas=(0.9, 0.5))
    opt.step(lambda: curved.square().sum() + 5 * linear.sum())
    assert opt.state[curved]["exp_hessian"].item() == 1
    assert opt.state[linear]["exp_hessian"].item() == 0
    assert (opt.state[linear]["step"], opt.state[linear]["hessian_step"]) == (1, 1)

    opt = ReferenceSassha([alone])
    opt.step(lambda: 5 * alone.sum())
    assert opt.state[alone]["exp_hessian"].item() == 0


def test_the_graph_is_built_on_hessian_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    grad = torch.autograd.grad

    def recording(*args: Any, create_graph: bool = False, **kwargs: Any) -> Any:
        built.append(create_graph)
        return grad(*args, create_graph=create_graph, **kwargs)

    w, unused = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([w, unused], hessian_interval=3, hessian_warmup=2)
    monkeypatch.setattr(torch.autograd, "grad", recording)
    for due in [True, True, False, True, False]:
        built.clear()
        opt.step(lambda: (w**2).sum())
        assert built == ([False, True, False] if due else [False, False])
        assert not w.grad.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Steps that go wrong


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


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sixteen_bit_parameters_are_computed_in_float32_and_rounded(dtype: torch.dtype, adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(257, generator=generator).to(dtype)
    low, high = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    options = {"hessian_interval": 2, "weight_decay": 0.1, "adaptive": adaptive, "maximize": True}
    opts = [ReferenceSassha([p], **options) for p in (low, high)]
    for step in range(4):
        passes = torch.randn(3, 257, generator=generator).to(dtype)
        for opt, p in zip(opts, (low, high), strict=True):
            p.grad = passes[0].to(p.dtype)
            opt.perturb()
        assert_bitwise(low.detach(), high.detach().to(dtype))
        for opt, p in zip(opts, (low, high), strict=True):
            p.grad = passes[1].to(p.dtype)
            opt.update([passes[2].to(p.dtype)] if step % 2 == 0 else None)
        assert_bitwise(low.detach(), high.detach().to(dtype))
        high.data.copy_(low.detach())
        for name in ("exp_avg", "exp_hessian"):
            assert opts[0].state[low][name].dtype == torch.float32
            assert_bitwise(opts[0].state[low][name], opts[1].state[high][name])


HYPER = {
    "lr": st.floats(1e-4, 1),
    "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.999])),
    "eps": st.floats(1e-8, 1),
    "weight_decay": st.floats(0, 1),
    "hessian_power": st.sampled_from([0.5, 1.0, 0.7]),
    "bias_correction": st.sampled_from(["step", "update"]),
    "maximize": st.booleans(),
}


@given(
    hyper=st.fixed_dictionaries(HYPER),
    rho=st.floats(0, 2),
    adaptive=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_formulas_and_optimizer_agree_from_the_same_state(
    hyper: dict, rho: float, adaptive: bool, dtype: torch.dtype, seed: int
) -> None:
    def agree(actual: Tensor, expected: Tensor, largest: Tensor, ulps: float) -> None:
        assert ((actual.double() - expected.to(dtype)).abs() <= ulps * ulp(largest, dtype)).all()

    generator = torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(200, generator=generator, dtype=dtype))
    opt = ReferenceSassha([w], rho=rho, adaptive=adaptive, hessian_interval=2, **hyper)
    m, D, t, e = torch.zeros(200), torch.zeros(200), 0, 0
    for step in range(4):
        before = w.detach().clone()
        first, second, H = torch.randn(3, 200, generator=generator, dtype=dtype)
        w.grad = first
        norm = formula_norm([first], [before] if adaptive else None)
        opt.perturb()
        moved = formula_perturb(before, first, norm, rho, adaptive, hyper["maximize"])
        agree(w.detach(), moved.w, moved.w_largest, 4)
        w.grad = second
        opt.update([H] if step % 2 == 0 else None)
        expected = formula_update(before, second, H if step % 2 == 0 else None, m, D, t, e, **hyper)
        state = opt.state[w]
        agree(state["exp_avg"], expected.m, expected.m_largest, 4)
        agree(state["exp_hessian"], expected.D, expected.D_largest, 4)
        agree(w.detach(), expected.w, expected.w_largest, 8)
        assert (state["step"], state["hessian_step"]) == (expected.t, expected.e)
        m, D, t, e = state["exp_avg"].clone(), state["exp_hessian"].clone(), state["step"], state["hessian_step"]


def test_largest_terms_are_those_of_the_sums_before_cancellation() -> None:
    w, g, H, m, D = (torch.tensor([value]) for value in (0.5, 4.0, -8.0, -4.0, 16.0))
    moved = formula_perturb(w, g, norm=4.0, rho=1.0)
    assert (moved.w.item(), moved.w_largest.item()) == (pytest.approx(1.5), pytest.approx(1.0))
    options = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.5, "hessian_power": 1.0}
    new = formula_update(w, g, H, m, D, 0, 0, **options)
    assert (new.m.item(), new.m_largest.item()) == (0, 2)
    assert (new.D.item(), new.D_largest.item()) == (12, 8)
    # c = 1 / 0.5 / (12 / 0.5) = 1 / 12, so that the terms are 0.25, 2 / 12 and -2 / 12.
    assert (new.w.item(), new.w_largest.item()) == (0.25, 0.25)
    new = formula_update(w / 100, g, H, m, D, 0, 0, **options)
    assert (new.w.item(), new.w_largest.item()) == (pytest.approx(0.0025), pytest.approx(2 / 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ulp_is_the_spacing_of_numpy(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1e-44, 1e-38, 0.3, 1, 1.5, 2, -3, 1e10], dtype=dtype)
    assert ulp(x, dtype).tolist() == np.abs(np.spacing(x.numpy())).astype(np.float64).tolist()


def test_ulp_of_sixteen_bit_types() -> None:
    one = torch.tensor([1.0, 0.99, 256.0])
    assert ulp(one, torch.bfloat16).tolist() == [2**-7, 2**-8, 2]
    assert ulp(one, torch.float16).tolist() == [2**-10, 2**-11, 0.25]
