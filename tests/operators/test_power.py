"""x^power of float32 at a general power: how far from the true value, at the ends of the range, and the same bits."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sassha_fused import power as numbers
from sassha_fused.power import raised
from tests.support.backends import BASELINE, SLOW, each_backend_with
from tests.support.calls import HYPER, update
from tests.support.cases import Spec, assert_same_bits, assert_same_case, make_case

ULPS = 1.35
POWERS = (0.05, 0.3, 0.55, 0.7, 0.8, 0.9, 0.999, 1e-3, 1 / 3, 1 - 2.0**-20)
SMALLEST = 2.0**-149
LARGEST = (2 - 2.0**-23) * 2.0**127
HEADER = Path(__file__).resolve().parents[2] / "csrc" / "math" / "power.h"


def floats(first: float, last: float, count: int, seed: int) -> Tensor:
    """Random floats between two, any of them as likely as any other."""
    low, high = (int(torch.tensor(x).view(torch.int32)) for x in (first, last))
    bits = torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int32).view(torch.float32)


def some_of_all(count: int, seed: int) -> Tensor:
    """Floats of every magnitude, half of them near 1, some below the normal ones, and what is special."""
    parts = (
        floats(SMALLEST, LARGEST, count, seed),
        floats(0.25, 4.0, 2 * count, seed),
        floats(0.0, 2.0**-126, count, seed),
    )
    special = torch.tensor([0.0, SMALLEST, 2.0**-126, 1.0, 2.0**100, LARGEST, math.inf, math.nan])
    return torch.cat([*parts, special])


def distance(found: Tensor, x: Tensor, power: float) -> float:
    """The largest distance from the true powers, in units of their last place."""
    exact = x.double().pow(power)
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent.clamp(min=-125) - 24)
    return float(((found.double() - exact).abs() / unit).max())


def check_accuracy(power: float, count: int, seed: int) -> None:
    for first, last in ((0.25, 4.0), (2.0**-126, LARGEST), (SMALLEST, 2.0**-126)):
        x = floats(first, last, count, seed)
        assert distance(raised(x, power), x, power) <= ULPS


@pytest.mark.parametrize("power", POWERS, ids="{:.3g}".format)
def test_the_power_is_near_the_true_value(power: float) -> None:
    check_accuracy(power, 200_000, 0)


@given(power=st.floats(0, 1, exclude_min=True, exclude_max=True), seed=st.integers(0, 2**32))
def test_any_power_is_near_the_true_value(power: float, seed: int) -> None:
    check_accuracy(power, 5_000, seed)


@pytest.mark.parametrize("power", [*POWERS, 1e-300, 1 - 2.0**-53])
def test_zero_one_infinity_and_nan_are_their_own_powers(power: float) -> None:
    own = torch.tensor([0.0, 1.0, math.inf, math.nan])
    assert_same_bits(raised(own, power), own, "the power")


def test_powers_at_the_ends_of_their_range_are_one_and_the_number() -> None:
    x = some_of_all(1000, 0)
    x = x[(x > 0) & (x < math.inf)]
    assert_same_bits(raised(x, 1e-300), torch.ones_like(x), "the power")
    assert distance(raised(x, 1 - 2.0**-53), x, 1.0) <= 1
    assert torch.isfinite(raised(x, 1 - 2.0**-53)).all()


def test_the_power_is_split_without_loss_and_its_first_part_is_short() -> None:
    for power in (*POWERS, *torch.rand(100, dtype=torch.float64).tolist()):
        high, low = numbers._split(power)
        assert abs(high + low - power) <= 2.0**-40 * power
        mantissa, _ = math.frexp(high)
        assert (mantissa * 2**16).is_integer()


def test_the_coefficients_are_those_of_the_header() -> None:
    text = HEADER.read_text()
    for name, coefficients in (("log2", numbers.LOG2), ("exp2", numbers.EXP2)):
        (body,) = re.findall(rf"{name}_polynomial\(float \w\) {{\s*return polynomial\(\w, ([^)]*)\)", text)
        assert [float.fromhex(word.strip().removesuffix("f")) for word in body.split(",")] == list(coefficients)
        # Compared as float64, they are floats all the same.
        assert torch.tensor(coefficients).tolist() == list(coefficients)


@each_backend_with(without=[BASELINE], power=POWERS, few={"power": POWERS[3:5]})
def test_backends_raise_floats_of_every_magnitude_to_the_same_bits(backend: str, power: float) -> None:
    D = some_of_all(2_000 if backend in SLOW else 50_000, 0)
    D = D[(D > 0) & D.isfinite()]  # of others the weights are NaN, with one sign or the other
    case = make_case(torch.float32, [Spec((len(D),))])
    (hessian,) = case.parts(case.exp_hessian)
    hessian.copy_(D)
    # Of m / D^power several bits of the power's last place are seen, as m differs from element to element.
    hyper = {**HYPER, "hessian_power": power, "eps": 0.0, "weight_decay": 1 / HYPER["lr"], "bias_correction": "none"}
    assert_same_case(*(update(name, case, hyper, hessian=False) for name in (backend, BASELINE)))
