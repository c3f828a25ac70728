"""update_: the running averages and the weights in one pass.

Two launches: inspect_kernel looks for what is not finite and works out what the elements of a parameter share;
update_kernel reads its findings. So nothing is written before everything was read, and the host waits for nothing.
A third one, of a single program, where the norm of exp_avg is asked for, whose squares update_kernel sums on the way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import has_memory
from ..settings import DIRECTIONS, SECOND_AVERAGES, Settings, settings_of
from .arithmetic import CLIPPED, GENERAL, IDENTITY, PLAIN, SQUARE_ROOT
from .checks import check_update
from .counts import SCALARS
from .inspection import inspect_kernel
from .launch import DTYPE_CODES, DTYPES, launch_over, programs, quick_float64, registers_for, units_on
from .lists import dense, laid_out_like, write_back
from .norm import finish_norm
from .running_squares import IN_FLOAT32, IN_FLOAT64, UNSUMMED
from .step import BY_BLOCKS, OF_GRADIENTS, OF_PRODUCTS, READ, update_kernel
from .table import Contents, Parts, Stream, blocks_at, lengths_of, numbers_on, parts_of, stream_of, table_on

_POWERS = {0.5: SQUARE_ROOT.value, 1.0: IDENTITY.value}


def kind_of(settings: Settings) -> int:
    """Where a step leads, of the kinds that have a kernel of their own."""
    direction = DIRECTIONS[int(settings.direction)]
    if direction == "plain":
        return int(PLAIN.value)
    return int(CLIPPED.value if direction == "clipped" else _POWERS.get(settings.hessian_power, GENERAL.value))


def second_of(settings: Settings, products: Sequence[Tensor], averaged: Tensor | None) -> int:
    """What a step does with D."""
    if DIRECTIONS[int(settings.direction)] == "plain":
        return int(READ.value)
    if averaged is not None or settings.hessian_block > 1:
        return int(BY_BLOCKS.value)
    if SECOND_AVERAGES[int(settings.second_average)] == "gradient":
        return int(OF_GRADIENTS.value)
    return int(OF_PRODUCTS.value if products else READ.value)


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    products: Sequence[Tensor],
    averaged: Tensor | None,
    backup: Tensor | None,
    norm: Tensor | None,
    exp_avg: Tensor,
    exp_hessian: Tensor | None,
    exp_avg_norm: Tensor | None,
    steps: Tensor,
    skipped: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    blocked: int,
    guards: Sequence[Tensor],
    guard_grads: bool,
    per_row: Tensor,
    settings: Sequence[float],
) -> None:
    r"""One step from :math:`w` = backup, or from params; nothing where a guard is not finite. As csrc/schema.cpp says.

    Raises:
        ValueError: arguments do not fit each other, before anything is written.
    """
    shared = settings_of(settings)
    check_update(
        *(params, grads, products, averaged, backup, norm, exp_avg, exp_hessian, exp_avg_norm, steps, skipped),
        *(offsets, rows, layouts, blocked, guards, per_row, shared),
    )
    if not has_memory(steps):
        return
    device = steps.device
    dtype, state = params[0].dtype if params else exp_avg.dtype, exp_avg.dtype
    weights = dense(params)
    gradients = laid_out_like(weights, grads)
    estimates = laid_out_like(weights, products) if products else []
    lengths = lengths_of(weights)
    inspected = (stream_of(gradients), *([stream_of(estimates)] if products else []))
    numbers = numbers_on(device, shared, torch.float64)
    kind, second = kind_of(shared), second_of(shared, products, averaged)
    writes = int(len(products) > 0 or averaged is not None or second == OF_GRADIENTS.value)
    kinds = {
        "PRODUCT": DTYPES[products[0].dtype] if products else None,
        "DTYPE": DTYPES[dtype],
        "STATE": DTYPES[state],
    }

    units = units_on(device, dtype, 1)
    table = table_on(device, Contents(lengths, units, inspected) if guard_grads else Contents((), units, ()))
    # By themselves: a loss is a new tensor in each step.
    guarding = numbers_on(device, tuple(n for t in guards for n in (t.data_ptr(), DTYPE_CODES[t.dtype])), torch.int64)
    partial = torch.empty(programs(table, registers_for(dtype)), dtype=torch.float64, device=device)
    scalars = torch.empty((len(steps), SCALARS), dtype=state, device=device)
    launch_over(
        table,
        inspect_kernel,
        guarding,
        len(guards),
        partial,
        steps,
        len(steps),
        per_row,
        scalars.data_ptr(),
        0 if norm is None else norm.data_ptr(),
        writes,
        numbers,
        registers=registers_for(dtype),
        **kinds,
    )

    starts = tuple(offsets)
    old = stream_of(weights) if backup is None else parts_of(backup, starts)
    streams: list[Stream | Parts] = [stream_of(weights), inspected[0], old, parts_of(exp_avg, starts)]
    shifts: tuple[int, ...] = ()
    if second == BY_BLOCKS.value and exp_hessian is not None:
        taken = exp_hessian if averaged is None else averaged
        parts, shifts = blocks_at((exp_hessian, taken), offsets, int(shared.hessian_block), blocked)
        streams += parts
    elif kind != PLAIN.value and exp_hessian is not None:
        streams += [parts_of(exp_hessian, starts), *inspected[1:]]
    units = units_on(device, dtype, len(streams))
    table = table_on(device, Contents(lengths, units, tuple(streams), rows=tuple(rows), shifts=shifts))
    summed = exp_avg_norm is not None
    registers = registers_for(dtype, state=True, general_power=kind == GENERAL.value, squares=summed)
    how, sums = UNSUMMED.value, partial
    if summed:
        how = (IN_FLOAT64 if state == torch.float64 or quick_float64(device) else IN_FLOAT32).value
        sums = torch.empty(programs(table, registers), dtype=torch.float64, device=device)
    launch_over(
        table,
        update_kernel,
        partial,
        len(partial),
        steps,
        writes,
        scalars.data_ptr(),
        skipped,
        sums,
        numbers,
        registers=registers,
        KIND=kind,
        SECOND=second,
        SUMS=how,
        **kinds,
    )
    if exp_avg_norm is not None:
        finish_norm(sums, exp_avg_norm, skipped)
    write_back(params, weights)
