"""Every operator of every backend where its usual formula does not hold: norms that are not finite."""

import math

import pytest
import torch

from tests.operators.test_operators import (
    listed_case,
)
from tests.support.backends import BACKENDS, each_backend, operators_of
from tests.support.cases import (
    Case,
    Spec,
    assert_same_bits,
    assert_untouched,
    each_dtype,
    make_case,
    many,
)
from tests.support.problems import single_threaded

one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)

each_bad = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
each_norm = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])


# ---------------------------------------------------------------------------------------------------------------------
# Perturbations by gradients whose norm is not finite


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


def check_standstill(backend: str, before: Case, norm: float, measure: bool, adaptive: bool = False) -> None:
    on = before.to(BACKENDS[backend])
    scalar = torch.tensor(norm, dtype=torch.float64, device=BACKENDS[backend])
    operators_of(backend).perturb_(on.params, on.grads, on.backup, on.offsets, scalar, measure, 0.2, adaptive, False)
    after = on.to("cpu")
    assert_untouched(after, before, but=("backup",))
    assert_same_bits(torch.cat(after.parts(after.backup)), before.in_order(before.params), "backup")
    assert not math.isfinite(float(scalar))


@each_backend
@each_dtype
@each_bad
@each_norm
def test_a_given_norm_that_is_not_finite_moves_no_weight(
    backend: str, dtype: torch.dtype, bad: float, adaptive: bool
) -> None:
    for specs in ("every size", "every layout"):
        case = listed_case(backend, dtype, specs)
        check_standstill(backend, with_negative_zeros(case), bad, False, adaptive)
        check_standstill(backend, spoilt(case, bad), bad, False, adaptive)


@each_backend
@each_dtype
@each_bad
@each_norm
def test_a_measured_norm_that_is_not_finite_moves_no_weight(
    backend: str, dtype: torch.dtype, bad: float, adaptive: bool
) -> None:
    for specs in ("every size", "every layout"):
        check_standstill(backend, spoilt(listed_case(backend, dtype, specs), bad), 1.0, True, adaptive)


@each_backend
@each_dtype
@each_norm
def test_one_bad_element_stops_every_tensor(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    case = with_negative_zeros(make_case(dtype, [*many(12), Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6))]))
    case.grads[-1][-1, -1] = math.inf
    check_standstill(backend, case, 1.0, True, adaptive)


@each_backend
def test_gradients_whose_norm_is_beyond_float64_move_no_weight(backend: str) -> None:
    case = with_negative_zeros(make_case(torch.float64, [Spec((5,)), Spec((3, 7), "sliced")]))
    for g in case.grads:
        g.fill_(1e200)
    check_standstill(backend, case, 1.0, True)
