"""The counts (step, hessian_step) of parameters: where they go in a step, and the scalars that follow from them."""

import triton
import triton.language as tl

from .arithmetic import BY_STEP, correction_of
from .tiles import NUMBER

# Rows of the counts that a program works on at a time.
ROWS = tl.constexpr(128)


@triton.jit
def _next_counts(steps, row, inside, bias_correction, HESSIAN: tl.constexpr):
    """The counts (step, hessian_step) of rows, the step being taken included."""
    step = tl.load(steps + 2 * row, mask=inside, other=0) + 1
    hessian_step = tl.load(steps + 2 * row + 1, mask=inside, other=1)
    if HESSIAN:
        hessian_step = tl.where(bias_correction == BY_STEP, step, hessian_step + 1)
    return step, hessian_step


@triton.jit
def prepare(steps, rows, scalars, lr, beta1, beta2, weight_decay, bias_correction, HESSIAN: tl.constexpr):
    """scalars[:, row] <- decay, step size and Hessian correction of every row of the counts, for arithmetic.updated."""
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        step, hessian_step = _next_counts(steps, row, inside, bias_correction, HESSIAN)
        decay = 1.0 - lr * weight_decay
        tl.store(scalars + row, decay + tl.zeros((ROWS,), tl.float64), mask=inside)
        tl.store(scalars + rows + row, lr / correction_of(beta1, step, bias_correction), mask=inside)
        tl.store(scalars + 2 * rows + row, 1.0 / correction_of(beta2, hessian_step, bias_correction), mask=inside)


@triton.jit
def record(table, count, steps, bias_correction, HESSIAN: tl.constexpr):
    """The counts of every entry's row go up."""
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        entry = start + tl.arange(0, ROWS)
        inside = entry < count
        row = tl.load(table + NUMBER * count + entry, mask=inside, other=0)
        step, hessian_step = _next_counts(steps, row, inside, bias_correction, HESSIAN)
        tl.store(steps + 2 * row, step, mask=inside)
        tl.store(steps + 2 * row + 1, hessian_step, mask=inside)
