"""grad_norm over the whole range of numbers and in each way that it is summed, against a sum in exact arithmetic."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support import emulation
from tests.support.backends import INTERPRETED, marks_of
from tests.support.calls import norm_of
from tests.support.cases import DTYPES, place
from tests.support.lists import shorter
from tests.support.ways import each_way, each_way_with, summed

# Of a sum that takes squares in float64, each of which rounds it, and of one of 59 digits for each thread: relative.
TOLERANCES = {True: 16 * 2**-53, False: 4 * 2**-53}

# Binary exponents. Beyond 64 squares overflow in float32, below -75 they are 0, below -32 they lose digits.
RANGES = {
    "all": (-149, 127),
    "ordinary": (-30, 30),
    "the same": (0, 0),
    "largest": (120, 127),
    "around the largest that has a square": (60, 66),
    "around the smallest sum in float32": (-36, -28),
    "small": (-80, -60),
    "subnormal": (-149, -127),
}
# What the dtypes have of these, subnormal numbers among them.
EXPONENTS = {
    torch.float64: (-149, 127),
    torch.float32: (-149, 127),
    torch.bfloat16: (-133, 127),
    torch.float16: (-24, 15),
}


def exponents_of(backend: str, dtype: torch.dtype, exponents: tuple[int, int]) -> tuple[int, int]:
    """Those of a range that a dtype has."""
    least, most = EXPONENTS[dtype]
    if backend in INTERPRETED and dtype == torch.bfloat16:
        least = -126  # Triton's interpreter makes other numbers of subnormal ones.
    low, high = (min(max(edge, least), most) for edge in exponents)
    return low, high


def random_numbers(size: int, exponents: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Of either sign and random exponents, in float64; an eighth of them is 0."""
    least, most = exponents
    exponent = torch.randint(least, most + 1, (size,), generator=generator)
    # Rounded, a number must not have the next exponent, which may be that of infinity.
    digits = 1 + torch.rand(size, dtype=torch.float64, generator=generator).mul(0.99)
    sign = torch.randint(-4, 4, (size,), generator=generator).sign()
    return torch.ldexp(digits, exponent) * sign


def exact_sum_of_squares(grads: Sequence[Tensor], weights: Sequence[Tensor] | None) -> float:
    """Rounded once, for numbers narrower than float64: a product of two of them has 48 digits at most."""
    pairs = zip(grads, weights or grads, strict=True)
    terms = torch.cat([g.double() if weights is None else g.double() * w.double() for g, w in pairs])
    # In two parts of 24 digits, the square is a sum of three exact products.
    high = terms.view(torch.int64).bitwise_and(~((1 << 29) - 1)).view(torch.float64)
    low = terms - high
    return math.fsum(torch.cat([high * high, 2 * high * low, low * low]).tolist())


@each_way_with(numbers=list(RANGES), adaptive=[False, True], dtype=DTYPES)
def test_norm_is_exact_over_the_range_of_every_dtype(
    backend: str, quick: bool, numbers: str, adaptive: bool, dtype: torch.dtype
) -> None:
    exponents = RANGES[numbers]
    generator = torch.Generator().manual_seed(1)
    sizes = shorter(backend, (1, 2, 15, 129, 1025, 20_003), (1, 7, 129, 1025))
    for opposite in (False, True) if adaptive else (False,):
        # Products of numbers of opposite exponents are ordinary.
        of_weights = (-exponents[1], -exponents[0]) if opposite else exponents
        grads, weights = (
            [place(random_numbers(size, of, generator), dtype, shift=i % 3) for i, size in enumerate(sizes)]
            for of in (exponents_of(backend, dtype, which) for which in (exponents, of_weights))
        )
        with summed(backend, quick):
            found = norm_of(backend, grads, weights, adaptive)
            first = shorter(backend, 3, 1)
            alone = [norm_of(backend, [g], [w], adaptive) for g, w in zip(grads[:first], weights[:first], strict=True)]
        exact = exact_sum_of_squares(grads, weights if adaptive else None)
        assert found == pytest.approx(math.sqrt(exact), rel=TOLERANCES[quick], abs=0)
        for norm, g, w in zip(alone, grads, weights, strict=False):
            expected = math.sqrt(exact_sum_of_squares([g], [w] if adaptive else None))
            assert norm == pytest.approx(expected, rel=TOLERANCES[quick], abs=0)


@each_way
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_among_numbers_of_every_size(backend: str, quick: bool, bad: float) -> None:
    for dtype in shorter(backend, DTYPES, DTYPES[1:3]):
        largest = float(torch.finfo(dtype).max)
        for others in shorter(backend, (0.0, 1e-6, 1.0, largest), (0.0, largest)):
            for adaptive in (False, True):
                grads = [torch.full((size,), others, dtype=dtype) for size in (1, 133, 5)]
                grads[1][77] = bad
                with summed(backend, quick):
                    assert not math.isfinite(norm_of(backend, grads, [torch.ones_like(g) for g in grads], adaptive))


@each_way
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_show_where_gradients_are_0(backend: str, quick: bool, bad: float) -> None:
    weights = [torch.ones(133)]
    weights[0][77] = bad
    with summed(backend, quick):
        assert not math.isfinite(norm_of(backend, [torch.zeros(133)], weights, True))


@pytest.mark.parametrize("backend", [pytest.param(emulation.BACKEND, marks=marks_of(emulation.BACKEND))])
def test_norm_of_many_equal_numbers_is_exact(backend: str) -> None:
    # Of each the same is lost, in one direction: by the two thousandth that shows, if nothing makes up for it.
    grads = [torch.full((256 * 4096,), 1.16269636)]
    with emulation.device(1, 1):
        found = norm_of(backend, grads)
    assert found == pytest.approx(math.sqrt(exact_sum_of_squares(grads, None)), rel=TOLERANCES[False], abs=0)


@pytest.mark.skipif("triton" not in INTERPRETED, reason="Triton is not interpreted here")
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.slow)])
def test_norm_is_exact_where_each_place_of_a_tile_takes_many_squares(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One program with small tiles, of which 40 make two sums of 16 and a rest.
    monkeypatch.setattr("sassha_fused.triton_kernels.launch._INTERPRETED_UNITS", 1)
    monkeypatch.setattr("sassha_fused.triton_kernels.launch._INTERPRETED_PROGRAMS", 1)
    grads = [random_numbers(128 * 40, (-3, 0), torch.Generator().manual_seed(1)).float()]
    with summed(backend, quick=False):
        found = norm_of(backend, grads)
    assert found == pytest.approx(math.sqrt(exact_sum_of_squares(grads, None)), rel=TOLERANCES[False], abs=0)
