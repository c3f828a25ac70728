"""grad_norm of every backend against a sum without rounding: sizes, strides, extremes, what is not finite."""

import math

import pytest
import torch

from tests.support.backends import each_backend_with
from tests.support.calls import norm_of
from tests.support.cases import DTYPES, LAYOUTS, Spec, make_case
from tests.support.checks import exact_norm
from tests.support.lists import LIST_NAMES, listed_case, shorter

# Of float64, in which the norm is summed.
FEW_ULP = 8 * 2**-53


@each_backend_with(adaptive=(False, True), specs=LIST_NAMES, dtype=DTYPES)
def test_norm_is_exact_to_a_few_ulp_of_float64(backend: str, dtype: torch.dtype, specs: str, adaptive: bool) -> None:
    case = listed_case(backend, dtype, specs)
    expected = exact_norm(case.grads, case.params if adaptive else None)
    assert norm_of(backend, case.grads, case.params, adaptive) == pytest.approx(expected, rel=FEW_ULP, abs=0)


@each_backend_with(values=((3.0, 4.0), (5.0,), (0.0, 0.0), ()), scale=(1.0, 2.0**125, 2.0**-149))
def test_norm_neither_overflows_nor_underflows_in_float32(
    backend: str, values: tuple[float, ...], scale: float
) -> None:
    # The squares of these lie beyond the range of float32, the smallest are its subnormal numbers.
    grads = [torch.tensor(values, dtype=torch.float64).mul(scale).float(), torch.zeros(3)]
    assert norm_of(backend, grads) == (scale * 5.0 if sum(values) else 0.0)


SIZES = (1, 15, 16, 17, 63, 64, 65, 129, 1025)


@each_backend_with(
    bad=(math.nan, math.inf, -math.inf), size=SIZES, adaptive=(False, True), dtype=DTYPES, few={"size": (1, 17, 1025)}
)
def test_one_element_that_is_not_finite_shows_in_the_norm(
    backend: str, dtype: torch.dtype, bad: float, size: int, adaptive: bool
) -> None:
    for at in {0, size // 3, size // 2, size - 1}:
        grads = [torch.ones(3, dtype=dtype), torch.ones(size, dtype=dtype), torch.ones((), dtype=dtype)]
        grads[1][at] = bad
        assert not math.isfinite(norm_of(backend, grads, [torch.zeros_like(g) for g in grads], adaptive))


@each_backend_with(dtype=DTYPES)
def test_norm_without_parameters_is_the_norm(backend: str, dtype: torch.dtype) -> None:
    case = listed_case(backend, dtype, "57 tensors")
    assert norm_of(backend, case.grads) == norm_of(backend, case.grads, case.params)


@each_backend_with(others=LAYOUTS, dtype=DTYPES)
def test_adaptive_norm_pairs_elements_of_different_strides(backend: str, dtype: torch.dtype, others: str) -> None:
    shapes = shorter(backend, [(6, 11), (4, 3, 5, 5)], [(4, 3, 5, 5)])
    case = make_case(dtype, [Spec(shape, layout, 1) for shape in shapes for layout in LAYOUTS], others=others)
    expected = math.sqrt(sum(exact_norm([g], [w]) ** 2 for g, w in zip(case.grads, case.params, strict=True)))
    assert norm_of(backend, case.grads, case.params, True) == pytest.approx(expected, rel=FEW_ULP, abs=0)
