"""Every operator of every backend where its usual formula does not hold: norms that are not finite; no corrections."""

import math

import pytest
import torch

from tests.operators.test_operators import (
    HYPER,
    SAME_BITS_LISTS,
    check_update,
    listed_case,
    update,
)
from tests.support.backends import BACKENDS, BASELINE, each_backend, each_other_backend, operators_of
from tests.support.cases import (
    Case,
    Spec,
    assert_same_bits,
    assert_same_case,
    assert_untouched,
    each_dtype,
    each_narrow_dtype,
    make_case,
    many,
)
from tests.support.problems import single_threaded

one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)

each_kind = pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
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


# ---------------------------------------------------------------------------------------------------------------------
# Updates without bias correction


@each_backend
@each_dtype
@each_kind
@pytest.mark.parametrize("hessian_power", [0.5, 1.0, 0.7])
@pytest.mark.parametrize("maximize", [False, True])
def test_an_uncorrected_update_is_the_formula(
    backend: str, dtype: torch.dtype, hessian: bool, hessian_power: float, maximize: bool
) -> None:
    modes = {"bias_correction": "none", "hessian_power": hessian_power, "maximize": maximize}
    check_update(backend, listed_case(backend, dtype, "every size"), hessian, **modes)
    check_update(backend, make_case(dtype, [*many(9), Spec((4, 3, 5, 5), "padded", 1)]), hessian, **modes)


@each_backend
@each_kind
@pytest.mark.parametrize("steps", [(0, 0), (9, 1), (3_000_000_000, 3_000_000_000)])
def test_uncorrected_counts_go_on_and_change_no_weight(backend: str, hessian: bool, steps: tuple[int, int]) -> None:
    case = make_case(torch.float64, [Spec((5,))])
    case.steps[case.rows[0]] = torch.tensor(steps)
    check_update(backend, case, hessian, bias_correction="none")


@each_backend
@each_dtype
def test_a_tensor_is_the_uncorrected_learning_rate(backend: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [*many(9), Spec(())])
    check_update(backend, case, True, lr_tensor=torch.tensor(0.033), lr=1e6, bias_correction="none")


@each_other_backend
@each_narrow_dtype
@each_kind
def test_backends_update_without_correction_to_the_same_bits(backend: str, dtype: torch.dtype, hessian: bool) -> None:
    for specs in SAME_BITS_LISTS:
        case = listed_case(backend, dtype, specs)
        hyper = {**HYPER, "bias_correction": "none"}
        assert_same_case(*(update(name, case, hyper, hessian) for name in (backend, BASELINE)))
