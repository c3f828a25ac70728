"""What is not finite makes update_ skip the step on every backend: w comes back, and nothing else is written."""

import math

import torch

from tests.support.backends import each_backend_with
from tests.support.calls import HYPER, update
from tests.support.cases import BUT_FLOAT16, DTYPES, Spec, make_case, many
from tests.support.checks import check_skip
from tests.support.lists import listed_case, shorter

NOT_FINITE = (math.nan, math.inf, -math.inf)


@each_backend_with(few={"dtype": BUT_FLOAT16[1:]}, bad=NOT_FINITE, hessian=(False, True), guard=DTYPES, dtype=DTYPES)
def test_a_guard_that_is_not_finite_restores_the_weights_and_writes_nothing_else(
    backend: str, dtype: torch.dtype, guard: torch.dtype, bad: float, hessian: bool
) -> None:
    few = many(shorter(backend, 12, 3))
    case = make_case(dtype, [*few, Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6), "sliced"), Spec(())])
    check_skip(backend, case, torch.tensor(bad, dtype=guard), hessian=hessian)


@each_backend_with()
def test_any_one_of_several_guards_skips_the_step(backend: str) -> None:
    case = make_case(torch.float32, many(3))
    good = [torch.tensor(3.4e38), torch.tensor(-1e308, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float16)]
    good *= 2  # more than a CUDA launch takes
    for i in range(len(good) + 1):
        guards = [*good[:i], torch.tensor(math.nan), *good[i:]]
        check_skip(backend, case, *guards)
    assert update(backend, case, HYPER, True, good).skipped.tolist() == [0]


@each_backend_with(
    few={"bad": (math.nan, math.inf), "dtype": BUT_FLOAT16}, bad=NOT_FINITE, name=("grads", "products"), dtype=DTYPES
)
def test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards(
    backend: str, dtype: torch.dtype, name: str, bad: float
) -> None:
    long = Spec((shorter(backend, 40_000, 5_000),), shift=1)
    case = make_case(dtype, [long, *many(3), Spec((3, 4, 5, 5), "channels_last"), Spec(())])
    assert update(backend, case, HYPER, True, guard_grads=True).skipped.tolist() == [0]
    tensors = getattr(case, name)
    for i in (0, *shorter(backend, (1,), ()), len(tensors) - 1):
        ends = {0, tensors[i].numel() // 2, tensors[i].numel() - 1}
        for element in shorter(backend, ends, {max(ends)}):
            kept = tensors[i]
            tensors[i] = kept.clone(memory_format=torch.preserve_format)
            tensors[i].view(-1)[element] = bad
            check_skip(backend, case, guard_grads=True)
            tensors[i] = kept


@each_backend_with(few={"dtype": BUT_FLOAT16}, dtype=DTYPES)
def test_the_largest_finite_gradients_and_products_skip_no_step(backend: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [Spec((shorter(backend, 40_000, 5_000),), shift=1), *many(5)])
    # Of float64 half the exponent: the check sums squares.
    largest = 1e150 if dtype == torch.float64 else torch.finfo(dtype).max
    for gradient, product in zip(case.grads, case.products, strict=True):
        gradient.fill_(largest)
        product.fill_(-largest)
    # With products, which have the other sign, sums of the numbers themselves would be finite.
    for hessian in (False, True):
        assert update(backend, case, HYPER, hessian, guard_grads=True).skipped.tolist() == [0]


@each_backend_with(few={"dtype": BUT_FLOAT16}, specs=("every size", "every layout"), dtype=DTYPES)
def test_a_skipped_step_brings_back_every_size_and_layout(backend: str, dtype: torch.dtype, specs: str) -> None:
    check_skip(backend, listed_case(backend, dtype, specs), torch.tensor(math.inf))
