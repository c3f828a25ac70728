"""The counts (step, hessian_step) of parameters: where they go in a step, and the scalars that follow from them."""

import triton
import triton.language as tl

from .arithmetic import correction_of, inverse_norm, parts_of
from .settings import (
    BETA1,
    BETA2,
    BIAS_CORRECTION,
    BY_STEP,
    DAMPENING,
    DIRECTION,
    IN_PLAIN_DIRECTION,
    LR,
    RHO,
    WEIGHT_DECAY,
    row_setting,
    setting,
)
from .tiles import NUMBER

# Rows of the counts that a program works on at a time.
ROWS = tl.constexpr(128)

# What is worked out for a row: UpdateScalars in csrc/math/sassha.h. All but the last are in two parts, high and low.
DECAY = tl.constexpr(0)
STEP_SIZE = tl.constexpr(2)
FACTOR = tl.constexpr(4)
PERTURBATION = tl.constexpr(6)
SCALARS = 7
_SCALARS = tl.constexpr(SCALARS)


@triton.jit
def _next_counts(steps, row, inside, second, settings):
    """The counts (step, hessian_step) of rows, the step being taken included; second: whether it writes D."""
    step = tl.load(steps + 2 * row, mask=inside, other=0) + 1
    hessian_step = tl.load(steps + 2 * row + 1, mask=inside, other=1)
    if second != 0:
        hessian_step = tl.where(setting(settings, BIAS_CORRECTION) == BY_STEP, step, hessian_step + 1)
    return step, hessian_step


@triton.jit
def _put(scalars, row, inside, SCALAR: tl.constexpr, value, STATE: tl.constexpr):
    high, low = parts_of(value, STATE)
    at = scalars + row * _SCALARS + SCALAR
    tl.store(at, high, mask=inside)
    tl.store(at + 1, low, mask=inside)


@triton.jit
def prepare(steps, rows, per_row, scalars, norm, second, settings, STATE: tl.constexpr):
    r"""scalars[row] <- what the elements of a parameter share in this step, for every row of the counts.

    :math:`1 - \eta\lambda, \eta / c_1, 1 / c_2`, or of a plain direction :math:`\lambda, \eta` and the factor of the
    gradient; and the factor of m in :math:`\epsilon^*`, NaN where w is not worked out from w'. norm: the address of N,
    or 0.
    """
    inverse = tl.full((), float("nan"), tl.float64)
    if norm != 0:
        size = tl.load(norm.to(tl.pointer_type(tl.float64)))
        inverse = tl.where(size - size == 0.0, inverse_norm(size, settings), inverse)
    correction = setting(settings, BIAS_CORRECTION)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        step, hessian_step = _next_counts(steps, row, inside, second, settings)
        lr = row_setting(per_row, row, LR, inside)
        weight_decay = row_setting(per_row, row, WEIGHT_DECAY, inside)
        if setting(settings, DIRECTION) == IN_PLAIN_DIRECTION:
            decay, step_size = weight_decay, lr
            factor = tl.where(step == 1, 1.0, 1.0 - setting(settings, DAMPENING))
        else:
            decay = 1.0 - lr * weight_decay
            step_size = lr / correction_of(setting(settings, BETA1), step, correction)
            factor = 1.0 / correction_of(setting(settings, BETA2), hessian_step, correction)
        _put(scalars, row, inside, DECAY, decay, STATE)
        _put(scalars, row, inside, STEP_SIZE, step_size, STATE)
        _put(scalars, row, inside, FACTOR, factor, STATE)
        perturbation = (row_setting(per_row, row, RHO, inside) * inverse).to(STATE)
        tl.store(scalars + row * _SCALARS + PERTURBATION, perturbation, mask=inside)


@triton.jit
def prepared(scalars, row, SCALAR: tl.constexpr):
    """A scalar of a row, in its two parts."""
    at = scalars + row * _SCALARS + SCALAR
    return tl.load(at), tl.load(at + 1)


@triton.jit
def prepared_perturbation(scalars, row):
    """The factor of m in the perturbation of a row, NaN where w is not worked out from w'."""
    return tl.load(scalars + row * _SCALARS + PERTURBATION)


@triton.jit
def record(table, count, steps, second, settings):
    """The counts of every entry's row go up."""
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        entry = start + tl.arange(0, ROWS)
        inside = entry < count
        row = tl.load(table + NUMBER * count + entry, mask=inside, other=0)
        step, hessian_step = _next_counts(steps, row, inside, second, settings)
        tl.store(steps + 2 * row, step, mask=inside)
        tl.store(steps + 2 * row + 1, hessian_step, mask=inside)
