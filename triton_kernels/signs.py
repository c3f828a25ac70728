"""Rademacher signs (csrc/math/philox.h) for a tile: each of its units is one Philox block, so one call serves 128."""

import triton
import triton.language as tl

from .tiles import UNIT


@triton.jit
def signs_of(block, seed_low, seed_high, evaluation, sample, STATE: tl.constexpr, UNITS: tl.constexpr):
    """The +-1 of the elements of a tile whose first unit is a Philox block of this index, ``[UNITS, 128]``.

    Element c of a block has bit c % 32 of word c / 32 of Philox4x32-10 with key = seed and counter = (block low,
    block high, evaluation, sample); a set bit is +1.
    """
    blocks = (block + tl.arange(0, UNITS)).to(tl.uint64)
    low = (blocks & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    word0, word1, word2, word3 = tl.philox_impl(
        low,
        (blocks >> 32).to(tl.uint32),
        zero + evaluation.to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero + seed_low.to(tl.uint32),
        zero + seed_high.to(tl.uint32),
    )
    column = tl.arange(0, UNIT)[None, :]
    number = column // 32
    lower = tl.where(number == 0, word0[:, None], word1[:, None])
    upper = tl.where(number == 2, word2[:, None], word3[:, None])
    bit = (tl.where(number < 2, lower, upper) >> (column % 32).to(tl.uint32)) & 1
    return tl.where(bit != 0, 1.0, -1.0).to(STATE)


# Indices are counted in 63 bits.
END_OF_INDICES = 1 << 63


def word_of(number: int) -> int:
    """The low 32 bits of a number, as the int32 that a kernel takes."""
    word = number & 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def key_of(seed: int) -> tuple[int, int]:
    """A seed as kernels take it: its low and high word."""
    return word_of(seed), word_of(seed >> 32)
