"""The squares of what a kernel writes, summed on the way, by the same means as those of what is read (norm.py)."""

import triton
import triton.language as tl

from .compensated import SQUARES, add_square, normalized
from .norm import share_in_float64, share_of
from .tiles import UNIT

# Whether they are, and whether in float64 or by floats that are as exact (compensated.py).
UNSUMMED = tl.constexpr(0)
IN_FLOAT64 = tl.constexpr(1)
IN_FLOAT32 = tl.constexpr(2)


@triton.jit
def no_squares(SUMS: tl.constexpr, UNITS: tl.constexpr):
    """Of no tile yet: one block of float64, or three of float32; and which elements were not 0."""
    high = tl.zeros((UNITS * UNIT,), tl.float64 if SUMS == IN_FLOAT64 else tl.float32)
    return high, high, high, tl.zeros((UNITS * UNIT,), tl.int1)


@triton.jit
def add_squares(squares, tiles_summed, m, SUMS: tl.constexpr):
    """The squares of the tiles so far, with those of m; squares: in one block of float64, or three of float32."""
    high, middle, low, nonzero = squares
    if SUMS == IN_FLOAT64:
        x = m.to(tl.float64)
        high += x * x
    elif SUMS == IN_FLOAT32:
        nonzero |= m != 0
        high, middle, low = add_square(high, middle, low, m, False)
        if tiles_summed % SQUARES == SQUARES - 1:
            high, middle, low = normalized(high, middle, low)
    return high, middle, low, nonzero


@triton.jit
def store_squares(squares, sums, table, count, tiles, SUMS: tl.constexpr, STATE: tl.constexpr, UNITS: tl.constexpr):
    """sums[program] <- the program's share of the squares of m, the fourth stream."""
    high, middle, low, nonzero = squares
    if SUMS == IN_FLOAT64:
        tl.store(sums + tl.program_id(0), tl.sum(high, axis=0))
    elif SUMS == IN_FLOAT32:
        sum, reliable = share_of(high, middle, low, nonzero)
        if not reliable:
            tl.debug_barrier()  # other threads read what these have written
            sum = share_in_float64(table, count, tiles, 3, False, STATE, UNITS)
        tl.store(sums + tl.program_id(0), sum)
