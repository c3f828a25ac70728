"""The second launch of update_: one step of every element, or, where something was not finite, w as it was."""

import triton
import triton.language as tl

from .arithmetic import average, corrected, divided, moved, narrow, parts_of, root
from .counts import DECAY, HESSIAN_CORRECTION, STEP_SIZE, prepared, record
from .settings import BETA1, BETA2, EPS, HESSIAN_POWER, MAXIMIZE, setting
from .tiles import NUMBER, entry_of, field, in_vectors, indices, load, place_of, store, stream, total


@triton.jit
def _restore_tile(w_at, backup_at, begin, end, DTYPE: tl.constexpr, UNITS: tl.constexpr, VECTOR: tl.constexpr):
    index = indices(UNITS, VECTOR)
    store(w_at, begin, end, index, load(backup_at, begin, end, index, DTYPE, VECTOR), DTYPE, VECTOR)


@triton.jit
def _restore(table, count, tiles, DTYPE: tl.constexpr, UNITS: tl.constexpr):
    """w <- backup, where that is not w itself."""
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        w_at = stream(table, count, entry, before, 0, DTYPE)
        backup_at = stream(table, count, entry, before, 2, DTYPE)
        if w_at != backup_at:
            if in_vectors(w_at | backup_at, begin, end, VECTOR):
                _restore_tile(w_at, backup_at, begin, end, DTYPE, UNITS, VECTOR)
            else:
                _restore_tile(w_at, backup_at, begin, end, DTYPE, UNITS, 1)


@triton.jit
def _constants(settings, STATE: tl.constexpr):
    """What all elements of a step share: the factors of the averages, in parts, and what stands in the denominator."""
    beta1, beta2 = setting(settings, BETA1), setting(settings, BETA2)
    gradient_weight = tl.where(setting(settings, MAXIMIZE) != 0.0, beta1 - 1.0, 1.0 - beta1)
    averages = (
        parts_of(beta1, STATE),
        parts_of(gradient_weight, STATE),
        parts_of(beta2, STATE),
        parts_of(1.0 - beta2, STATE),
    )
    return averages, setting(settings, EPS).to(STATE), setting(settings, HESSIAN_POWER)


@triton.jit
def _update_tile(
    streams,
    begin,
    end,
    scalars,
    constants,
    POWER: tl.constexpr,
    HESSIAN: tl.constexpr,
    PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    w_at, g_at, backup_at, exp_avg_at, exp_hessian_at, product_at = streams
    averages, eps, power = constants
    beta1, gradient_weight, beta2, hessian_weight = averages
    decay, step_size, correction = scalars
    index = indices(UNITS, VECTOR)
    w = load(backup_at, begin, end, index, DTYPE, VECTOR).to(STATE)
    g = load(g_at, begin, end, index, DTYPE, VECTOR).to(STATE)
    exp_avg = average(load(exp_avg_at, begin, end, index, STATE, VECTOR), beta1, g, gradient_weight, STATE)
    store(exp_avg_at, begin, end, index, exp_avg, STATE, VECTOR)
    exp_hessian = load(exp_hessian_at, begin, end, index, STATE, VECTOR)
    if HESSIAN:
        product = load(product_at, begin, end, index, PRODUCT, VECTOR).to(STATE)
        exp_hessian = average(exp_hessian, beta2, tl.abs(product), hessian_weight, STATE)
        store(exp_hessian_at, begin, end, index, exp_hessian, STATE, VECTOR)
    denominator = root(corrected(exp_hessian, correction, STATE), POWER, power, STATE) + eps
    new = moved(w, divided(exp_avg, denominator, STATE), decay, step_size, STATE)
    store(w_at, begin, end, index, narrow(new, DTYPE), DTYPE, VECTOR)


@triton.jit(
    do_not_specialize=[
        *("table", "count", "tiles", "partial", "partials", "steps", "scalars", "skipped", "settings"),
    ]
)
def update_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    partial: tl.pointer_type(tl.float64),
    partials: tl.int64,
    steps: tl.pointer_type(tl.int64),
    scalars: tl.int64,
    skipped: tl.pointer_type(tl.int64),
    settings: tl.pointer_type(tl.float64),
    POWER: tl.constexpr,
    HESSIAN: tl.constexpr,
    PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""One step from :math:`w` = backup, unless the sum of partial is not finite: then w <- backup, skipped <- 1.

    .. math::
        D \leftarrow \beta_2 D + (1 - \beta_2) |H| \ \text{if HESSIAN}, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \quad
        w \leftarrow w (1 - \eta\lambda) - \frac{\eta}{c_1} \frac{m}{(D / c_2)^\alpha + \epsilon}

    Streams, of any length: w, g and backup, which may be w, of DTYPE, m and D, of STATE, and if HESSIAN the products H,
    of PRODUCT. g counts with the other sign where the objective is maximised; steps and scalars as in inspect_kernel.
    Moves 24 bytes per float32 element, 32 if HESSIAN.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    finding = total(partial, partials)
    finite = finding - finding == 0.0
    if tl.program_id(0) == 0:
        tl.store(skipped, tl.where(finite, 0, 1))
    if finite:
        record(table, count, steps, settings, HESSIAN)
        constants = _constants(settings, STATE)
        of_rows = scalars.to(tl.pointer_type(STATE))
        for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
            entry = entry_of(table, count, tile)
            before, begin, end = place_of(table, count, entry, tile, UNITS)
            w_at = stream(table, count, entry, before, 0, DTYPE)
            g_at = stream(table, count, entry, before, 1, DTYPE)
            backup_at = stream(table, count, entry, before, 2, DTYPE)
            m_at = stream(table, count, entry, before, 3, STATE)
            D_at = stream(table, count, entry, before, 4, STATE)
            H_at = g_at
            if HESSIAN:
                H_at = stream(table, count, entry, before, 5, PRODUCT)
            streams = (w_at, g_at, backup_at, m_at, D_at, H_at)
            row = field(table, count, entry, NUMBER)
            shared = (
                prepared(of_rows, row, DECAY),
                prepared(of_rows, row, STEP_SIZE),
                prepared(of_rows, row, HESSIAN_CORRECTION),
            )
            if in_vectors(w_at | g_at | backup_at | m_at | D_at | H_at, begin, end, VECTOR):
                _update_tile(
                    streams, begin, end, shared, constants, POWER, HESSIAN, PRODUCT, DTYPE, STATE, UNITS, VECTOR
                )
            else:
                _update_tile(streams, begin, end, shared, constants, POWER, HESSIAN, PRODUCT, DTYPE, STATE, UNITS, 1)
    else:
        _restore(table, count, tiles, DTYPE, UNITS)
