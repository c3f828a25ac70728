"""The reference's precision: 16-bit parameters, the formulas of one step, units of the last place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.formulas import formula_norm, formula_perturb, formula_update, ulp
from tests.support.quadratic import assert_bitwise
from tests.support.reference import ReferenceSassha


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
    "bias_correction": st.sampled_from(["step", "update", "none"]),
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


def test_formulas_move_nothing_where_the_norm_is_not_finite() -> None:
    w, g = torch.tensor([1.0, -0.0]), torch.tensor([float("nan"), 1.0])
    for norm in (float("inf"), float("nan")):
        assert_bitwise(formula_perturb(w, g, norm, rho=0.5), (w.double(), w.double().abs()))


def test_formulas_without_bias_correction_divide_by_neither_factor() -> None:
    w, g, H, m, D = (torch.tensor([value]) for value in (1.0, 4.0, -8.0, 2.0, 16.0))
    options = {"lr": 1.0, "betas": (0.5, 0.75), "eps": 1.0, "weight_decay": 0.0, "hessian_power": 0.5}
    new = formula_update(w, g, H, m, D, 6, 2, **options, bias_correction="none")
    assert (new.m.item(), new.D.item(), new.t, new.e) == (3, 14, 7, 3)
    assert new.w.item() == pytest.approx(1 - 3 / (14**0.5 + 1), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ulp_is_the_spacing_of_numpy(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1e-44, 1e-38, 0.3, 1, 1.5, 2, -3, 1e10], dtype=dtype)
    assert ulp(x, dtype).tolist() == np.abs(np.spacing(x.numpy())).astype(np.float64).tolist()


def test_ulp_of_sixteen_bit_types() -> None:
    one = torch.tensor([1.0, 0.99, 256.0])
    assert ulp(one, torch.bfloat16).tolist() == [2**-7, 2**-8, 2]
    assert ulp(one, torch.float16).tolist() == [2**-10, 2**-11, 0.25]
