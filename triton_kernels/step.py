"""The second launch of update_: one step of every element, or, where something was not finite, w as it was."""

import triton
import triton.language as tl

from .arithmetic import (
    CLIPPED,
    PLAIN,
    average,
    averaged_hessian,
    clipped,
    corrected,
    divided,
    moved,
    narrow,
    parts_of,
    root,
    second_average,
    square,
    times_plus,
    unperturbed,
)
from .counts import DECAY, FACTOR, STEP_SIZE, prepared, prepared_perturbation, record
from .running_squares import add_squares, no_squares, store_squares
from .settings import BETA1, CLIP_THRESHOLD, EPS, HESSIAN_POWER, MAXIMIZE, NESTEROV, setting
from .tiles import (
    NUMBER,
    UNIT,
    blocks_of,
    copy_of_blocks,
    entry_of,
    field,
    in_vectors,
    indices,
    load,
    load_of_blocks,
    place_of,
    store,
    stream,
    total,
)

# What a step does with D: reads it; averages products in, or the squares of the gradients; or has it by blocks, and
# finds it in exp_hessian or, where block_average_ has been there, in averaged.
READ = tl.constexpr(0)
OF_PRODUCTS = tl.constexpr(1)
OF_GRADIENTS = tl.constexpr(2)
BY_BLOCKS = tl.constexpr(3)


@triton.jit
def _restore_tile(
    w_at,
    backup_at,
    m_at,
    begin,
    end,
    perturbation,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    index = indices(UNITS, VECTOR)
    w = load(backup_at, begin, end, index, DTYPE, VECTOR)
    if DTYPE == STATE:  # noqa: SIM102 - which is known when it is compiled
        if perturbation == perturbation:
            w = unperturbed(w, load(m_at, begin, end, index, STATE, VECTOR), perturbation)
    store(w_at, begin, end, index, w, DTYPE, VECTOR)


@triton.jit
def _restore(table, count, tiles, of_rows, DTYPE: tl.constexpr, STATE: tl.constexpr, UNITS: tl.constexpr):
    """w <- backup, where that is not w itself; or what w' was moved from."""
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        w_at = stream(table, count, entry, before, 0, DTYPE)
        backup_at = stream(table, count, entry, before, 2, DTYPE)
        m_at = stream(table, count, entry, before, 3, STATE)
        perturbation = prepared_perturbation(of_rows, field(table, count, entry, NUMBER))
        if (w_at != backup_at) | (perturbation == perturbation):
            if in_vectors(w_at | backup_at | m_at, begin, end, VECTOR):
                _restore_tile(w_at, backup_at, m_at, begin, end, perturbation, DTYPE, STATE, UNITS, VECTOR)
            else:
                _restore_tile(w_at, backup_at, m_at, begin, end, perturbation, DTYPE, STATE, UNITS, 1)


@triton.jit
def _constants(settings, STATE: tl.constexpr):
    """What all elements of a step share: the factors of m in parts, how D is averaged, and what the direction needs."""
    beta1 = setting(settings, BETA1)
    maximize = setting(settings, MAXIMIZE) != 0.0
    averages = (parts_of(beta1, STATE), parts_of(tl.where(maximize, beta1 - 1.0, 1.0 - beta1), STATE))
    scaling = (
        setting(settings, EPS).to(STATE),
        setting(settings, HESSIAN_POWER),
        setting(settings, CLIP_THRESHOLD).to(STATE),
    )
    return averages, second_average(settings, STATE), scaling, maximize, setting(settings, NESTEROV) != 0.0


@triton.jit
def _second_average(
    D_at,
    H_at,
    shift,
    begin,
    end,
    index,
    g,
    how,
    SECOND: tl.constexpr,
    PRODUCT: tl.constexpr,
    STATE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """D as this step takes it, and written where it changes."""
    if SECOND == BY_BLOCKS:
        exp_hessian = load_of_blocks(H_at, begin, end, index, shift, STATE, VECTOR)
    else:
        exp_hessian = load(D_at, begin, end, index, STATE, VECTOR)
        if SECOND == OF_PRODUCTS:
            product = load(H_at, begin, end, index, PRODUCT, VECTOR).to(STATE)
            exp_hessian = averaged_hessian(exp_hessian, product, how, STATE)
            store(D_at, begin, end, index, exp_hessian, STATE, VECTOR)
        elif SECOND == OF_GRADIENTS:
            beta2, weight, _, _ = how
            exp_hessian = average(exp_hessian, beta2, square(g, STATE), weight, STATE)
            store(D_at, begin, end, index, exp_hessian, STATE, VECTOR)
    return exp_hessian


@triton.jit
def _update_tile(
    streams,
    shift,
    begin,
    end,
    of_rows,
    row,
    constants,
    KIND: tl.constexpr,
    SECOND: tl.constexpr,
    PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One step of a tile; returns m."""
    w_at, g_at, backup_at, m_at, D_at, H_at = streams
    (beta1, gradient_weight), how, (eps, power, threshold), maximize, nesterov = constants
    index = indices(UNITS, VECTOR)
    w = load(backup_at, begin, end, index, DTYPE, VECTOR).to(STATE)
    g = load(g_at, begin, end, index, DTYPE, VECTOR).to(STATE)
    exp_avg = load(m_at, begin, end, index, STATE, VECTOR)
    if DTYPE == STATE:
        perturbation = prepared_perturbation(of_rows, row)
        w = tl.where(perturbation == perturbation, unperturbed(w, exp_avg, perturbation), w)
    if KIND == PLAIN:
        g = times_plus(w, prepared(of_rows, row, DECAY), tl.where(maximize, -g, g), STATE)
        exp_avg = average(exp_avg, beta1, g, prepared(of_rows, row, FACTOR), STATE)
        store(m_at, begin, end, index, exp_avg, STATE, VECTOR)
        direction = tl.where(nesterov, times_plus(exp_avg, beta1, g, STATE), exp_avg)
        new = moved(w, direction, (1.0, 0.0), prepared(of_rows, row, STEP_SIZE), STATE)
    else:
        exp_avg = average(exp_avg, beta1, g, gradient_weight, STATE)
        store(m_at, begin, end, index, exp_avg, STATE, VECTOR)
        D = _second_average(D_at, H_at, shift, begin, end, index, g, how, SECOND, PRODUCT, STATE, VECTOR)
        if KIND == CLIPPED:
            direction = clipped(exp_avg, D, threshold, eps, STATE)
        else:
            D = corrected(D, prepared(of_rows, row, FACTOR), STATE)
            direction = divided(exp_avg, root(D, KIND, power, STATE) + eps, STATE)
        new = moved(w, direction, prepared(of_rows, row, DECAY), prepared(of_rows, row, STEP_SIZE), STATE)
    store(w_at, begin, end, index, narrow(new, DTYPE), DTYPE, VECTOR)
    return tl.reshape(exp_avg, (UNITS * UNIT,))


@triton.jit(
    do_not_specialize=[
        *("table", "count", "tiles", "partial", "partials", "steps", "second", "scalars", "skipped", "sums", "settings")
    ]
)
def update_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    partial: tl.pointer_type(tl.float64),
    partials: tl.int64,
    steps: tl.pointer_type(tl.int64),
    second: tl.int32,
    scalars: tl.int64,
    skipped: tl.pointer_type(tl.int64),
    sums: tl.pointer_type(tl.float64),
    settings: tl.pointer_type(tl.float64),
    KIND: tl.constexpr,
    SECOND: tl.constexpr,
    SUMS: tl.constexpr,
    PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""One step from :math:`w` = backup, unless the sum of partial is not finite: then w <- backup, skipped <- 1.

    .. math::
        D \leftarrow \beta_2 D + (1 - \beta_2) |H| \ \text{if OF_PRODUCTS}, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \quad
        w \leftarrow w (1 - \eta\lambda) - \frac{\eta}{c_1} \frac{m}{(D / c_2)^\alpha + \epsilon}

    or along what KIND says instead (csrc/math/sassha.h). Where scalars have a perturbation, w is worked out from w'.

    Streams, of any length: w, g and backup, which may be w, of DTYPE; m and, unless KIND is PLAIN, D, of STATE; if
    OF_PRODUCTS the products H, of PRODUCT; if BY_BLOCKS what is read in place of D, or D itself. steps, second and
    scalars as in inspect_kernel. Unless SUMS is UNSUMMED, sums[program] <- its share of the squares of m.
    Moves 24 bytes per float32 element, 32 if OF_PRODUCTS, 28 if OF_GRADIENTS, 20 if PLAIN; BY_BLOCKS 20, and 4 of a
    block, or where what is read in place of D is kept 8.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    finding = total(partial, partials)
    finite = finding - finding == 0.0
    if tl.program_id(0) == 0:
        tl.store(skipped, tl.where(finite, 0, 1))
    of_rows = scalars.to(tl.pointer_type(STATE))
    if finite:
        record(table, count, steps, second, settings)
        constants = _constants(settings, STATE)
        squares = no_squares(SUMS, UNITS)
        tiles_summed = 0
        for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
            entry = entry_of(table, count, tile)
            before, begin, end = place_of(table, count, entry, tile, UNITS)
            w_at = stream(table, count, entry, before, 0, DTYPE)
            g_at = stream(table, count, entry, before, 1, DTYPE)
            backup_at = stream(table, count, entry, before, 2, DTYPE)
            m_at = stream(table, count, entry, before, 3, STATE)
            D_at, H_at, shift = m_at, m_at, 0
            wide = w_at | g_at | backup_at | m_at
            if SECOND == BY_BLOCKS:
                D_at, shift = blocks_of(table, count, entry, before, 4, STATE)
                H_at, shift = blocks_of(table, count, entry, before, 5, STATE)
                if H_at != D_at:
                    copy_of_blocks(D_at, H_at, end, shift, STATE, UNITS)
            elif KIND != PLAIN:
                D_at = stream(table, count, entry, before, 4, STATE)
                if SECOND == OF_PRODUCTS:
                    H_at = stream(table, count, entry, before, 5, PRODUCT)
                wide |= D_at | H_at
            streams = (w_at, g_at, backup_at, m_at, D_at, H_at)
            row = field(table, count, entry, NUMBER)
            if in_vectors(wide, begin, end, VECTOR):
                m = _update_tile(
                    *(streams, shift, begin, end, of_rows, row, constants),
                    *(KIND, SECOND, PRODUCT, DTYPE, STATE, UNITS, VECTOR),
                )
            else:
                m = _update_tile(
                    *(streams, shift, begin, end, of_rows, row, constants),
                    *(KIND, SECOND, PRODUCT, DTYPE, STATE, UNITS, 1),
                )
            squares = add_squares(squares, tiles_summed, m, SUMS)
            tiles_summed += 1
        store_squares(squares, sums, table, count, tiles, SUMS, STATE, UNITS)
    else:
        _restore(table, count, tiles, of_rows, DTYPE, STATE, UNITS)
