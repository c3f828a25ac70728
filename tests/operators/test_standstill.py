"""perturb_ of every backend by gradients whose norm is not finite: the weights stay, to the sign of a zero."""

import math

import torch

from tests.support.backends import each_backend_with
from tests.support.cases import BUT_FLOAT16, DTYPES, Case, Spec, make_case, many
from tests.support.checks import check_standstill
from tests.support.lists import listed_case, shorter

NOT_FINITE = (math.nan, math.inf, -math.inf)
LISTS = ("every size", "every layout")


def with_negative_zeros(case: Case) -> Case:
    """A copy in which adding 0 to the first and the last weight of each tensor would show."""
    copy = case.to("cpu")
    for w in copy.params:
        if w.numel():
            w[(0,) * w.dim()] = w[(-1,) * w.dim()] = -0.0
    return copy


def spoilt(case: Case, bad: float) -> Case:
    """A copy in which the first and the last element of each gradient are bad ones, and the others finite."""
    copy = with_negative_zeros(case)
    for g in copy.grads:
        if g.numel():
            g[(0,) * g.dim()] = g[(-1,) * g.dim()] = bad
    return copy


@each_backend_with(few={"dtype": BUT_FLOAT16}, bad=NOT_FINITE, adaptive=(False, True), specs=LISTS, dtype=DTYPES)
def test_a_given_norm_that_is_not_finite_moves_no_weight(
    backend: str, dtype: torch.dtype, specs: str, bad: float, adaptive: bool
) -> None:
    case = listed_case(backend, dtype, specs)
    check_standstill(backend, with_negative_zeros(case), bad, False, adaptive)
    check_standstill(backend, spoilt(case, bad), bad, False, adaptive)


@each_backend_with(few={"dtype": BUT_FLOAT16}, bad=NOT_FINITE, adaptive=(False, True), specs=LISTS, dtype=DTYPES)
def test_a_measured_norm_that_is_not_finite_moves_no_weight(
    backend: str, dtype: torch.dtype, specs: str, bad: float, adaptive: bool
) -> None:
    check_standstill(backend, spoilt(listed_case(backend, dtype, specs), bad), 1.0, True, adaptive)


@each_backend_with(few={"dtype": BUT_FLOAT16}, adaptive=(False, True), dtype=DTYPES)
def test_one_bad_element_stops_every_tensor(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    few = many(shorter(backend, 12, 5))
    case = with_negative_zeros(make_case(dtype, [*few, Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6))]))
    case.grads[-1][-1, -1] = math.inf
    check_standstill(backend, case, 1.0, True, adaptive)


@each_backend_with()
def test_gradients_whose_norm_is_beyond_float64_move_no_weight(backend: str) -> None:
    case = with_negative_zeros(make_case(torch.float64, [Spec((5,)), Spec((3, 7), "sliced")]))
    for g in case.grads:
        g.fill_(1e200)
    check_standstill(backend, case, 1.0, True)
