"""What is refused of an operator's arguments before anything is computed: kernels read any address they are given.

All raise ValueError. csrc/arguments.h checks the same for the compiled backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import DTYPES, check_gradients
from ..layout import block_index, check_layouts, state_dtype
from ..settings import DIRECTIONS, SECOND_AVERAGES, RowSettings, Settings, dtype_along
from .table import UNIT


def check_list(name: str, tensors: Sequence[Tensor]) -> None:
    """All tensors are dense and have one dtype, that of parameters, and one device."""
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    for i, t in enumerate(tensors):
        if t.dtype != dtype or t.device != device:
            raise ValueError(f"{name}: tensor {i} is {t.dtype} on {t.device}, the first one {dtype} on {device}")
        if t.layout is not torch.strided:
            raise ValueError(f"{name}: tensor {i} is sparse: {t.layout}")


def check_like(params: Sequence[Tensor], name: str, tensors: Sequence[Tensor], *dtypes: torch.dtype) -> None:
    """There is one tensor per parameter, of its shape and device; all have its dtype, or one of those asked for."""
    if len(tensors) != len(params):
        raise ValueError(f"{name}: expected {len(params)} tensors, one per parameter, got {len(tensors)}")
    if not tensors:
        return
    check_list(name, tensors)
    fits = tensors[0].dtype in (dtypes or (params[0].dtype,)) and tensors[0].device == params[0].device
    for i, (param, t) in enumerate(zip(params, tensors, strict=True)):
        if not fits or t.shape != param.shape:
            check_gradients(params, tensors, *dtypes[-1:])
            raise ValueError(f"{name}: tensor {i} does not fit its parameter: {t.dtype}, {tuple(t.shape)}, {t.device}")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> None:
    """It has this dtype, if any is asked for, is on the device, and is contiguous."""
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as the first tensor, got one on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_scalar(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> None:
    """It has one element, of this dtype, or of any that parameters may have."""
    check_tensor(name, tensor, dtype, device)
    if tensor.numel() != 1:
        raise ValueError(f"{name} must have one element, got {tensor.numel()}")
    if dtype is None and tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")


def check_parts(tensors: Sequence[Tensor], offsets: Sequence[int], flat: Tensor) -> None:
    """The parts that begin at these offsets of a flat buffer hold the tensors, and begin where units may."""
    if len(offsets) != len(tensors):
        raise ValueError(f"offsets: expected {len(tensors)}, one per tensor, got {len(offsets)}")
    ends = [after if after > offset else flat.numel() for offset, after in zip(offsets, [*offsets[1:], 0])]
    for i, (t, offset, end) in enumerate(zip(tensors, offsets, ends)):
        if offset < 0 or offset % UNIT != 0:
            raise ValueError(f"offsets must be multiples of {UNIT}, got {offset}")
        if offset + t.numel() > end:
            raise ValueError(f"tensor {i}, of {t.numel()} elements, does not fit its part of the state at {offset}")


def check_numbers(name: str, tensors: Sequence[Tensor], numbers: Sequence[int], end: int) -> None:
    """There is one number per tensor, from 0 to below an end."""
    if len(numbers) != len(tensors):
        raise ValueError(f"{name}: expected {len(tensors)}, one per tensor, got {len(numbers)}")
    for number in numbers:
        if not 0 <= number < end:
            raise ValueError(f"{name} must be at least 0 and below {end}, got {number}")


def check_rows(tensors: Sequence[Tensor], rows: Sequence[int], per_row: Tensor, device: torch.device) -> None:
    """Each tensor has a row of per_row, whose rows hold what RowSettings names."""
    check_tensor("per_row", per_row, torch.float64, device)
    if per_row.dim() != 2 or per_row.shape[1] != len(RowSettings._fields):
        raise ValueError(f"per_row must have rows of {len(RowSettings._fields)} numbers, got {tuple(per_row.shape)}")
    check_numbers("rows", tensors, rows, len(per_row))


def check_perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor | None,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    norm: Tensor,
    per_row: Tensor,
    settings: Settings,
) -> None:
    """ValueError where the arguments of perturb_ do not fit each other."""
    if backup is not None:
        check_parts(params, offsets, backup)
    along = dtype_along(params, settings)
    check_like(params, "grads", grads, *([along] if along else []))
    check_rows(params, rows, per_row, norm.device)
    check_layouts(params, layouts, backup)
    if not params:
        return
    check_list("params", params)
    first = params[0]
    if settings.adaptive and grads[0].dtype != first.dtype:
        raise ValueError(f"adaptive needs params of the dtype of exp_avg, along which they go, got {first.dtype}")
    if backup is not None:
        check_tensor("backup", backup, first.dtype, first.device)
    check_scalar("norm", norm, torch.float64, first.device)


def _check_blocked(blocked: int, end: int | None = None) -> None:
    if blocked < 0 or blocked % UNIT != 0 or (end is not None and blocked > end):
        raise ValueError(f"blocked must be a multiple of {UNIT} from 0 to the end of the state, got {blocked}")


def check_block_average(
    products: Sequence[Tensor],
    exp_hessian: Tensor,
    averaged: Tensor,
    offsets: Sequence[int],
    blocked: int,
    settings: Settings,
) -> None:
    """ValueError where the arguments of block_average_ do not fit each other."""
    if len(offsets) != len(products):
        raise ValueError(f"offsets: expected {len(products)}, one per tensor, got {len(offsets)}")
    if averaged.numel() != exp_hessian.numel():
        raise ValueError(f"averaged must have {exp_hessian.numel()} elements, as exp_hessian, got {averaged.numel()}")
    _check_blocked(blocked)
    for i, (t, offset) in enumerate(zip(products, offsets)):
        if offset < 0 or offset % UNIT != 0:
            raise ValueError(f"offsets must be multiples of {UNIT}, got {offset}")
        last = block_index(offset + t.numel() - 1, int(settings.hessian_block), blocked)
        if t.numel() > 0 and last >= exp_hessian.numel():
            raise ValueError(f"tensor {i}, of {t.numel()} elements, does not fit its part of the state at {offset}")
    if not products:
        return
    check_list("products", products)
    for name, flat in (("exp_hessian", exp_hessian), ("averaged", averaged)):
        check_tensor(name, flat, state_dtype(products[0]), products[0].device)


def _check_second(
    products: Sequence[Tensor],
    averaged: Tensor | None,
    exp_avg: Tensor,
    exp_hessian: Tensor | None,
    blocked: int,
    settings: Settings,
) -> None:
    """What D is and what changes it fit each other, and the settings."""
    plain = DIRECTIONS[int(settings.direction)] == "plain"
    if exp_hessian is None and not plain:
        raise ValueError("exp_hessian is missing")
    if plain and (products or averaged is not None):
        raise ValueError("a plain direction takes no products")
    if products and settings.hessian_block > 1:
        raise ValueError("products come by blocks, as averaged")
    if settings.hessian_block > 1 and SECOND_AVERAGES[int(settings.second_average)] == "gradient":
        raise ValueError("squares of gradients have no blocks")
    if exp_hessian is not None:
        _check_blocked(blocked, exp_avg.numel())
        expected = block_index(exp_avg.numel(), int(settings.hessian_block), blocked)
        if exp_hessian.numel() != expected:
            raise ValueError(f"exp_hessian must have {expected} elements, as exp_avg says, got {exp_hessian.numel()}")
        check_tensor("exp_hessian", exp_hessian, exp_avg.dtype, exp_avg.device)
    if averaged is not None:
        if products or exp_hessian is None or averaged.numel() != exp_hessian.numel():
            raise ValueError("averaged must have as many elements as exp_hessian, and does not go with products")
        check_tensor("averaged", averaged, exp_avg.dtype, exp_avg.device)


def check_update(
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
    per_row: Tensor,
    settings: Settings,
) -> None:
    """ValueError where the arguments of update_ do not fit each other."""
    device = steps.device
    check_parts(params, offsets, exp_avg)
    check_like(params, "grads", grads)
    check_layouts(params, layouts, exp_avg)
    dtype, state = None, exp_avg.dtype
    if params:
        check_list("params", params)
        dtype, state = params[0].dtype, state_dtype(params[0])
    if products:
        check_like(params, "products", products, dtype or state, state)
    check_tensor("exp_avg", exp_avg, state, device)
    _check_second(products, averaged, exp_avg, exp_hessian, blocked, settings)
    if backup is not None:
        check_tensor("backup", backup, dtype, device)
        if backup.numel() != exp_avg.numel():
            raise ValueError(f"backup must have {exp_avg.numel()} elements, as exp_avg, got {backup.numel()}")
    if norm is not None:
        check_scalar("norm", norm, torch.float64, device)
        if backup is not None or settings.adaptive or (params and dtype != state):
            raise ValueError("norm goes neither with backup nor with adaptive, and needs params of exp_avg's dtype")
    if exp_avg_norm is not None:
        check_scalar("exp_avg_norm", exp_avg_norm, torch.float64, device)
        if products or DIRECTIONS[int(settings.direction)] == "clipped":
            raise ValueError("exp_avg_norm goes neither with products nor with a clipped direction")
        of_gradients = SECOND_AVERAGES[int(settings.second_average)] == "gradient"
        if of_gradients and exp_hessian is not None and settings.hessian_power != 0.5:
            raise ValueError("exp_avg_norm goes with squares of gradients at the power 0.5 alone")
    check_tensor("steps", steps, torch.int64, device)
    if steps.dim() != 2 or steps.shape[1] != 2:
        raise ValueError(f"steps must have the rows (step, hessian_step), got shape {tuple(steps.shape)}")
    check_rows(params, rows, per_row, device)
    if len(per_row) != len(steps):
        raise ValueError(f"per_row must have {len(steps)} rows, as steps, got {len(per_row)}")
    if len(set(rows)) < len(rows):
        raise ValueError(f"rows must be distinct, got {list(rows)}")
    check_scalar("skipped", skipped, torch.int64, device)
    for guard in guards:
        check_scalar("a guard", guard, None, device)
