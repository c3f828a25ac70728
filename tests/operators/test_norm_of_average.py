"""The norm of exp_avg that update_ leaves for the next perturbation, in each way that it is summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.operators.test_members import views_of_averages
from tests.operators.test_norm_range import RANGES, TOLERANCES, exact_sum_of_squares, exponents_of, random_numbers
from tests.support import emulation
from tests.support.backends import BASELINE, device_of, each_backend, each_backend_with, marks_of, operators_of
from tests.support.calls import ADAM, HYPER, PLAIN, SOPHIA, run_update, update
from tests.support.cases import (
    DTYPES,
    Case,
    Spec,
    assert_same_bits,
    assert_same_case,
    compute_dtype,
    each_dtype,
    make_case,
    many,
)
from tests.support.lists import listed_case
from tests.support.ways import each_way_with, summed

# By name: hyperparameters, and what else a step without products is given.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "root": (HYPER, {}),
    "identity": ({**HYPER, "hessian_power": 1.0}, {}),
    "power": ({**HYPER, "hessian_power": 0.7}, {}),
    "squares of gradients": (ADAM, {}),
    "plain": (PLAIN, {"exp_hessian": None}),
}
UNKNOWN = 7.0


def step_with_norm(backend: str, quick: bool, case: Case, hyper: dict[str, Any], **more: Any) -> tuple[Case, float]:
    """What a step leaves behind, and the norm."""
    norm = torch.tensor(UNKNOWN, dtype=torch.float64, device=device_of(backend))
    with summed(backend, quick):
        after = update(backend, case, hyper, False, **more, exp_avg_norm=norm)
    return after, float(norm)


def assert_norm(norm: float, averages: Sequence[Tensor], quick: bool) -> None:
    expected = math.sqrt(exact_sum_of_squares(averages, None))
    assert norm == pytest.approx(expected, rel=TOLERANCES[quick], abs=0)


@each_backend_with(step=list(STEPS), dtype=DTYPES[:3])
def test_a_step_leaves_the_norm_of_the_new_average_and_all_else_as_without(
    backend: str, dtype: torch.dtype, step: str
) -> None:
    hyper, more = STEPS[step]
    case = listed_case(backend, dtype, "every layout")
    after, norm = step_with_norm(backend, True, case, hyper, **more)
    assert_same_case(after, update(backend, case, hyper, False, **more))
    assert_norm(norm, after.parts(after.exp_avg), quick=True)


@each_way_with(
    numbers=["all", "largest", "around the smallest sum in float32", "small"], dtype=[torch.float64, torch.float32]
)
def test_the_norm_is_exact_over_the_range_of_every_average(
    backend: str, quick: bool, dtype: torch.dtype, numbers: str
) -> None:
    case = listed_case(backend, dtype, "every size")
    state = compute_dtype(dtype)
    exponents = exponents_of(backend, state, RANGES[numbers])
    averages = random_numbers(len(case.exp_avg), exponents, torch.Generator().manual_seed(1)).to(state)
    case = replace(case, exp_avg=averages, grads=[torch.zeros_like(grad) for grad in case.grads])
    hyper = {**PLAIN, "weight_decay": 0.0, "momentum": 1.0}
    after, norm = step_with_norm(backend, quick, case, hyper, exp_hessian=None)
    assert_norm(norm, after.parts(after.exp_avg), quick)


@each_backend
def test_of_no_gradient_and_no_average_the_norm_is_zero(backend: str) -> None:
    case = listed_case(backend, torch.float32, "every size")
    nothing = replace(case, exp_avg=torch.zeros_like(case.exp_avg), grads=[torch.zeros_like(g) for g in case.grads])
    for quick in (True, False):
        assert step_with_norm(backend, quick, nothing, HYPER)[1] == 0


@each_backend
def test_a_step_that_is_skipped_leaves_the_norm_as_it_was(backend: str) -> None:
    case = listed_case(backend, torch.float32, "every size")
    after, norm = step_with_norm(backend, True, case, HYPER, guards=[torch.tensor(math.inf)])
    assert norm == UNKNOWN
    assert_same_bits(after.exp_avg, case.exp_avg, "exp_avg")


@each_backend
def test_the_norm_is_of_the_parameters_of_the_list_alone(backend: str) -> None:
    case = listed_case(backend, torch.float32, "every size")
    after, norm = step_with_norm(backend, True, case.only(2), HYPER)
    assert norm == pytest.approx(float(after.parts(after.exp_avg)[0].double().norm()), rel=1e-14)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@each_dtype
def test_the_norm_has_the_bits_of_one_that_is_measured(backend: str, dtype: torch.dtype) -> None:
    for specs in ("every layout", "a long one"):
        case = listed_case(backend, dtype, specs)
        for hyper, more in STEPS.values():
            after, norm = step_with_norm(backend, True, case, hyper, **more)
            measured = operators_of(backend).grad_norm(views_of_averages(after), [], None, False)
            assert norm == float(measured)


@pytest.mark.parametrize("backend", [pytest.param(emulation.BACKEND, marks=marks_of(emulation.BACKEND))])
def test_the_sums_of_several_tables_come_together(backend: str) -> None:
    # Of tables of 1,300 tensors the last has fewer blocks than the others.
    case = make_case(torch.float32, many(2_700))
    after, norm = step_with_norm(backend, False, case, HYPER)
    assert_norm(norm, after.parts(after.exp_avg), quick=False)


@each_backend
def test_the_norm_may_be_that_which_w_is_worked_out_with(backend: str) -> None:
    case = listed_case(backend, torch.float32, "every size")
    hyper = {**PLAIN, "ascent": "momentum"}
    results = []
    for together in (False, True):
        norms = [torch.tensor(2.5, dtype=torch.float64, device=device_of(backend)) for _ in range(2)]
        on = case.to(device_of(backend))
        own, of_next = norms[0], norms[0 if together else 1]
        more: dict[str, Any] = {"norm": own, "exp_avg_norm": of_next, "exp_hessian": None}
        run_update(backend, on, hyper, False, [own], backup=False, **more)
        results.append((on.to("cpu"), float(of_next)))
    assert_same_case(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


NORM = torch.tensor(UNKNOWN, dtype=torch.float64)
# Hyperparameters, whether there are products, and the norm.
REFUSED: dict[str, tuple[dict[str, Any], bool, Tensor]] = {
    "products": (HYPER, True, NORM),
    "clipped": (SOPHIA, False, NORM),
    "another power of squares": ({**ADAM, "hessian_power": 2.0}, False, NORM),
    "float32": (HYPER, False, NORM.float()),
    "two elements": (HYPER, False, NORM.expand(2).clone()),
}


# Plain torch takes them all the same.
@each_backend_with(without=[BASELINE], what=list(REFUSED))
def test_a_norm_that_goes_with_no_step_is_refused(backend: str, what: str) -> None:
    hyper, hessian, norm = REFUSED[what]
    case = make_case(torch.float32, [Spec((5,)), Spec((130,))])
    on, given = case.to(device_of(backend)), norm.to(device_of(backend))
    with pytest.raises((ValueError, RuntimeError), match="exp_avg_norm"):
        run_update(backend, on, hyper, hessian, exp_avg_norm=given)
    assert_same_case(on.to("cpu"), case)
    assert_same_bits(given.cpu(), norm, "exp_avg_norm")
