"""Devices without float64, such as Apple's MPS: eager works there in float32, tested on a CPU that refuses float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sassha_fused import eager, layout
from tests.support.calls import HYPER, POWERS, arguments_of
from tests.support.cases import Spec, assert_rounded, each_narrow_dtype, make_case, many
from tests.support.checks import exact_norm
from tests.support.formulas import formula_perturb, formula_update
from tests.support.problems import STYLES, Problem, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)

# Measured: the corrections of the bias and lr, in one float32 each, are off by up to 2 ulp.
ULPS = 8
GENERAL_POWER_ULPS = 32


class NoFloat64(TorchDispatchMode):
    """Refuses every float64 tensor, as a device without it does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result


@pytest.fixture(autouse=True)
def device_without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "WITHOUT_FLOAT64", ("cpu",))
    yield


def narrow(arguments: dict[str, Any]) -> list[Any]:
    return [v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for v in arguments.values()]


def test_the_mode_refuses_float64() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.ones(3).double()
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hessian_samples": 2, "bias_correction": "update", "weight_decay": 0.1},
        {"adaptive": True, "hessian_power": 0.7, "maximize": True, "lr": 0.001},
        {"rho": 0.0, "bias_correction": "none", "hessian_power": 1.0, "eps": 0.1},
    ],
    ids=str,
)
def test_whole_steps_are_those_of_other_devices_up_to_rounding(
    style: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with NoFloat64():
        found = Problem("eager", **options)
        found.opt.param_groups[1]["lr"] = torch.tensor(0.03)
        found.train(5, style)
    assert found.opt.skipped_steps == 0
    monkeypatch.undo()
    expected = Problem("eager", **options).train(5, style)
    for one, two in zip(found.params, expected.params):
        states = [(found.opt.state[one][name], expected.opt.state[two][name]) for name in ("exp_avg", "exp_hessian")]
        for a, b in ((one, two), *states):
            # A few roundings of float32 in five steps; 3.3e-7 of the largest was measured.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.detach().abs().max()))
        assert int(found.opt.state[one]["step"]) == 5


def test_a_step_that_is_not_finite_is_skipped_there_too() -> None:
    with NoFloat64():
        problem = Problem("eager").train(2)
        before = [param.detach().clone() for param in problem.params]
        problem.inputs[2, 0, 0] = torch.nan
        problem.train(1)
        assert problem.opt.skipped_steps == 1
        assert all(torch.equal(*pair) for pair in zip(problem.params, before))


@each_narrow_dtype
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_norm_is_that_of_the_formula(dtype: torch.dtype, adaptive: bool, scale: float) -> None:
    if scale != 1 and dtype == torch.float16:
        scale = scale**0.1
    case = make_case(dtype, many(20))
    for g in case.grads:
        g.mul_(scale)
    params = case.params if adaptive else []
    with NoFloat64():
        norm = eager.grad_norm(case.grads, params, None, adaptive)
    expected = exact_norm(case.grads, params or None)
    assert norm.dtype == torch.float32 and float(norm) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_shows_what_is_not_finite(bad: float) -> None:
    with NoFloat64():
        assert not math.isfinite(eager.grad_norm([torch.ones(3), torch.tensor([1.0, bad])], [], None, False))
        assert eager.grad_norm([torch.zeros(3), torch.zeros(0)], [], None, False) == 0


@each_narrow_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_perturb_is_within_its_bound(dtype: torch.dtype, adaptive: bool) -> None:
    case = make_case(dtype, [*many(20), Spec((3, 4, 5, 5), "channels_last")])
    w, g = case.in_order(case.params), case.in_order(case.grads)
    arguments = narrow(arguments_of("perturb_", case, {**HYPER, "adaptive": adaptive}))
    with NoFloat64():
        eager.perturb_(*arguments)
    exact = formula_perturb(w, g, 3.0, 0.2, adaptive)
    assert_rounded(case.params, exact.w, exact.w_largest, ULPS)


@each_narrow_dtype
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("correction", ["step", "update", "none"])
@pytest.mark.parametrize("step", [0, 1, 5, 1000, 100_000])
def test_update_is_within_its_bound(dtype: torch.dtype, step: int, correction: str, power: float) -> None:
    case = make_case(dtype, [*many(20), Spec((3, 4, 5, 5), "channels_last")])
    case.steps.fill_(step)
    hyper = {**HYPER, "hessian_power": power, "bias_correction": correction}
    m, D, w = (torch.cat(case.parts(flat)).clone() for flat in (case.exp_avg, case.exp_hessian, case.backup))
    g, H = case.in_order(case.grads), case.in_order(case.products)
    arguments = narrow(arguments_of("update_", case, hyper))
    with NoFloat64():
        eager.update_(*arguments)
    named = {name: value for name, value in hyper.items() if name not in ("rho", "adaptive")}
    exact = formula_update(w, g, H, m, D, step, step, **named)
    assert_rounded(case.params, exact.w, exact.w_largest, ULPS if power in (0.5, 1.0) else GENERAL_POWER_ULPS)
    assert_rounded(case.parts(case.exp_avg), exact.m, exact.m_largest, ULPS)
    assert_rounded(case.parts(case.exp_hessian), exact.D, exact.D_largest, ULPS)
