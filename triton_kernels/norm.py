"""grad_norm: the norm of all gradients, in two stages, always in the same order, exact to the last bits of float64."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import check_layouts, has_memory
from .checks import check_like, check_list
from .compensated import SQUARES, add_square, add_square_of_product, normalized, value
from .launch import DTYPES, launch, launch_over, programs, quick_float64, registers_for, units_on
from .lists import dense, laid_out_like
from .table import Contents, lengths_of, stream_of, table_on
from .tiles import UNIT, entry_of, in_vectors, load, place_of, stream, total

# Below it squares may have been lost: 2^30 elements of a program that each lose 2^-147 change the 53rd binary digit.
_SMALLEST = tl.constexpr(2.0**-64)


@triton.jit
def _elements(
    table, count, tile, STREAM: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, UNITS: tl.constexpr
):
    """A tile of a stream and, if WEIGHTED, of the weights behind it; else of the stream once more."""
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    index = tl.arange(0, UNITS * UNIT)
    entry = entry_of(table, count, tile)
    before, begin, end = place_of(table, count, entry, tile, UNITS)
    g_at = stream(table, count, entry, before, STREAM, DTYPE)
    w_at = g_at
    if WEIGHTED:
        w_at = stream(table, count, entry, before, STREAM + 1, DTYPE)
    if in_vectors(g_at | w_at, begin, end, VECTOR):
        g = load(g_at, begin, end, index, DTYPE, VECTOR)
        w = load(w_at, begin, end, index, DTYPE, VECTOR) if WEIGHTED else g
    else:
        g = load(g_at, begin, end, index, DTYPE, 1)
        w = load(w_at, begin, end, index, DTYPE, 1) if WEIGHTED else g
    return g, w


@triton.jit
def share_in_float64(
    table, count, tiles, STREAM: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, UNITS: tl.constexpr
):
    """The sum of squares of a program's tiles."""
    sums = tl.zeros((UNITS * UNIT,), tl.float64)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        g, w = _elements(table, count, tile, STREAM, WEIGHTED, DTYPE, UNITS)
        x = g.to(tl.float64)
        if WEIGHTED:
            x *= w.to(tl.float64)
        sums += x * x
    return tl.sum(sums, axis=0)


@triton.jit
def share_of(high, middle, low, nonzero):
    """The sum of what a program has summed in float32, and whether it can be relied on."""
    sum = tl.sum(value(high, middle, low), axis=0)
    # NaN is not.
    return sum, (sum >= _SMALLEST) | (tl.max(nonzero.to(tl.int32), axis=0) == 0)


@triton.jit
def _share_in_float32(table, count, tiles, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, UNITS: tl.constexpr):
    """The same, as exact (compensated.py), and whether it can be relied on: neither beyond float32 nor very small."""
    DIGITS: tl.constexpr = (DTYPE.fp_mantissa_width + 1) * (2 if WEIGHTED else 1)
    high = tl.zeros((UNITS * UNIT,), tl.float32)
    middle, low = high, high
    nonzero = tl.zeros((UNITS * UNIT,), tl.int1)
    step = 0
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        g, w = _elements(table, count, tile, 0, WEIGHTED, DTYPE, UNITS)
        nonzero |= g != 0
        x, y = g.to(tl.float32), w.to(tl.float32)
        if DIGITS > 24:
            high, middle, low = add_square_of_product(high, middle, low, x, y)
        elif WEIGHTED:
            high, middle, low = add_square(high, middle, low, x * y, 2 * DIGITS <= 24)
        else:
            high, middle, low = add_square(high, middle, low, x, 2 * DIGITS <= 24)
        step += 1
        if step % SQUARES == 0:
            high, middle, low = normalized(high, middle, low)
    return share_of(high, middle, low, nonzero)


@triton.jit(do_not_specialize=["table", "count", "tiles", "partial"])
def squares_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    partial: tl.pointer_type(tl.float64),
    WEIGHTED: tl.constexpr,
    QUICK_FLOAT64: tl.constexpr,
    DTYPE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""partial[program] <- its share of :math:`\|g\|^2`, or of :math:`\| |w| \cdot g \|^2` if WEIGHTED.

    Streams: g and, if WEIGHTED, w, of DTYPE and any length; partial: float64 ``[programs]``. Unless QUICK_FLOAT64, sums
    of float32 and less are taken in float32, as exactly, and once more in float64 where that has no room for them.
    Reads 4 bytes per float32 element (8 if WEIGHTED).
    """
    if QUICK_FLOAT64:
        sum = share_in_float64(table, count, tiles, 0, WEIGHTED, DTYPE, UNITS)
    else:
        sum, reliable = _share_in_float32(table, count, tiles, WEIGHTED, DTYPE, UNITS)
        if not reliable:
            sum = share_in_float64(table, count, tiles, 0, WEIGHTED, DTYPE, UNITS)
    tl.store(partial + tl.program_id(0), sum)


@triton.jit(do_not_specialize=["partial", "count", "norm", "skipped"])
def norm_kernel(
    partial: tl.pointer_type(tl.float64), count: tl.int64, norm: tl.pointer_type(tl.float64), skipped: tl.int64
):
    """norm <- the square root of the whole sum, unless the int64 at the address skipped, where it is not 0, is 1.

    One program; partial: float64 ``[count]``, norm: one float64.
    """
    taken = skipped == 0
    if skipped != 0:
        taken = tl.load(skipped.to(tl.pointer_type(tl.int64))) == 0
    tl.store(norm, tl.sqrt(total(partial, count)), mask=taken)


def streams_of_tile(dtype: torch.dtype, streams: int, quick_float64: bool) -> int:
    """The number of streams that tiles are made for: of elements that sum in three floats a thread holds eight."""
    return 2 if dtype.itemsize == 2 and not quick_float64 else streams


def sum_squares(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sums of squares of dense gradients, times weights where there are any, one per program."""
    first = grads[0]
    streams = tuple(stream_of(tensors) for tensors in (grads, weights) if tensors)
    quick = first.dtype == torch.float64 or quick_float64(first.device)
    units = units_on(first.device, first.dtype, streams_of_tile(first.dtype, len(streams), quick))
    table = table_on(first.device, Contents(lengths_of(grads), units, streams))
    registers = registers_for(first.dtype)
    partial = torch.empty(programs(table, registers), dtype=torch.float64, device=first.device)
    launch_over(
        table,
        squares_kernel,
        partial,
        registers=registers,
        WEIGHTED=len(weights) > 0,
        QUICK_FLOAT64=quick,
        DTYPE=DTYPES[first.dtype],
    )
    return partial


def grad_norm(grads: Sequence[Tensor], params: Sequence[Tensor], layouts: Tensor | None, adaptive: bool) -> Tensor:
    r""":math:`\|g\|_2`, or :math:`\| |w| \cdot g \|_2` if adaptive, as a 0-d float64 tensor (csrc/schema.cpp).

    Raises:
        ValueError: arguments do not fit each other, before anything is computed.
    """
    if not grads:
        raise ValueError("grads is empty")
    if layouts is not None:
        check_layouts(params, layouts)
    if params or adaptive:
        check_like(params, "grads", grads)
        check_list("params", params)
        models = dense(params)
        gradients = laid_out_like(models, grads)
    else:
        check_list("grads", grads)
        models, gradients = [], dense(grads)
    first = grads[0]
    norm = torch.empty((), dtype=torch.float64, device=first.device)
    if has_memory(first):
        partial = sum_squares(gradients, models if adaptive else [])
        finish_norm(partial, norm)
    return norm


def finish_norm(partial: Tensor, norm: Tensor, skipped: Tensor | None = None) -> None:
    """norm <- that of partial sums of squares, unless skipped, where it is given, holds 1."""
    unless = 0 if skipped is None else skipped.data_ptr()
    launch(norm_kernel, norm.device, 1, partial, len(partial), norm, unless, registers=64)
