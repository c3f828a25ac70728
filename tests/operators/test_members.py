"""The modes of perturb_ and update_ that the other members of the family take, on every backend, element by element."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.backends import BASELINE, device_of, each_backend_with
from tests.support.calls import ADAHESSIAN, ADAM, MEMBERS, PLAIN, SOPHIA, run, update
from tests.support.cases import (
    AVERAGE_ULPS,
    BUT_FLOAT16,
    DTYPES,
    ULPS,
    UPDATE_ULPS,
    Case,
    Spec,
    assert_rounded,
    assert_same_bits,
    assert_untouched,
    make_case,
    many,
)
from tests.support.checks import check_update
from tests.support.formulas import formula_perturb, formula_plain
from tests.support.lists import listed_case
from tests.support.reference import memory_order

# What averages squares rounds once more.
SQUARE_ULPS = AVERAGE_ULPS + 1


@each_backend_with(
    few={"dtype": BUT_FLOAT16}, maximize=(False, True), power=(1.0, 0.7), hessian=(False, True), dtype=DTYPES
)
def test_adahessian_averages_the_squares_of_products(
    backend: str, dtype: torch.dtype, hessian: bool, power: float, maximize: bool
) -> None:
    hyper = {**ADAHESSIAN, "hessian_power": power, "maximize": maximize}
    formula = {**hyper, "hessian_power": power / 2, "second": "square"}
    check_update(backend, listed_case(backend, dtype, "every size"), hessian, hyper=hyper, formula=formula)


@each_backend_with(
    few={"dtype": BUT_FLOAT16}, maximize=(False, True), threshold=(0.0, 0.04, 30.0), hessian=(False, True), dtype=DTYPES
)
def test_sophia_clips_the_quotient_and_averages_products_with_their_signs(
    backend: str, dtype: torch.dtype, hessian: bool, threshold: float, maximize: bool
) -> None:
    hyper = {**SOPHIA, "clip_threshold": threshold, "maximize": maximize, "eps": 1e-3 if threshold else 1e-12}
    formula = {**hyper, "bias_correction": "none", "second": "signed"}
    case = listed_case(backend, dtype, "every size")
    # Of either sign, and such that some quotients are clipped and others not.
    case = replace(case, exp_hessian=case.exp_hessian * (1 - 2 * (torch.arange(len(case.exp_hessian)) % 3 == 0)))
    check_update(backend, case, hessian, hyper=hyper, formula=formula)


@each_backend_with(
    few={"power": (1.0,), "specs": ("every size",), "dtype": BUT_FLOAT16},
    power=(1.0, 2.0, 1.4),
    maximize=(False, True),
    backup=(False, True),
    specs=("every size", "many tensors"),
    dtype=DTYPES,
)
def test_adam_averages_the_squares_of_gradients_in_every_step(
    backend: str, dtype: torch.dtype, specs: str, backup: bool, maximize: bool, power: float
) -> None:
    # Its own power is 1, of the root; others are for whoever writes the settings by hand.
    hyper = {**ADAM, "maximize": maximize, "hessian_power": power}
    formula = {**hyper, "hessian_power": power / 2, "bias_correction": "step", "second": "gradient"}
    case = listed_case(backend, dtype, specs)
    check_update(backend, case, False, backup, hyper=hyper, formula=formula, second=True)


def plain(backend: str, before: Case, hyper: dict[str, Any], *, backup: bool) -> Case:
    return update(backend, before, hyper, False, backup=backup, exp_hessian=None)


@each_backend_with(
    few={"dtype": BUT_FLOAT16},
    kind=("", "nesterov", "dampening"),
    first=(False, True),
    maximize=(False, True),
    backup=(False, True),
    dtype=DTYPES,
)
def test_a_plain_direction_is_that_of_sgd(
    backend: str, dtype: torch.dtype, kind: str, first: bool, maximize: bool, backup: bool
) -> None:
    before = listed_case(backend, dtype, "every size")
    if first:
        before = replace(before, steps=torch.zeros_like(before.steps), exp_avg=before.exp_avg * 0)
    hyper = {**PLAIN, "maximize": maximize, "nesterov": kind == "nesterov", "dampening": 0.3 * (kind == "dampening")}
    after = plain(backend, before, hyper, backup=backup)
    w = torch.cat(before.parts(before.backup)) if backup else before.in_order(before.params)
    m, g = torch.cat(before.parts(before.exp_avg)), before.in_order(before.grads)
    t = before.per_element(before.steps[before.rows][:, 0])
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    exact = formula_plain(w, g, m, t, **{name: hyper[name] for name in names})  # type: ignore[arg-type]
    assert_rounded(after.params, exact.w, exact.w_largest, UPDATE_ULPS)
    assert_rounded(after.parts(after.exp_avg), exact.m, exact.m_largest, AVERAGE_ULPS)
    assert after.steps[before.rows][:, 0].tolist() == (before.steps[before.rows][:, 0] + 1).tolist()
    assert after.skipped.tolist() == [0]
    assert_untouched(after, before, except_for=("params", "exp_avg", "steps", "skipped"))


@each_backend_with(member=tuple(MEMBERS), guard_grads=(False, True), backup=(False, True))
def test_a_step_of_any_member_that_is_not_finite_leaves_no_trace(
    backend: str, member: str, guard_grads: bool, backup: bool
) -> None:
    hyper = MEMBERS[member]
    before = make_case(torch.float32, many(20))
    guards = [torch.tensor(1.0 if guard_grads else math.nan)]
    if guard_grads:
        before.grads[-1].view(-1)[-1] = math.inf
    more: dict[str, Any] = {"exp_hessian": None} if member == "plain" else {}
    after = update(backend, before, hyper, member in ("adahessian", "sophia"), guards, guard_grads, backup, **more)
    assert after.skipped.tolist() == [1]
    if backup:
        restored = torch.cat([memory_order(w) for w in after.params])
        assert_same_bits(restored, torch.cat(before.parts(before.backup)), "w after a skipped step")
    assert_untouched(after, before, except_for=("params", "skipped") if backup else ("skipped",))


# ---------------------------------------------------------------------------------------------------------------------
# Along exp_avg

MOMENTUM = {**PLAIN, "ascent": "momentum"}


def along_momentum(before: Case, backend: str, hyper: dict[str, Any], norm: float, *, backup: bool) -> Case:
    on = replace(before, grads=views_of_averages(before)).to(device_of(backend))
    scalar = torch.tensor(norm, dtype=torch.float64, device=device_of(backend))
    run(backend, "perturb_", on, hyper, norm=scalar, **({} if backup else {"backup": None}))
    return replace(on.to("cpu"), grads=before.grads)


def views_of_averages(case: Case) -> list[Tensor]:
    """exp_avg of every parameter, in its strides, in memory of its own."""
    parts = zip(case.params, case.parts(case.exp_avg), strict=True)
    return [torch.empty_like(param, dtype=values.dtype).copy_(from_order(values, param)) for param, values in parts]


def from_order(values: Tensor, param: Tensor) -> Tensor:
    """Values that run in the order of a parameter's memory, in its shape."""
    index = torch.arange(param.numel()).view(param.shape)
    placed = torch.empty_strided(param.shape, param.stride(), dtype=torch.int64).copy_(index)
    result = torch.empty(param.numel(), dtype=values.dtype)
    result[memory_order(placed)] = values
    return result.view(param.shape)


@each_backend_with(
    few={"dtype": BUT_FLOAT16},
    specs=("every size", "every layout", "many tensors"),
    maximize=(False, True),
    dtype=DTYPES,
)
def test_perturb_goes_along_exp_avg_the_other_way(backend: str, dtype: torch.dtype, specs: str, maximize: bool) -> None:
    before = listed_case(backend, dtype, specs)
    after = along_momentum(before, backend, {**MOMENTUM, "maximize": maximize}, 2.5, backup=True)
    w, m = before.in_order(before.params), torch.cat(before.parts(before.exp_avg))
    exact = formula_perturb(w, -m, 2.5, MOMENTUM["rho"])
    assert_rounded(after.params, exact.w, exact.w_largest, ULPS)
    assert_same_bits(torch.cat(after.parts(after.backup)), w, "backup")
    assert_untouched(after, replace(before, grads=after.grads), except_for=("params", "backup"))


@each_backend_with(adaptive=(False, True), dtype=DTYPES[:2])
def test_perturb_along_exp_avg_measures_its_norm_and_scales_with_the_weights(
    backend: str, dtype: torch.dtype, adaptive: bool
) -> None:
    before = listed_case(backend, dtype, "every size")
    m = torch.cat(before.parts(before.exp_avg)).double()
    w = before.in_order(before.params)
    on = replace(before, grads=views_of_averages(before)).to(device_of(backend))
    norm = torch.full((), math.nan, dtype=torch.float64, device=device_of(backend))
    run(backend, "perturb_", on, {**MOMENTUM, "adaptive": adaptive}, norm=norm, measure=True)
    expected = float((w.double().abs() * m if adaptive else m).norm())
    assert float(norm) == pytest.approx(expected, rel=1e-12)
    exact = formula_perturb(w, -m, expected, MOMENTUM["rho"], adaptive)
    assert_rounded(on.to("cpu").params, exact.w, exact.w_largest, ULPS)


@each_backend_with(skipped=(False, True), member=("plain", "adam"), dtype=DTYPES[:2])
def test_without_a_backup_w_is_worked_out_from_exp_avg(
    backend: str, dtype: torch.dtype, member: str, skipped: bool
) -> None:
    hyper = {**MEMBERS[member], "ascent": "momentum"}
    before = listed_case(backend, dtype, "every size")
    moved = along_momentum(before, backend, hyper, 2.5, backup=False)
    scale = torch.tensor(-hyper["rho"] / (2.5 + 1e-12), dtype=dtype)
    averages = views_of_averages(before)
    w = [p - scale * m for p, m in zip(moved.params, averages, strict=True)]
    guards = [torch.tensor(math.nan if skipped else 1.0)]
    more: dict[str, Any] = {"exp_hessian": None} if member == "plain" else {}
    norm = torch.tensor(2.5, dtype=torch.float64, device=device_of(backend))
    after = update(backend, moved, hyper, False, guards, backup=False, norm=norm, **more)
    if skipped:
        for found, expected in zip(after.params, w, strict=True):
            assert_same_bits(found, expected, "w of a step that was skipped")
        return
    # The same step from these weights.
    start = replace(moved, params=[p.clone() for p in w])
    expected_case = update(backend, start, hyper, False, guards, backup=False, **more)
    for name in ("params", "exp_avg", "exp_hessian", "steps"):
        for found, expected in zip(after.tensors()[name], expected_case.tensors()[name], strict=True):
            assert_same_bits(found, expected, name)


# Plain torch takes them all the same.
@each_backend_with(without=[BASELINE], dtype=DTYPES[2:])
def test_what_narrow_parameters_cannot_do_along_exp_avg_is_refused(backend: str, dtype: torch.dtype) -> None:
    before = make_case(dtype, [Spec((5,)), Spec((130,))])
    on = replace(before, grads=views_of_averages(before)).to(device_of(backend))
    norm = torch.tensor(2.5, dtype=torch.float64, device=device_of(backend))
    with pytest.raises((ValueError, RuntimeError)):
        run(backend, "perturb_", on, {**MOMENTUM, "adaptive": True}, norm=norm)
    on = replace(on, grads=[grad.to(device_of(backend)) for grad in before.grads])
    with pytest.raises((ValueError, RuntimeError)):
        run(backend, "perturb_", on, MOMENTUM, norm=norm)
    with pytest.raises((ValueError, RuntimeError)):
        run(backend, "update_", on, MOMENTUM, products=[], backup=None, norm=norm, exp_hessian=None)
    assert_untouched(on.to("cpu"), before)


@each_backend_with(bad=(math.nan, math.inf))
def test_an_average_whose_norm_is_not_finite_moves_no_weight(backend: str, bad: float) -> None:
    before = make_case(torch.float32, [Spec((5,)), Spec((130,))])
    before.exp_avg[before.offsets[1]] = bad
    after = along_momentum(before, backend, MOMENTUM, bad, backup=False)
    assert_untouched(after, replace(before, grads=after.grads))
    norm = torch.tensor(bad, dtype=torch.float64, device=device_of(backend))
    skipped = update(backend, before, MOMENTUM, False, [norm.cpu()], backup=False, norm=norm, exp_hessian=None)
    assert_untouched(skipped, before, except_for=("skipped",))
