r""":math:`x^\alpha` of float32 tiles, step by step as csrc/math/power.h: the same bits."""

import triton
import triton.language as tl

from .. import power as numbers

_LOG2 = tl.constexpr(numbers.LOG2)
_EXP2 = tl.constexpr(numbers.EXP2)
_EXPONENT = tl.constexpr(numbers.EXPONENT)
_SQUARE_ROOT_OF_HALF = tl.constexpr(numbers.SQUARE_ROOT_OF_HALF)
_ROUND = tl.constexpr(numbers.ROUND)
_SPLITTER = tl.constexpr(numbers.SPLITTER)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """c0 + x (c1 + x (c2 + ...))"""
    value = COEFFICIENTS[DEGREE]
    for i in tl.static_range(1, DEGREE + 1):
        value = tl.fma(x, value, COEFFICIENTS[DEGREE - i])
    return value


@triton.jit
def raised(x, power):
    r""":math:`x^\alpha`, for float32 x of 0 or more, or NaN; power, a float64 scalar in (0, 1]."""
    # The power as the sum of two floats, the first of 16 digits.
    scaled = power * _SPLITTER
    high = scaled - (scaled - power)
    low = (power - high).to(tl.float32)
    high = high.to(tl.float32)
    # x = 2^exponent (1 + t). Numbers below the normal ones are worked out 2^24 times as large.
    tiny = x < 2.0**-126
    lift = tl.where(tiny, 24 * _EXPONENT, 0)
    bits = tl.where(tiny, x * 2.0**24, x).to(tl.int32, bitcast=True) - lift
    exponent_bits = (bits - _SQUARE_ROOT_OF_HALF) & -_EXPONENT
    exponent = exponent_bits.to(tl.float32)  # times 2^23
    t = (bits - exponent_bits).to(tl.float32, bitcast=True) - 1.0
    fraction = tl.fma(t, _polynomial(t, _LOG2, 8), t)
    log2 = tl.fma(exponent, 2.0**-23, fraction)
    # alpha log2(x) = whole + rest.
    rounded = tl.fma(log2, high, _ROUND)
    whole = rounded - _ROUND
    remainder = tl.fma(exponent, high * 2.0**-23, -whole)
    rest = tl.fma(fraction, high, tl.fma(log2, low, remainder))
    # The last digits of rounded are those of whole, and the result's exponent.
    mantissa = tl.fma(rest, _polynomial(rest, _EXP2, 5), 1.0)
    lifted = (mantissa.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23) + lift).to(
        tl.float32, bitcast=True
    )
    result = tl.where(tiny, lifted * 2.0**-24, lifted)
    # 0, infinity and NaN are their own powers, and the only ones that are not less than their double.
    return tl.where(x < x + x, result, x)
