"""perturb_ of every backend against its formula, element by element: sizes, alignments, strides, modes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.backends import device_of, each_backend_with, each_quick_backend, each_slow_backend
from tests.support.calls import HYPER, run, run_measured_perturb
from tests.support.cases import BUT_FLOAT16, DTYPES, LAYOUTS, Spec, assert_same_bits, assert_same_case, make_case
from tests.support.checks import check_perturb
from tests.support.lists import LIST_NAMES, listed_case
from tests.support.strategies import ANY_CASE, few_examples


@each_backend_with(specs=LIST_NAMES, dtype=DTYPES)
def test_perturb_moves_every_element_by_the_formula_and_nothing_else(
    backend: str, dtype: torch.dtype, specs: str
) -> None:
    check_perturb(backend, listed_case(backend, dtype, specs), 7.3)


@each_backend_with(few={"dtype": BUT_FLOAT16}, adaptive=(False, True), maximize=(False, True), dtype=DTYPES)
def test_perturb_is_the_formula_in_every_mode(backend: str, dtype: torch.dtype, adaptive: bool, maximize: bool) -> None:
    check_perturb(backend, listed_case(backend, dtype, "every size"), 0.37, 0.05, adaptive, maximize)
    check_perturb(backend, listed_case(backend, dtype, "every layout"), 1e3, 3.0, adaptive, maximize)


@each_backend_with(few={"dtype": BUT_FLOAT16}, adaptive=(False, True), dtype=DTYPES)
def test_perturb_measures_the_norm_that_grad_norm_does(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    for specs in ("every size", "every layout"):
        before = listed_case(backend, dtype, specs)
        given, measured = before.to(device_of(backend)), before.to(device_of(backend))
        own = run_measured_perturb(backend, measured, adaptive)
        norm = run(backend, "grad_norm", given, params=given.params if adaptive else [], adaptive=adaptive)
        if backend == "triton_ptx":
            # Triton lays partial sums out as suits a kernel, and so may sum them in another order in each.
            assert float(own) == pytest.approx(float(norm), rel=2 * 2**-52, abs=0)
        else:
            assert_same_bits(own, norm, "norm")
        run(backend, "perturb_", given, {**HYPER, "adaptive": adaptive}, norm=own)
        assert_same_case(measured, given)


@each_backend_with(few={"dtype": BUT_FLOAT16}, adaptive=(False, True), dtype=DTYPES)
def test_every_parameter_has_its_own_rho(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    specs = [Spec((n,)) for n in (1, 130, 0, 64, 700, 3)]
    rho = torch.tensor([0.2, 0.0, 1.0, 3.0, 0.05, 0.5], dtype=torch.float64)
    check_perturb(backend, make_case(dtype, specs), 7.3, rho, adaptive)


@each_backend_with(norm=(0.0, 1e-13))
def test_the_perturbation_of_a_vanishing_gradient_is_that_of_the_formula(backend: str, norm: float) -> None:
    case = make_case(torch.float64, [Spec((5,))])
    for g in case.grads:
        g.mul_(norm)
    check_perturb(backend, case, norm)


@each_backend_with(layout=LAYOUTS, others=LAYOUTS, dtype=DTYPES)
def test_gradients_may_have_other_strides_than_their_parameter(
    backend: str, dtype: torch.dtype, layout: str, others: str
) -> None:
    specs = [Spec(shape, layout, 1) for shape in [(), (3, 1, 4), (6, 11), (4, 3, 5, 5), (33, 40)]]
    check_perturb(backend, make_case(dtype, specs, others=others), 2.0)


ANY: dict[str, Any] = {
    **ANY_CASE,
    "norm": st.floats(1e-3, 1e3),
    "rho": st.floats(0, 10),
    "adaptive": st.booleans(),
    "maximize": st.booleans(),
}


def check_any(backend: str, dtype: torch.dtype, specs: list[Spec], others: str, seed: int, **scalars: Any) -> None:
    check_perturb(backend, make_case(dtype, specs, others=others, seed=seed), **scalars)


@each_quick_backend
@given(**ANY)
def test_perturb_is_the_formula_for_any_shapes_and_scalars(backend: str, **drawn: Any) -> None:
    check_any(backend, **drawn)


@each_slow_backend
@few_examples
@given(**ANY)
def test_perturb_is_the_formula_for_some_shapes_and_scalars(backend: str, **drawn: Any) -> None:
    check_any(backend, **drawn)
