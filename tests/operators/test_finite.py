"""The CPU's look at gradients and products: no element that is not finite escapes it, and it refuses no other."""

import math

import pytest
import torch

from tests.support.calls import HYPER, run_update
from tests.support.cases import Case, Spec, each_dtype, make_case

BACKEND = "cpu"
BAD = (math.inf, -math.inf, math.nan, -math.nan)
SHORT = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 67, 130)
LONG = 150_001  # ten blocks, the last one short


def skipped(case: Case, hessian: bool = False) -> bool:
    run_update(BACKEND, case, HYPER, hessian, guard_grads=True)
    return bool(case.skipped)


def case_of(dtype: torch.dtype, *lengths: int) -> Case:
    return make_case(dtype, [Spec((length,), shift=1) for length in lengths])


def largest(dtype: torch.dtype) -> float:
    """Of float64, one of which the squares of any list here have a finite sum."""
    return 2.0**500 if dtype == torch.float64 else torch.finfo(dtype).max


@each_dtype
@pytest.mark.parametrize("length", SHORT)
def test_every_position_of_a_short_tensor_is_looked_at(dtype: torch.dtype, length: int) -> None:
    case = case_of(dtype, length)
    assert not skipped(case)
    for position in range(length):
        for bad in BAD:
            kept = case.grads[0][position].clone()
            case.grads[0][position] = bad
            assert skipped(case), (position, bad)
            case.grads[0][position] = kept
    assert not skipped(case)


@each_dtype
@pytest.mark.parametrize("name", ["grads", "products"])
def test_random_positions_of_long_tensors_are_looked_at(dtype: torch.dtype, name: str) -> None:
    case = case_of(dtype, 3, LONG, 77)
    generator = torch.Generator().manual_seed(0)
    ends = [(1, 0), (1, LONG - 1), (0, 0), (2, 76)]
    for tensor, position in ends + [(1, int(i)) for i in torch.randint(LONG, (40,), generator=generator)]:
        values = getattr(case, name)[tensor]
        kept = values[position].clone()
        values[position] = BAD[position % len(BAD)]
        assert skipped(case, hessian=True), (tensor, position)
        values[position] = kept
    assert not skipped(case, hessian=True)


@each_dtype
def test_the_largest_and_the_smallest_numbers_pass(dtype: torch.dtype) -> None:
    case = case_of(dtype, LONG, 5)
    tiny = torch.finfo(dtype).smallest_normal
    passing = [largest(dtype), 1.0, tiny, tiny / 4, 0.0]
    values = torch.tensor([sign * value for value in passing for sign in (1, -1)], dtype=torch.float64)
    for gradient in case.grads:
        gradient.copy_(values.repeat(LONG)[: len(gradient)])
    assert float(case.grads[0][6]) > 0, "no subnormal number"
    assert not skipped(case)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_float64_whose_square_overflows_is_refused(sign: int) -> None:
    case = case_of(torch.float64, 57, LONG)
    for position in (0, 1, 40_000, LONG - 1):
        case.grads[1][position] = sign * 2.0**512
        assert skipped(case)
        case.grads[1][position] = sign * largest(torch.float64)
        assert not skipped(case)
