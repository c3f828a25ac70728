r""":math:`x^\alpha` of float32 tensors, step by step as csrc/math/power.h: the same bits.

Its numbers are those of triton_kernels/power.py too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fused_multiply_add import fma, nearest_float32

# log2(1 + t) / t - 1 and (2^r - 1) / r: the coefficients of csrc/math/power.h, in rising order.
LOG2 = (
    float.fromhex("0x1.c551cep-2"),
    float.fromhex("-0x1.71546ap-1"),
    float.fromhex("0x1.ec76e0p-2"),
    float.fromhex("-0x1.716096p-2"),
    float.fromhex("0x1.2690f0p-2"),
    float.fromhex("-0x1.e8874ep-3"),
    float.fromhex("0x1.bd24a8p-3"),
    float.fromhex("-0x1.ae793ap-3"),
    float.fromhex("0x1.00b592p-3"),
)
EXP2 = (
    float.fromhex("0x1.62e430p-1"),
    float.fromhex("0x1.ebfbdcp-3"),
    float.fromhex("0x1.c6af78p-5"),
    float.fromhex("0x1.3b2de0p-7"),
    float.fromhex("0x1.5f0b1cp-10"),
    float.fromhex("0x1.416eb8p-13"),
)

EXPONENT = 1 << 23  # 1 in the exponent of a float
SQUARE_ROOT_OF_HALF = 0x3F3504F3
ROUND = 1.5 * 2.0**23  # added to a float, leaves it no digits behind the point
SPLITTER = 2.0**37 + 1.0


def _split(power: float) -> tuple[float, float]:
    """The power as the sum of two floats, the first of 16 digits."""
    scaled = power * SPLITTER
    high = scaled - (scaled - power)
    return high, nearest_float32(power - high)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    *lower, c, highest = coefficients
    value = fma(x, highest, c)
    for c in reversed(lower):
        value = fma(x, value, c)
    return value


def raised(x: Tensor, power: float) -> Tensor:
    r""":math:`x^\alpha`, 1.3 ulp from the true value or less, for float32 x of 0 or more, or NaN; alpha in (0, 1]."""
    high, low = _split(power)
    # x = 2^exponent (1 + t). Numbers below the normal ones are worked out 2^24 times as large.
    tiny = x < 2.0**-126
    lift = tiny.int() * (24 * EXPONENT)
    bits = torch.where(tiny, x * 2.0**24, x).view(torch.int32) - lift
    exponent_bits = (bits - SQUARE_ROOT_OF_HALF) & -EXPONENT
    exponent = exponent_bits.float()  # times 2^23
    t = (bits - exponent_bits).view(torch.float32) - 1.0
    fraction = fma(t, _polynomial(t, LOG2), t)
    log2 = fma(exponent, 2.0**-23, fraction)
    # alpha log2(x) = whole + rest.
    rounded = fma(log2, high, ROUND)
    whole = rounded - ROUND
    remainder = fma(exponent, high * 2.0**-23, -whole)
    rest = fma(fraction, high, fma(log2, low, remainder))
    # The last digits of rounded are those of whole, and the result's exponent.
    mantissa = fma(rest, _polynomial(rest, EXP2), 1.0)
    lifted = (mantissa.view(torch.int32) + (rounded.view(torch.int32) << 23) + lift).view(torch.float32)
    result = torch.where(tiny, lifted * 2.0**-24, lifted)
    # 0, infinity and NaN are their own powers, and the only ones that are not less than their double.
    return torch.where(x < x + x, result, x)
