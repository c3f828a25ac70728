"""The counts (step, hessian_step) of parameters: where they go in a step, and the scalars that follow from them."""

import triton
import triton.language as tl

from .arithmetic import BY_STEP, correction_of, parts_of
from .settings import BETA1, BETA2, BIAS_CORRECTION, LR, WEIGHT_DECAY, row_setting, setting
from .tiles import NUMBER

# Rows of the counts that a program works on at a time.
ROWS = tl.constexpr(128)

# What is worked out for a row, each in two parts, high and low.
DECAY = tl.constexpr(0)
STEP_SIZE = tl.constexpr(2)
HESSIAN_CORRECTION = tl.constexpr(4)
SCALARS = 6
_SCALARS = tl.constexpr(SCALARS)


@triton.jit
def _next_counts(steps, row, inside, settings, HESSIAN: tl.constexpr):
    """The counts (step, hessian_step) of rows, the step being taken included."""
    step = tl.load(steps + 2 * row, mask=inside, other=0) + 1
    hessian_step = tl.load(steps + 2 * row + 1, mask=inside, other=1)
    if HESSIAN:
        hessian_step = tl.where(setting(settings, BIAS_CORRECTION) == BY_STEP, step, hessian_step + 1)
    return step, hessian_step


@triton.jit
def _put(scalars, row, inside, SCALAR: tl.constexpr, value, STATE: tl.constexpr):
    high, low = parts_of(value, STATE)
    at = scalars + row * _SCALARS + SCALAR
    tl.store(at, high, mask=inside)
    tl.store(at + 1, low, mask=inside)


@triton.jit
def prepare(steps, rows, per_row, scalars, settings, HESSIAN: tl.constexpr, STATE: tl.constexpr):
    r"""scalars[row] <- :math:`1 - \eta\lambda, \eta / c_1, 1 / c_2` in two parts each, for every row of the counts."""
    correction = setting(settings, BIAS_CORRECTION)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        step, hessian_step = _next_counts(steps, row, inside, settings, HESSIAN)
        lr = row_setting(per_row, row, LR, inside)
        weight_decay = row_setting(per_row, row, WEIGHT_DECAY, inside)
        step_size = lr / correction_of(setting(settings, BETA1), step, correction)
        hessian_correction = 1.0 / correction_of(setting(settings, BETA2), hessian_step, correction)
        _put(scalars, row, inside, DECAY, 1.0 - lr * weight_decay, STATE)
        _put(scalars, row, inside, STEP_SIZE, step_size, STATE)
        _put(scalars, row, inside, HESSIAN_CORRECTION, hessian_correction, STATE)


@triton.jit
def prepared(scalars, row, SCALAR: tl.constexpr):
    """A scalar of a row, in its two parts."""
    at = scalars + row * _SCALARS + SCALAR
    return tl.load(at), tl.load(at + 1)


@triton.jit
def record(table, count, steps, settings, HESSIAN: tl.constexpr):
    """The counts of every entry's row go up."""
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        entry = start + tl.arange(0, ROWS)
        inside = entry < count
        row = tl.load(table + NUMBER * count + entry, mask=inside, other=0)
        step, hessian_step = _next_counts(steps, row, inside, settings, HESSIAN)
        tl.store(steps + 2 * row, step, mask=inside)
        tl.store(steps + 2 * row + 1, hessian_step, mask=inside)
