"""update_: the running averages and the weights, of a lazy step or a Hessian step, in one pass.

Two launches: inspect_kernel looks for what is not finite and works out what the elements of a parameter share;
update_kernel reads its findings. So nothing is written before everything was read, and the host waits for nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import has_memory
from ..settings import settings_of
from .arithmetic import GENERAL, IDENTITY, SQUARE_ROOT
from .checks import check_update
from .counts import SCALARS
from .inspection import inspect_kernel
from .launch import DTYPE_CODES, DTYPES, launch_over, programs, registers_for, units_on
from .lists import dense, laid_out_like, write_back
from .step import update_kernel
from .table import Contents, Parts, Stream, lengths_of, numbers_on, parts_of, stream_of, table_on

POWERS = {0.5: SQUARE_ROOT.value, 1.0: IDENTITY.value}


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    products: Sequence[Tensor],
    backup: Tensor | None,
    exp_avg: Tensor,
    exp_hessian: Tensor,
    steps: Tensor,
    skipped: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    guards: Sequence[Tensor],
    guard_grads: bool,
    per_row: Tensor,
    settings: Sequence[float],
) -> None:
    r"""One step from :math:`w` = backup, or without backup from params; nothing where a guard is not finite.

    D changes only where products are given. As csrc/schema.cpp says.

    Raises:
        ValueError: arguments do not fit each other, before anything is written.
    """
    shared = settings_of(settings)
    check_update(
        *(params, grads, products, backup, exp_avg, exp_hessian, steps, skipped, offsets, rows, layouts, guards),
        per_row,
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
    kinds = {
        "HESSIAN": len(products) > 0,
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
        numbers,
        registers=registers_for(dtype),
        **kinds,
    )

    power = POWERS.get(shared.hessian_power, GENERAL.value)
    starts = tuple(offsets)
    old = stream_of(weights) if backup is None else parts_of(backup, starts)
    state_parts = (parts_of(exp_avg, starts), parts_of(exp_hessian, starts))
    streams: tuple[Stream | Parts, ...] = (stream_of(weights), inspected[0], old, *state_parts, *inspected[1:])
    launch_over(
        table_on(device, Contents(lengths, units_on(device, dtype, len(streams)), streams, rows=tuple(rows))),
        update_kernel,
        partial,
        len(partial),
        steps,
        scalars.data_ptr(),
        skipped,
        numbers,
        registers=registers_for(dtype, state=True, general_power=power == GENERAL.value),
        POWER=power,
        **kinds,
    )
    write_back(params, weights)
