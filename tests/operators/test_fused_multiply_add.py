"""The fused multiply-add of eager: a b + c of floats, rounded once."""

import ctypes
import ctypes.util
import itertools

import pytest
import torch
from torch import Tensor

from sassha_fused import layout
from sassha_fused.fused_multiply_add import fma
from tests.support.cases import assert_same_bits

SPECIAL = [0.0, 1.0, 1.5, 1 + 2.0**-23, 2 - 2.0**-23, 3.0e38, 2.0**127, 2.0**-126, 2.0**-149, 1.1e-40, float("inf")]
COUNT = 300_000


def libm(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The C library's fmaf."""
    function = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return torch.tensor([function(*each) for each in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])


def any_floats(generator: torch.Generator, *, least: int = 0, most: int = 255) -> Tensor:
    """Floats of any sign and mantissa, whose biased exponents lie in [least, most)."""
    bits = torch.randint(least << 23, most << 23, (COUNT,), generator=generator, dtype=torch.int64)
    signs = torch.randint(0, 2, (COUNT,), generator=generator) << 31
    return (bits - signs).to(torch.int32).view(torch.float32)


def nearly_cancelling(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (any_floats(generator, least=90, most=160) for _ in range(2))
    c = -(a * b)
    return a, b, (c.view(torch.int32) + torch.randint(-2, 3, (COUNT,), generator=generator).int()).view(torch.float32)


def halfway(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """a b is half a unit of the last place of c, or differs from that by what float64 has no room for beside c."""
    c = torch.cat([any_floats(generator, most=2)[::2], any_floats(generator, most=150)[1::2]])
    biased = ((c.view(torch.int32) >> 23) & 0xFF).clamp(min=1)
    half = torch.ldexp(torch.ones(COUNT, dtype=torch.float64), biased - 127 - 24)
    near_one = [1 + torch.randint(-2, 3, (COUNT,), generator=generator).double() * 2.0**-23 for _ in range(2)]
    return (near_one[0] * 2.0**-60).float(), (near_one[1] * half * 2.0**60).float(), c


def subnormal(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (any_floats(generator, least=40, most=90) for _ in range(2))
    return a, b, any_floats(generator, most=3)


def anything(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return any_floats(generator), any_floats(generator), any_floats(generator)


KINDS = {kind.__name__: kind for kind in (anything, nearly_cancelling, halfway, subnormal)}


@pytest.mark.parametrize("kind", KINDS)
def test_fma_is_that_of_the_c_library(kind: str) -> None:
    a, b, c = KINDS[kind](torch.Generator().manual_seed(0))
    assert_same_bits(fma(a, b, c), libm(a, b, c), kind)


def test_these_cases_tell_a_fused_multiply_add_from_others() -> None:
    for kind in (nearly_cancelling, halfway, subnormal):
        a, b, c = kind(torch.Generator().manual_seed(0))
        assert (fma(a, b, c) != a * b + c).sum() > 1000
    a, b, c = halfway(torch.Generator().manual_seed(0))
    through_float64 = (a.double() * b.double() + c.double()).float()
    wrong = through_float64 != fma(a, b, c)
    assert wrong.sum() > 1000
    assert (wrong & (c.abs() < 2.0**-126)).any()


def test_fma_of_zeros_infinities_and_ends_of_the_range() -> None:
    numbers = [*SPECIAL, *(-x for x in SPECIAL), float("nan")]
    a, b, c = (torch.tensor(column) for column in zip(*itertools.product(numbers, repeat=3)))
    found, expected = fma(a, b, c), libm(a, b, c)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), nan)
    assert_same_bits(found[~nan], expected[~nan], "a b + c")


def test_fma_takes_numbers_and_tensors_of_other_shapes() -> None:
    a, b, c = (x[:60] for x in anything(torch.Generator().manual_seed(2)))
    assert_same_bits(
        fma(a, 0.75, 2.0**-149), libm(a, torch.full_like(a, 0.75), torch.full_like(a, 2.0**-149)), "numbers"
    )
    # A tensor of no dimension does not make another one of float32.
    for x, y, z in ((a[0], b, c), (a, b[0], c), (a, b, c[0]), (a[0], b, c[0]), (a[0], b[0], c)):
        whole = [t.expand(60).contiguous() for t in (x, y, z)]
        assert_same_bits(fma(x, y, z).expand(60), fma(*whole), "shapes")


def test_fma_rounds_twice_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout.lacks_float64(torch.device("mps"))
    assert not any(layout.lacks_float64(torch.device(name)) for name in ("cpu", "cuda"))
    monkeypatch.setattr(layout, "WITHOUT_FLOAT64", ("cpu",))
    a, b, c = nearly_cancelling(torch.Generator().manual_seed(0))
    assert_same_bits(fma(a, b, c), a * b + c, "a b + c")
