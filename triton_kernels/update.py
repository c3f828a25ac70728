"""update_: the running averages and the weights, of a lazy step or a Hessian step, in one pass.

Two launches: inspect_kernel looks for what is not finite and works out what the elements of a parameter share;
update_kernel reads its findings. So nothing is written before everything was read, and the host waits for nothing.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import state_dtype
from .arithmetic import GENERAL, IDENTITY, SQUARE_ROOT, average, bias_correction, double, narrow, root, updated
from .checks import check_like, check_list, check_numbers, check_parts, check_scalar, check_tensor
from .launch import DTYPE_CODES, DTYPES, launch_over, programs, registers_for, units_on
from .lists import dense, has_memory, laid_out_like, write_back
from .table import Contents, Parts, Stream, lengths_of, numbers_on, parts_of, stream_of, table_on
from .tiles import NUMBER, UNIT, entry_of, field, in_vectors, indices, load, place_of, store, stream, total

POWERS = {0.5: SQUARE_ROOT.value, 1.0: IDENTITY.value}

# Rows of the counts that a program works on at a time.
ROWS = tl.constexpr(128)


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
def _next_counts(steps, row, inside, step_correction, HESSIAN: tl.constexpr):
    """The counts (step, hessian_step) of rows, the step being taken included."""
    step = tl.load(steps + 2 * row, mask=inside, other=0) + 1
    hessian_step = tl.load(steps + 2 * row + 1, mask=inside, other=1)
    if HESSIAN:
        hessian_step = tl.where(step_correction > 0, step, hessian_step + 1)
    return step, hessian_step


@triton.jit
def _prepare(steps, rows, scalars, lr, beta1, beta2, weight_decay, step_correction, HESSIAN: tl.constexpr):
    """scalars[:, row] <- decay, step size and Hessian correction of every row of the counts, for arithmetic.updated."""
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        step, hessian_step = _next_counts(steps, row, inside, step_correction, HESSIAN)
        decay = 1.0 - lr * weight_decay
        tl.store(scalars + row, decay + tl.zeros((ROWS,), tl.float64), mask=inside)
        tl.store(scalars + rows + row, lr / bias_correction(beta1, step), mask=inside)
        tl.store(scalars + 2 * rows + row, 1.0 / bias_correction(beta2, hessian_step), mask=inside)


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
        *("table", "count", "tiles", "given", "rates", "guards", "partial", "steps", "rows", "scalars"),
        *("lr", "beta1", "beta2", "weight_decay", "step_correction"),
    ]
)
def inspect_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    given: tl.pointer_type(tl.int64),
    rates: tl.int64,
    guards: tl.int64,
    partial: tl.pointer_type(tl.float64),
    steps: tl.pointer_type(tl.int64),
    rows: tl.int64,
    scalars: tl.pointer_type(tl.float64),
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    weight_decay: tl.float64,
    step_correction: tl.int64,
    HESSIAN: tl.constexpr,
    PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""partial[program] <- a number that is not finite if any element of the program's share, or any guard, is not.

    And scalars, float64 ``[3, rows]`` <- :math:`1 - \eta\lambda, \eta / c_1, 1 / c_2` for each row of the counts,
    steps, int64 ``[rows, 2]``.

    Streams: the gradients, of DTYPE, and if HESSIAN the products, of PRODUCT, of any length. given: the addresses and
    dtypes of one-element tensors, first the learning rate where it is one (rates is 1), then the guards. Reads 4 bytes
    per float32 element (8 if HESSIAN).
    """
    rate = double(lr)
    if rates > 0:
        rate = _value_of(tl.load(given), tl.load(given + 1))
    _prepare(steps, rows, scalars, rate, double(beta1), double(beta2), double(weight_decay), step_correction, HESSIAN)
    sums = tl.zeros((UNITS * UNIT,), STATE)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        sums = _inspect_stream(sums, table, count, entry, before, begin, end, 0, DTYPE, STATE)
        if HESSIAN:
            sums = _inspect_stream(sums, table, count, entry, before, begin, end, 1, PRODUCT, STATE)
    finding = tl.sum(sums, axis=0).to(tl.float64)
    if tl.program_id(0) == 0:
        for guard in range(rates, rates + guards):
            finding += 0.0 * _value_of(tl.load(given + 2 * guard), tl.load(given + 2 * guard + 1))
    tl.store(partial + tl.program_id(0), finding)


@triton.jit
def _record(table, count, steps, step_correction, HESSIAN: tl.constexpr):
    """The counts of every entry's row go up."""
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        entry = start + tl.arange(0, ROWS)
        inside = entry < count
        row = tl.load(table + NUMBER * count + entry, mask=inside, other=0)
        step, hessian_step = _next_counts(steps, row, inside, step_correction, HESSIAN)
        tl.store(steps + 2 * row, step, mask=inside)
        tl.store(steps + 2 * row + 1, hessian_step, mask=inside)


@triton.jit
def _restore_tile(w_at, backup_at, begin, end, DTYPE: tl.constexpr, UNITS: tl.constexpr, VECTOR: tl.constexpr):
    index = indices(UNITS, VECTOR)
    store(w_at, begin, end, index, load(backup_at, begin, end, index, DTYPE, VECTOR), DTYPE, VECTOR)


@triton.jit
def _restore(table, count, tiles, DTYPE: tl.constexpr, UNITS: tl.constexpr):
    """w <- backup"""
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        w_at = stream(table, count, entry, before, 0, DTYPE)
        backup_at = stream(table, count, entry, before, 2, DTYPE)
        if in_vectors(w_at | backup_at, begin, end, VECTOR):
            _restore_tile(w_at, backup_at, begin, end, DTYPE, UNITS, VECTOR)
        else:
            _restore_tile(w_at, backup_at, begin, end, DTYPE, UNITS, 1)


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
    beta1, gradient_weight, beta2, hessian_weight, eps, power = constants
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
    corrected = (exp_hessian.to(tl.float64) * correction).to(STATE)
    denominator = root(corrected, POWER, power, STATE) + eps.to(STATE)
    new = updated(w, exp_avg, denominator, decay, step_size, STATE)
    store(w_at, begin, end, index, narrow(new, DTYPE), DTYPE, VECTOR)


@triton.jit(
    do_not_specialize=[
        *("table", "count", "tiles", "partial", "partials", "steps", "rows", "scalars", "skipped"),
        *("beta1", "gradient_weight", "beta2", "hessian_weight", "eps", "power", "step_correction"),
    ]
)
def update_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    partial: tl.pointer_type(tl.float64),
    partials: tl.int64,
    steps: tl.pointer_type(tl.int64),
    rows: tl.int64,
    scalars: tl.pointer_type(tl.float64),
    skipped: tl.pointer_type(tl.int64),
    beta1: tl.float64,
    gradient_weight: tl.float64,
    beta2: tl.float64,
    hessian_weight: tl.float64,
    eps: tl.float64,
    power: tl.float64,
    step_correction: tl.int64,
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

    Streams, of any length: w, g and backup, of DTYPE, m and D, of STATE, and if HESSIAN the products H, of PRODUCT. The
    weights of the new terms are :math:`1 - \beta`, that of the gradient negative where the objective is maximised;
    steps and scalars as in inspect_kernel.
    Moves 24 bytes per float32 element, 32 if HESSIAN.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    finding = total(partial, partials)
    finite = finding - finding == 0.0
    if tl.program_id(0) == 0:
        tl.store(skipped, tl.where(finite, 0, 1))
    if finite:
        _record(table, count, steps, step_correction, HESSIAN)
        constants = (
            double(beta1),
            double(gradient_weight),
            double(beta2),
            double(hessian_weight),
            double(eps),
            double(power),
        )
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
            shared = (tl.load(scalars + row), tl.load(scalars + rows + row), tl.load(scalars + 2 * rows + row))
            if in_vectors(w_at | g_at | backup_at | m_at | D_at | H_at, begin, end, VECTOR):
                _update_tile(
                    streams, begin, end, shared, constants, POWER, HESSIAN, PRODUCT, DTYPE, STATE, UNITS, VECTOR
                )
            else:
                _update_tile(streams, begin, end, shared, constants, POWER, HESSIAN, PRODUCT, DTYPE, STATE, UNITS, 1)
    else:
        _restore(table, count, tiles, DTYPE, UNITS)


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    products: Sequence[Tensor],
    backup: Tensor,
    exp_avg: Tensor,
    exp_hessian: Tensor,
    steps: Tensor,
    skipped: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    guards: Sequence[Tensor],
    guard_grads: bool,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    hessian_power: float,
    step_correction: bool,
    maximize: bool,
) -> None:
    r"""One step from :math:`w` = backup; D only where products are given; nothing where a guard is not finite.

    As csrc/schema.cpp says.

    Raises:
        ValueError: arguments do not fit each other, before anything is written.
    """
    device = steps.device
    check_parts(params, offsets, exp_avg)
    check_like(params, "grads", grads)
    if params:
        check_list("params", params)
        if params[0].device != device:
            raise ValueError(f"params must be on {device}, as steps, got one on {params[0].device}")
        dtype, state = params[0].dtype, state_dtype(params[0])
    else:
        dtype, state = backup.dtype, exp_avg.dtype
    if products:
        check_like(params, "products", products, state)
    flats = (("backup", backup, dtype), ("exp_avg", exp_avg, state), ("exp_hessian", exp_hessian, state))
    for name, flat, kind in flats:
        check_tensor(name, flat, kind, device)
        if flat.numel() != exp_avg.numel():
            raise ValueError(f"{name} must have {exp_avg.numel()} elements, as exp_avg, got {flat.numel()}")
    check_tensor("steps", steps, torch.int64, device)
    if steps.dim() != 2 or steps.shape[1] != 2:
        raise ValueError(f"steps must have the rows (step, hessian_step), got shape {tuple(steps.shape)}")
    check_numbers("rows", params, rows, len(steps))
    if len(set(rows)) < len(rows):
        raise ValueError(f"rows must be distinct, got {list(rows)}")
    check_scalar("skipped", skipped, torch.int64, device)
    given = [*([] if lr_tensor is None else [lr_tensor]), *guards]
    for scalar in given:
        check_scalar("lr_tensor" if scalar is lr_tensor else "a guard", scalar, None, device)
    if not has_memory(steps):
        return
    weights = dense(params)
    gradients = laid_out_like(weights, grads)
    estimates = laid_out_like(weights, products) if products else []
    lengths = lengths_of(weights)
    hessian = len(products) > 0
    kinds = {
        "HESSIAN": hessian,
        "PRODUCT": DTYPES[products[0].dtype] if hessian else None,
        "DTYPE": DTYPES[dtype],
        "STATE": DTYPES[state],
    }

    inspected = (stream_of(gradients), *([stream_of(estimates)] if hessian else []))
    units = units_on(device, dtype, 1)
    table = table_on(device, Contents(lengths, units, inspected) if guard_grads else Contents((), units, ()))
    scalars_given = tuple(number for t in given for number in (t.data_ptr(), DTYPE_CODES[t.dtype]))
    partial = torch.empty(programs(table, registers_for(dtype)), dtype=torch.float64, device=device)
    scalars = torch.empty((3, len(steps)), dtype=torch.float64, device=device)
    launch_over(
        table,
        inspect_kernel,
        # By themselves: a loss is a new tensor in each step.
        numbers_on(device, scalars_given),
        0 if lr_tensor is None else 1,
        len(guards),
        partial,
        steps,
        len(steps),
        scalars,
        lr,
        beta1,
        beta2,
        weight_decay,
        int(step_correction),
        registers=registers_for(dtype),
        **kinds,
    )

    power = POWERS.get(hessian_power, GENERAL.value)
    starts = tuple(offsets)
    parts = tuple(parts_of(flat, starts) for flat in (backup, exp_avg, exp_hessian))
    streams: tuple[Stream | Parts, ...] = (stream_of(weights), stream_of(gradients), *parts, *inspected[1:])
    launch_over(
        table_on(device, Contents(lengths, units_on(device, dtype, len(streams)), streams, rows=tuple(rows))),
        update_kernel,
        partial,
        len(partial),
        steps,
        len(steps),
        scalars,
        skipped,
        beta1,
        beta1 - 1.0 if maximize else 1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        hessian_power,
        int(step_correction),
        registers=registers_for(dtype, state=True, general_power=power == GENERAL.value),
        POWER=power,
        **kinds,
    )
    write_back(params, weights)
