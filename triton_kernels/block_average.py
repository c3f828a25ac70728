"""block_average_: what D becomes where the elements of a block share one: the means of |products| are averaged in."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import has_memory, state_dtype
from ..settings import settings_of
from .arithmetic import averaged_hessian, divided, second_average
from .checks import check_block_average
from .launch import DTYPES, launch_over, registers_for, units_on
from .lists import dense
from .settings import LONGEST_BLOCK
from .table import Contents, blocks_at, lengths_of, numbers_on, stream_of, table_on
from .tiles import (
    blocks_of,
    entry_of,
    in_vectors,
    indices,
    load,
    load_of_blocks,
    place_of,
    store_of_blocks,
    stream,
)


@triton.jit
def _sums(x, shift):
    """For each element of a tile the sum of its block: of neighbours, then of pairs of neighbours, and so on."""
    flat = tl.reshape(x, (x.numel,))
    for level in tl.static_range(LONGEST_BLOCK):
        if level < shift:
            pairs = tl.reshape(flat, (x.numel >> (level + 1), 2, 1 << level))
            sums = tl.sum(pairs, axis=1, keep_dims=True)
            flat = tl.reshape(tl.broadcast_to(sums, pairs.shape), flat.shape)
    return tl.reshape(flat, x.shape)


@triton.jit
def _average_tile(
    product_at,
    D_at,
    averaged_at,
    begin,
    end,
    shift,
    how,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    index = indices(UNITS, VECTOR)
    sums = _sums(tl.abs(load(product_at, begin, end, index, DTYPE, VECTOR).to(STATE)), shift)
    # Of a tensor's last block only what is there.
    first = (index >> shift) << shift
    present = tl.minimum(end - first, 1 << shift).to(STATE)
    exp_hessian = load_of_blocks(D_at, begin, end, index, shift, STATE, VECTOR)
    averaged = averaged_hessian(exp_hessian, divided(sums, present, STATE), how, STATE)
    store_of_blocks(averaged_at, begin, end, index, shift, averaged, STATE, VECTOR)


@triton.jit(do_not_specialize=["table", "count", "tiles", "settings"])
def block_average_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    settings: tl.pointer_type(tl.float64),
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""averaged <- :math:`\beta_2 D + (1 - \beta_2)` times the mean of ``|products|`` over a block, or its square.

    Streams: the products, of DTYPE and any length; D and averaged, of STATE, by blocks of 2^shift elements. Reads 4
    bytes per float32 element, and moves 8 per block.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    how = second_average(settings, STATE)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        product_at = stream(table, count, entry, before, 0, DTYPE)
        D_at, shift = blocks_of(table, count, entry, before, 1, STATE)
        averaged_at, shift = blocks_of(table, count, entry, before, 2, STATE)
        if in_vectors(product_at, begin, end, VECTOR):
            _average_tile(product_at, D_at, averaged_at, begin, end, shift, how, DTYPE, STATE, UNITS, VECTOR)
        else:
            _average_tile(product_at, D_at, averaged_at, begin, end, shift, how, DTYPE, STATE, UNITS, 1)


def block_average_(
    products: Sequence[Tensor],
    exp_hessian: Tensor,
    averaged: Tensor,
    offsets: Sequence[int],
    blocked: int,
    settings: Sequence[float],
) -> None:
    r"""averaged <- exp_hessian with the means of ``|products|`` over blocks averaged in (csrc/schema.cpp).

    Raises:
        ValueError: arguments do not fit each other, before anything is written.
    """
    shared = settings_of(settings)
    check_block_average(products, exp_hessian, averaged, offsets, blocked, shared)
    if not products or not has_memory(averaged):
        return
    first = products[0]
    terms = dense(products)
    parts, shifts = blocks_at((exp_hessian, averaged), offsets, int(shared.hessian_block), blocked)
    units = units_on(first.device, first.dtype, 3)
    contents = Contents(lengths_of(terms), units, (stream_of(terms), *parts), shifts=shifts)
    launch_over(
        table_on(first.device, contents),
        block_average_kernel,
        numbers_on(first.device, shared, torch.float64),
        registers=registers_for(first.dtype, state=True),
        DTYPE=DTYPES[first.dtype],
        STATE=DTYPES[state_dtype(first)],
    )
