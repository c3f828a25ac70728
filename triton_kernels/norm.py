"""grad_norm: the norm of all gradients, summed in float64 in two stages, always in the same order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import check_layouts, has_memory
from .checks import check_like, check_list
from .launch import DTYPES, launch, launch_over, programs, registers_for, units_on
from .lists import dense, laid_out_like
from .table import Contents, lengths_of, stream_of, table_on
from .tiles import UNIT, entry_of, in_vectors, load, place_of, stream, total


@triton.jit
def _add_squares(sums, g_at, w_at, begin, end, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    index = tl.arange(0, sums.numel)
    x = load(g_at, begin, end, index, DTYPE, VECTOR).to(tl.float64)
    if WEIGHTED:
        x *= load(w_at, begin, end, index, DTYPE, VECTOR).to(tl.float64)
    return sums + x * x


@triton.jit(do_not_specialize=["table", "count", "tiles", "partial"])
def squares_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    partial: tl.pointer_type(tl.float64),
    WEIGHTED: tl.constexpr,
    DTYPE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""partial[program] <- its share of :math:`\|g\|^2`, or of :math:`\| |w| \cdot g \|^2` if WEIGHTED.

    Streams: g and, if WEIGHTED, w, of DTYPE and any length; partial: float64 ``[programs]``.
    Reads 4 bytes per float32 element (8 if WEIGHTED).
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    sums = tl.zeros((UNITS * UNIT,), tl.float64)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        g_at = stream(table, count, entry, before, 0, DTYPE)
        w_at = g_at
        if WEIGHTED:
            w_at = stream(table, count, entry, before, 1, DTYPE)
        if in_vectors(g_at | w_at, begin, end, VECTOR):
            sums = _add_squares(sums, g_at, w_at, begin, end, WEIGHTED, DTYPE, VECTOR)
        else:
            sums = _add_squares(sums, g_at, w_at, begin, end, WEIGHTED, DTYPE, 1)
    tl.store(partial + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["partial", "count", "norm"])
def norm_kernel(partial: tl.pointer_type(tl.float64), count: tl.int64, norm: tl.pointer_type(tl.float64)):
    """norm <- the square root of the whole sum. One program; partial: float64 ``[count]``, norm: one float64."""
    tl.store(norm, tl.sqrt(total(partial, count)))


def sum_squares(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sums of squares of dense gradients, times weights where there are any, one per program."""
    first = grads[0]
    streams = tuple(stream_of(tensors) for tensors in (grads, weights) if tensors)
    table = table_on(
        first.device, Contents(lengths_of(grads), units_on(first.device, first.dtype, len(streams)), streams)
    )
    registers = registers_for(first.dtype)
    partial = torch.empty(programs(table, registers), dtype=torch.float64, device=first.device)
    launch_over(
        table,
        squares_kernel,
        partial,
        registers=registers,
        WEIGHTED=len(weights) > 0,
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
        launch(norm_kernel, first.device, 1, partial, len(partial), norm, registers=64)
    return norm
