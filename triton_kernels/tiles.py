"""The device's side of a table: which elements a tile holds, and how these come and go.

A tile is UNITS times 128 elements in a row, all of one tensor; the last tile of a tensor may hold fewer. A stream is
one array per tensor: its weights, its gradient, its part of the state.
"""

import triton
import triton.language as tl

from . import launch, table

UNIT = tl.constexpr(table.UNIT)
VECTOR_BYTES = tl.constexpr(launch.VECTOR_BYTES)

# What a table holds of each tensor, before the addresses of its streams: all first tiles, then all skips, and so on.
FIRST_TILE = tl.constexpr(0)
SKIP = tl.constexpr(1)
LENGTH = tl.constexpr(2)
NUMBER = tl.constexpr(3)
SHIFT = tl.constexpr(4)
ADDRESSES = tl.constexpr(5)

# How many entries are looked at together: a warp's worth.
FAN_OUT = tl.constexpr(32)

# Partial sums that are read at a time.
PARTIALS = tl.constexpr(1024)


@triton.jit
def field(table, count, entry, FIELD: tl.constexpr):
    """What a table of count entries holds of one of them."""
    return tl.load(table + FIELD * count + entry)


@triton.jit
def entry_of(table, count, tile):
    """The entry that a tile belongs to: the last one that does not begin behind it."""
    entry = tile * 0
    width = count
    while width > 1:
        # It is one of width entries: of every stride-th one of these, the last one that has begun.
        stride = (width + FAN_OUT - 1) // FAN_OUT
        ahead = tl.arange(0, FAN_OUT) * stride
        begun = tl.load(table + entry + ahead, mask=ahead < width, other=tile + 1) <= tile
        ahead = (tl.sum(begun.to(tl.int32), axis=0) - 1) * stride
        entry += ahead
        width = tl.minimum(width - ahead, stride)
    return entry


@triton.jit
def place_of(table, count, entry, tile, UNITS: tl.constexpr):
    """Where a tile lies: how many elements of its entry are before it, and which of its own there are, [begin, end)."""
    before = (tile - field(table, count, entry, FIRST_TILE)) * (UNITS * UNIT)
    begin = tl.maximum(field(table, count, entry, SKIP) - before, 0)
    end = tl.minimum(field(table, count, entry, LENGTH) - before, UNITS * UNIT)
    return before, begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def stream(table, count, entry, before, STREAM: tl.constexpr, DTYPE: tl.constexpr):
    """The address at which a tile begins in a stream."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return field(table, count, entry, ADDRESSES + STREAM) + before * BYTES


@triton.jit
def in_vectors(addresses, begin, end, VECTOR: tl.constexpr):
    """Whether a tile can be read and written 16 bytes at a time; addresses: those of its streams, or-ed."""
    return ((addresses & (VECTOR_BYTES - 1)) | ((begin | end) & (VECTOR - 1))) == 0


@triton.jit
def units_of(UNITS: tl.constexpr):
    """The indices of the elements of a tile, ``[UNITS, 128]``."""
    return tl.arange(0, UNITS)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]


@triton.jit
def indices(UNITS: tl.constexpr, VECTOR: tl.constexpr):
    """The indices of the elements of a tile, in a shape that depends on how many go at a time.

    The compiler gives all accesses of one shape the same layout: that of vectors would have the threads of a warp read
    far from each other, one element at a time.
    """
    if VECTOR > 1:
        return tl.arange(0, UNITS * UNIT)
    else:
        return units_of(UNITS)


@triton.jit
def _pointers(address, index, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    start = address.to(tl.pointer_type(DTYPE))
    if VECTOR > 1:
        start = tl.multiple_of(start, VECTOR_BYTES)
    return start + index


@triton.jit
def _inside(begin, end, index, VECTOR: tl.constexpr):
    # So the compiler sees that the elements of a vector are all inside, or all outside.
    return (index >= begin // VECTOR * VECTOR) & (index < end // VECTOR * VECTOR)


@triton.jit
def load(address, begin, end, index, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The elements at these indices of a tile, 0 where there are none. VECTOR: how many go at a time."""
    return tl.load(_pointers(address, index, DTYPE, VECTOR), mask=_inside(begin, end, index, VECTOR), other=0)


@triton.jit
def store(address, begin, end, index, values, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Writes the elements at these indices of a tile."""
    tl.store(_pointers(address, index, DTYPE, VECTOR), values, mask=_inside(begin, end, index, VECTOR))


@triton.jit
def blocks_of(table, count, entry, before, STREAM: tl.constexpr, DTYPE: tl.constexpr):
    """The address at which a tile begins in a stream that has one number for each 2^shift elements, and the shift."""
    shift = field(table, count, entry, SHIFT)
    return stream(table, count, entry, before >> shift, STREAM, DTYPE), shift.to(tl.int32)


@triton.jit
def load_of_blocks(address, begin, end, index, shift, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """For each of the elements at these indices of a tile the number of its block."""
    pointers = address.to(tl.pointer_type(DTYPE)) + (index >> shift)
    return tl.load(pointers, mask=_inside(begin, end, index, VECTOR), other=0)


@triton.jit
def store_of_blocks(address, begin, end, index, shift, values, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Writes each block's number, which its first element has."""
    first = (index & ((1 << shift) - 1)) == 0
    pointers = address.to(tl.pointer_type(DTYPE)) + (index >> shift)
    tl.store(pointers, values, mask=_inside(begin, end, index, VECTOR) & first)


@triton.jit
def copy_of_blocks(address, source, end, shift, DTYPE: tl.constexpr, UNITS: tl.constexpr):
    """Copies the numbers of a tile's blocks."""
    count = (end + (1 << shift) - 1) >> shift
    index = units_of(UNITS)
    store(address, 0, count, index, load(source, 0, count, index, DTYPE, 1), DTYPE, 1)


@triton.jit
def total(partial, count):
    """The sum of partial sums, always in the same order."""
    sums = tl.zeros((PARTIALS,), tl.float64)
    for start in range(0, count, PARTIALS):
        at = start + tl.arange(0, PARTIALS)
        sums += tl.load(partial + at, mask=at < count, other=0.0)
    return tl.sum(sums, axis=0)
