"""The first launch of update_: what is not finite, and what the elements of a parameter share, worked out once."""

import triton
import triton.language as tl

from .counts import prepare
from .tiles import UNIT, entry_of, in_vectors, load, place_of, stream


@triton.jit
def _value_of(address, dtype):
    """The value of a one-element tensor of any dtype, which launch.DTYPE_CODES numbers."""
    if dtype == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float64)))
    elif dtype == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif dtype == 2:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16))).to(tl.float64)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16))).to(tl.float64)
    return value


@triton.jit
def _add_findings(sums, at, begin, end, DTYPE: tl.constexpr, STATE: tl.constexpr, VECTOR: tl.constexpr):
    x = load(at, begin, end, tl.arange(0, sums.numel), DTYPE, VECTOR).to(STATE)
    # Not finite if any x is not; of float64 also if its square is not, as in the norm.
    if STATE == tl.float64:
        return sums + x * x
    else:
        return sums + 0.0 * x


@triton.jit
def _inspect_stream(
    sums, table, count, entry, before, begin, end, STREAM: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr
):
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    at = stream(table, count, entry, before, STREAM, DTYPE)
    if in_vectors(at, begin, end, VECTOR):
        sums = _add_findings(sums, at, begin, end, DTYPE, STATE, VECTOR)
    else:
        sums = _add_findings(sums, at, begin, end, DTYPE, STATE, 1)
    return sums


@triton.jit(
    do_not_specialize=[
        *("table", "count", "tiles", "guards", "guard_count", "partial", "steps", "rows", "per_row", "scalars", "norm"),
        *("second", "settings"),
    ]
)
def inspect_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    guards: tl.pointer_type(tl.int64),
    guard_count: tl.int64,
    partial: tl.pointer_type(tl.float64),
    steps: tl.pointer_type(tl.int64),
    rows: tl.int64,
    per_row: tl.pointer_type(tl.float64),
    scalars: tl.int64,
    norm: tl.int64,
    second: tl.int32,
    settings: tl.pointer_type(tl.float64),
    PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""partial[program] <- a number that is not finite if any element of the program's share, or any guard, is not.

    And what is at scalars, of STATE ``[rows, 7]`` <- what the elements of a parameter share (counts.py), for each row
    of steps, int64 ``[rows, 2]``, and per_row, float64 ``[rows, 3]``. norm: the address of N, or 0; second: whether the
    step writes D, 0 or 1.

    Streams: the gradients, of DTYPE, and unless PRODUCT is None the products, of that dtype, of any length. guards: the
    addresses and dtypes of one-element tensors. Reads 4 bytes per float32 element, 8 with products.
    """
    prepare(steps, rows, per_row, scalars.to(tl.pointer_type(STATE)), norm, second, settings, STATE)
    sums = tl.zeros((UNITS * UNIT,), STATE)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        sums = _inspect_stream(sums, table, count, entry, before, begin, end, 0, DTYPE, STATE)
        if PRODUCT is not None:
            sums = _inspect_stream(sums, table, count, entry, before, begin, end, 1, PRODUCT, STATE)
    finding = tl.sum(sums, axis=0).to(tl.float64)
    if tl.program_id(0) == 0:
        for guard in range(guard_count):
            finding += 0.0 * _value_of(tl.load(guards + 2 * guard), tl.load(guards + 2 * guard + 1))
    tl.store(partial + tl.program_id(0), finding)
