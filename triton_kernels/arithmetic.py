"""The arithmetic of one element: that of csrc/math, step by step, for Sassha (Shin et al., ICML 2025, arXiv 2502.18153)
and the rest of the family.

STATE is the dtype that is computed in: float64 for float64 parameters, float32 for float32, bfloat16 and float16 ones.
Scalars are worked out in float64, once for a launch or a parameter. Compiled without contraction, so each operation
below is one IEEE rounding, and so is each explicit fused multiply-add.
"""

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED
from .power import raised
from .settings import (
    ALONG_MOMENTUM,
    ASCENT,
    BETA2,
    MAXIMIZE,
    SECOND_AVERAGE,
    SIGNED,
    SQUARE,
    UNCORRECTED,
    setting,
)

# Where a step leads, with a kernel for each power that has a quicker way: Kind in csrc/math/sassha.h.
SQUARE_ROOT = tl.constexpr(0)
IDENTITY = tl.constexpr(1)
GENERAL = tl.constexpr(2)
CLIPPED = tl.constexpr(3)
PLAIN = tl.constexpr(4)

_LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
_LARGEST_DOUBLE = tl.constexpr(torch.finfo(torch.float64).max)

# The interpreter cuts off what bfloat16 has no room for; devices round.
_TRUNCATES = tl.constexpr(INTERPRETED)


@triton.jit
def double(x):
    """A number given from outside as a float64 scalar: the interpreter hands it in as it is."""
    return tl.full((), x, tl.float64)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to nearest even."""
    if _TRUNCATES and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN stays one.
        return tl.where(x == x, rounded, (bits >> 16) | 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def inverse_norm(size, settings):
    r""":math:`1 / (N + 10^{-12})`, negative where rho times it leads down."""
    inverse = 1.0 / (size + double(1e-12))
    down = (setting(settings, MAXIMIZE) != 0.0) | (setting(settings, ASCENT) == ALONG_MOMENTUM)
    return tl.where(down, -inverse, inverse)


@triton.jit
def perturbed(w, g, scale, ADAPTIVE: tl.constexpr):
    r""":math:`w + \epsilon^*`, scale being :math:`\rho / (N + 10^{-12})`."""
    step = scale * g
    if ADAPTIVE:
        return w + step * (w * w)
    else:
        return w + step


@triton.jit
def unperturbed(w, m, scale):
    """w as it was before it became w + eps*, to rounding."""
    return w - scale * m


@triton.jit
def root(x, KIND: tl.constexpr, power, STATE: tl.constexpr):
    r""":math:`x^\alpha`."""
    if KIND == IDENTITY:
        return x
    elif KIND == GENERAL and STATE == tl.float64:
        return tl.exp2(power * tl.log2(x))
    elif KIND == GENERAL:
        return raised(x, power)
    elif STATE == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divided(x, y, STATE: tl.constexpr):
    """x / y, rounded once: what Triton makes of a float32 division is not."""
    if STATE == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def parts_of(x, STATE: tl.constexpr):
    """A float64 number as the sum of two of STATE: a float32 alone would be off by up to half a ulp, the same way in
    every step. Of float64 the first is the number.
    """
    high = x.to(STATE)
    return high, (x - high.to(tl.float64)).to(STATE)


@triton.jit
def times_plus(x, factor, y, STATE: tl.constexpr):
    """factor x + y, the factor in parts."""
    high, low = factor
    if STATE == tl.float64:
        return high * x + y
    else:
        return tl.fma(x, high, tl.fma(x, low, y))


@triton.jit
def average(mean, beta, x, weight, STATE: tl.constexpr):
    """beta mean + weight x, the factors in parts. Of float64 in three roundings, as plain torch has it; of float32 the
    low parts come first, which are below a ulp, then the smaller term and the larger.
    """
    beta_high, beta_low = beta
    weight_high, weight_low = weight
    if STATE == tl.float64:
        return beta_high * mean + weight_high * x
    else:
        rest = tl.fma(mean, beta_low, weight_low * x)
        return tl.fma(mean, beta_high, tl.fma(x, weight_high, rest))


@triton.jit
def second_average(settings, STATE: tl.constexpr):
    r"""How D is averaged: :math:`\beta_2` and :math:`1 - \beta_2` in parts, and whether products are squared, and keep
    their sign, by which they count the other way where the objective is maximised.
    """
    beta2, mode = setting(settings, BETA2), setting(settings, SECOND_AVERAGE)
    signed = mode == SIGNED
    weight = tl.where(signed & (setting(settings, MAXIMIZE) != 0.0), beta2 - 1.0, 1.0 - beta2)
    return parts_of(beta2, STATE), parts_of(weight, STATE), mode == SQUARE, signed


@triton.jit
def square(x, STATE: tl.constexpr):
    """x^2, or the largest number where that is beyond it: of infinity the average would be NaN."""
    return tl.minimum(x * x, _LARGEST_DOUBLE if STATE == tl.float64 else _LARGEST_FLOAT)


@triton.jit
def averaged_hessian(exp_hessian, hessian, how, STATE: tl.constexpr):
    r""":math:`\beta_2 D + (1 - \beta_2) |H|`, or of :math:`H^2`, or of H; how: what second_average returns."""
    beta2, weight, squared, signed = how
    magnitude = tl.where(signed, hessian, tl.abs(hessian))
    return average(exp_hessian, beta2, tl.where(squared, square(magnitude, STATE), magnitude), weight, STATE)


@triton.jit
def corrected(exp_hessian, correction, STATE: tl.constexpr):
    """:math:`D / c_2`; correction: :math:`1 / c_2` in parts."""
    high, low = correction
    if STATE == tl.float64:
        return exp_hessian * high
    else:
        return tl.fma(exp_hessian, high, low * exp_hessian)


@triton.jit
def clipped(exp_avg, exp_hessian, threshold, eps, STATE: tl.constexpr):
    r""":math:`m / (\gamma \max(D, 0) + \epsilon)`, between -1 and 1."""
    curvature = tl.where(exp_hessian > 0, exp_hessian, 0.0)
    if STATE == tl.float64:
        denominator = threshold * curvature + eps
    else:
        denominator = tl.fma(curvature, threshold, eps)
    quotient = divided(exp_avg, denominator, STATE)
    return tl.where(quotient > 1, 1.0, tl.where(quotient < -1, -1.0, quotient))


@triton.jit
def moved(w, direction, decay, step_size, STATE: tl.constexpr):
    """decay w - step_size direction, the factors in parts."""
    decay_high, decay_low = decay
    step_high, step_low = step_size
    if STATE == tl.float64:
        return w * decay_high - step_high * direction
    else:
        rest = tl.fma(w, decay_low, -(step_low * direction))
        return tl.fma(w, decay_high, tl.fma(direction, -step_high, rest))


@triton.jit
def _halves(x):
    """A double as the sum of two of half its digits (Veltkamp)."""
    scaled = x * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - x)
    return high, x - high


@triton.jit
def _times(a, a_low, b, b_low):
    """(a + a_low) (b + b_low) in twice the precision of double; the error of a b is Dekker's, as no fma need be."""
    product = a * b
    a_high, a_rest = _halves(a)
    b_high, b_rest = _halves(b)
    error = a_rest * b_rest - (((product - a_high * b_high) - a_rest * b_high) - a_high * b_rest)
    rest = error + (a * b_low + a_low * b)
    result = product + rest
    return result, rest - (result - product)


@triton.jit
def integer_power(base, exponent):
    """base^exponent, for a block of exponents of 0 or more, by repeated squaring in twice the precision of double."""
    high = tl.full(exponent.shape, 1.0, tl.float64)
    low = tl.zeros_like(high)
    square, square_low = high * base, low
    most = tl.max(exponent, axis=0)
    while most > 0:
        odd = (exponent & 1) != 0
        product, product_low = _times(high, low, square, square_low)
        high, low = tl.where(odd, product, high), tl.where(odd, product_low, low)
        square, square_low = _times(square, square_low, square, square_low)
        exponent = exponent >> 1
        most = most >> 1
    return high


@triton.jit
def correction_of(beta, count, bias_correction):
    r""":math:`1 - \beta^n`, for a block of counts that include the step being taken; 1 where nothing is corrected."""
    return tl.where(bias_correction == UNCORRECTED, 1.0, 1.0 - integer_power(beta, count))
