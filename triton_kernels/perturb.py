"""perturb_: the weights are saved and moved to w', where the second gradient is taken."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import has_memory, state_dtype
from ..settings import settings_of
from .arithmetic import inverse_norm, narrow, perturbed
from .checks import check_perturb
from .launch import DTYPES, launch_over, registers_for, units_on
from .lists import dense, laid_out_like, write_back
from .norm import sum_squares
from .settings import RHO, row_setting
from .table import Contents, lengths_of, numbers_on, parts_of, stream_of, table_on
from .tiles import NUMBER, entry_of, field, in_vectors, indices, load, place_of, store, stream, total


@triton.jit
def _perturb_tile(
    w_at,
    g_at,
    backup_at,
    begin,
    end,
    scale,
    finite,
    ADAPTIVE: tl.constexpr,
    ALONG: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    index = indices(UNITS, VECTOR)
    w = load(w_at, begin, end, index, DTYPE, VECTOR)
    g = load(g_at, begin, end, index, ALONG, VECTOR)
    if w_at != backup_at:
        store(backup_at, begin, end, index, w, DTYPE, VECTOR)
    if finite:
        moved = perturbed(w.to(STATE), g.to(STATE), scale, ADAPTIVE)
        store(w_at, begin, end, index, narrow(moved, DTYPE), DTYPE, VECTOR)


@triton.jit(do_not_specialize=["table", "count", "tiles", "partial", "partials", "norm", "per_row", "settings"])
def perturb_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    partial: tl.pointer_type(tl.float64),
    partials: tl.int64,
    norm: tl.pointer_type(tl.float64),
    per_row: tl.pointer_type(tl.float64),
    settings: tl.pointer_type(tl.float64),
    ADAPTIVE: tl.constexpr,
    ALONG: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""backup <- w; :math:`w \leftarrow w + \rho g / (N + 10^{-12})`, times :math:`w^2` if ADAPTIVE.

    Streams, of any length: w, of DTYPE, g, of ALONG, and backup, which may be w, of DTYPE. N is in norm; or, where
    there are partial sums of squares, it is worked out of them and put there. Where it is not finite, w stays. rho:
    that of the tensor's row of per_row, float64 ``[rows, 3]``; negated where the objective is maximised, or where the
    ascent is along exp_avg, whose parts g then are.
    Moves 16 bytes per float32 element, 12 where backup is w.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if partials > 0:
        # Every program finishes the norm for itself, all to the same bits: a launch of its own would take longer.
        size = tl.sqrt(total(partial, partials))
        if tl.program_id(0) == 0:
            tl.store(norm, size)
    else:
        size = tl.load(norm)
    finite = size - size == 0.0
    inverse = inverse_norm(size, settings)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        w_at = stream(table, count, entry, before, 0, DTYPE)
        g_at = stream(table, count, entry, before, 1, ALONG)
        backup_at = stream(table, count, entry, before, 2, DTYPE)
        scale = (row_setting(per_row, field(table, count, entry, NUMBER), RHO) * inverse).to(STATE)
        if in_vectors(w_at | g_at | backup_at, begin, end, VECTOR):
            _perturb_tile(
                w_at, g_at, backup_at, begin, end, scale, finite, ADAPTIVE, ALONG, DTYPE, STATE, UNITS, VECTOR
            )
        else:
            _perturb_tile(w_at, g_at, backup_at, begin, end, scale, finite, ADAPTIVE, ALONG, DTYPE, STATE, UNITS, 1)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor | None,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    norm: Tensor,
    measure: bool,
    per_row: Tensor,
    settings: Sequence[float],
) -> None:
    r"""backup <- w, where there is one; :math:`w \leftarrow w + \epsilon^*` (csrc/schema.cpp).

    Raises:
        ValueError: arguments do not fit each other, before anything is written.
    """
    shared = settings_of(settings)
    check_perturb(params, grads, backup, offsets, rows, layouts, norm, per_row, shared)
    if not params:
        return
    first = params[0]
    if not has_memory(first):
        return
    adaptive = shared.adaptive != 0
    weights = dense(params)
    gradients = laid_out_like(weights, grads)
    partial = sum_squares(gradients, weights if adaptive else []) if measure else norm.reshape(1)
    old = stream_of(weights) if backup is None else parts_of(backup, tuple(offsets))
    streams = (stream_of(weights), stream_of(gradients), old)
    units = units_on(first.device, first.dtype, len(streams))
    launch_over(
        table_on(first.device, Contents(lengths_of(weights), units, streams, rows=tuple(rows))),
        perturb_kernel,
        partial,
        len(partial) if measure else 0,
        norm,
        per_row,
        numbers_on(first.device, shared, torch.float64),
        registers=registers_for(first.dtype),
        ADAPTIVE=adaptive,
        ALONG=DTYPES[grads[0].dtype],
        DTYPE=DTYPES[first.dtype],
        STATE=DTYPES[state_dtype(first)],
    )
    write_back(params, weights)
