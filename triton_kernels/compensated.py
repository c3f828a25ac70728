"""Sums of squares of floats, as exact as in float64, by float32 operations alone (csrc/cuda/compensated.h).

A sum is three blocks of float32, each of which takes what the one before has lost (Dot3 of Ogita, Rump and Oishi, SIAM
J. Sci. Comput. 26, 2005). Between two calls of normalized an element may take 16 squares, whose sum is then exact to
2^-59. What is less than 2^-149 is lost as well, at most 2^-147 of each square, and a sum beyond float32 is NaN.
"""

import triton
import triton.language as tl

# Squares that are added before the sum is normalized.
SQUARES = tl.constexpr(16)


@triton.jit
def _two_sum(x, y):
    """x + y, and what its rounding lost: their sum is exactly x + y (Knuth)."""
    total = x + y
    added = total - x
    return total, (x - (total - added)) + (y - added)


@triton.jit
def _fast_two_sum(x, y):
    """The same where abs(x) >= abs(y) (Dekker)."""
    total = x + y
    return total, y - (total - x)


@triton.jit
def _add_middle(middle, low, x):
    middle, lost = _two_sum(middle, x)
    return middle, low + lost


@triton.jit
def add_square(high, middle, low, x, EXACT: tl.constexpr):
    """The sum with x^2 added to it. EXACT: the square has no more than 24 digits."""
    square = x * x
    high, lost = _two_sum(high, square)
    middle, low = _add_middle(middle, low, lost)
    if not EXACT:
        middle, low = _add_middle(middle, low, tl.fma(x, x, -square))
    return high, middle, low


@triton.jit
def add_square_of_product(high, middle, low, x, y):
    r"""The sum with :math:`(x y)^2` added to it, the product being taken exactly as two floats."""
    product = x * y
    rest = tl.fma(x, y, -product)
    high, middle, low = add_square(high, middle, low, product, False)
    twice = product + product
    mixed = twice * rest
    middle, low = _add_middle(middle, low, mixed)
    return high, middle, low + tl.fma(rest, rest, tl.fma(twice, rest, -mixed))


@triton.jit
def normalized(high, middle, low):
    """The same sum, each float left what the one before has no room for, so that the last one stays small."""
    high, middle = _fast_two_sum(high, middle)
    middle, low = _fast_two_sum(middle, low)
    return high, middle, low


@triton.jit
def value(high, middle, low):
    """The sum in float64."""
    return (low.to(tl.float64) + middle.to(tl.float64)) + high.to(tl.float64)
