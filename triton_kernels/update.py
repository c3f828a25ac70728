"""update_: the running averages and the weights, of a lazy step or a Hessian step, in one pass.

Two launches: inspect_kernel looks for what is not finite and works out what the elements of a parameter share;
update_kernel reads its findings. So nothing is written before everything was read, and the host waits for nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import BIAS_CORRECTIONS
from ..layout import state_dtype
from .arithmetic import GENERAL, IDENTITY, SQUARE_ROOT
from .checks import check_like, check_list, check_numbers, check_parts, check_scalar, check_tensor
from .inspection import inspect_kernel
from .launch import DTYPE_CODES, DTYPES, launch_over, programs, registers_for, units_on
from .lists import dense, has_memory, laid_out_like, write_back
from .step import update_kernel
from .table import Contents, Parts, Stream, lengths_of, numbers_on, parts_of, stream_of, table_on

POWERS = {0.5: SQUARE_ROOT.value, 1.0: IDENTITY.value}


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
    bias_correction: int,
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
    if bias_correction not in range(len(BIAS_CORRECTIONS)):
        raise ValueError(f"bias_correction must be the index of one of {BIAS_CORRECTIONS}, got {bias_correction}")
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
        bias_correction,
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
        bias_correction,
        registers=registers_for(dtype, state=True, general_power=power == GENERAL.value),
        POWER=power,
        **kinds,
    )
    write_back(params, weights)
