"""What is refused, before anything changes: each message names the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The operators take the index of one.
BIAS_CORRECTIONS = ("step", "update", "none")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def _check_lr(lr: Any) -> None:
    if not isinstance(lr, Tensor):
        _check_number("lr", lr)
        return
    if lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(f"lr, if a tensor, must be one floating-point element, got {lr!r}")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be finite and >= 0, got {lr!r}")


def check_integer(name: str, value: Any, smallest: int, bits: int = 63) -> None:
    """TypeError unless value is an int, ValueError unless smallest <= value < 2^bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not smallest <= value < 2**bits:
        raise ValueError(f"{name} must be an int >= {smallest} and < 2**{bits}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Checks every hyperparameter of one parameter group."""
    _check_lr(group["lr"])
    for name in ("eps", "weight_decay", "rho"):
        _check_number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
    for beta in betas:
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0.0 <= beta < 1.0:
            raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
    power = group["hessian_power"]
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0.0 < power <= 1.0:
        raise ValueError(f"hessian_power must be a number in (0, 1], got {power!r}")
    check_integer("hessian_interval", group["hessian_interval"], 1)
    check_integer("hessian_warmup", group["hessian_warmup"], 0)
    check_integer("hessian_samples", group["hessian_samples"], 1, bits=32)
    check_integer("seed", group["seed"], 0)
    check_choice("bias_correction", group["bias_correction"], BIAS_CORRECTIONS)
    for name in ("adaptive", "maximize"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be a bool, got {group[name]!r}")


def check_parameter(param: Tensor) -> None:
    """Refuses parameters for which the method is not defined."""
    if param.is_complex():
        raise ValueError(f"params: complex parameters are not supported, got {param.dtype}; use torch.view_as_real")
    if param.layout != torch.strided:
        raise ValueError(f"params: sparse parameters are not supported, got layout {param.layout}")
    if param.dtype not in DTYPES:
        supported = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"params: dtype must be one of {supported}, got {param.dtype}")


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raises ValueError for the first gradient that does not fit its parameter."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        where = f"the gradient of parameter {i}, of shape {tuple(param.shape)},"
        if grad.layout != torch.strided:
            raise ValueError(f"{where} is sparse ({grad.layout}): use dense gradients (sparse=False in nn.Embedding)")
        if param.dtype != params[0].dtype:
            raise ValueError(f"parameter {i} has dtype {param.dtype}, the others of its list {params[0].dtype}")
        for name in ("shape", "dtype", "device"):
            expected, got = getattr(param, name), getattr(grad, name)
            if got != expected:
                raise ValueError(f"{where} has {name} {got} instead of the parameter's {expected}")
