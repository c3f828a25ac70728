"""What is refused, before anything changes: each message names the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Integral, Real
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

# What c1 and c2 count; an operator takes the index.
BIAS_CORRECTIONS = ("step", "update", "none")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# They belong to the schedule and to the random signs, which are the optimizer's.
SHARED = ("hessian_interval", "hessian_warmup", "hessian_samples", "seed")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_number(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def _check_lr(lr: Any, wait: bool) -> None:
    if not isinstance(lr, Tensor):
        _check_number("lr", lr)
        return
    if lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(f"lr, if a tensor, must be one floating-point element, got {lr!r}")
    at_once = type(lr) is Tensor and lr.device.type == "cpu"
    if (wait or at_once) and not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be finite and >= 0, got {lr!r}")


def _check_betas(betas: Any) -> None:
    pair = list(betas) if isinstance(betas, Sequence) and not isinstance(betas, str) else []
    if len(pair) != 2 or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in pair):
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")


def check_integer(name: str, value: Any, smallest: int, bits: int = 63) -> None:
    """TypeError unless value is an integer, ValueError unless smallest <= value < 2^bits."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not smallest <= int(value) < 2**bits:
        raise ValueError(f"{name} must be an int >= {smallest} and < 2**{bits}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_hyperparameters(group: dict[str, Any], wait: bool = True) -> None:
    """Checks every hyperparameter of one parameter group; the value of a tensor, on its device, only if it may wait."""
    _check_lr(group["lr"], wait)
    for name in ("eps", "weight_decay", "rho"):
        _check_number(name, group[name])
    _check_betas(group["betas"])
    power = group["hessian_power"]
    if not _is_number(power) or not 0.0 < power <= 1.0:
        raise ValueError(f"hessian_power must be a number in (0, 1], got {power!r}")
    check_integer("hessian_interval", group["hessian_interval"], 1)
    check_integer("hessian_warmup", group["hessian_warmup"], 0)
    check_integer("hessian_samples", group["hessian_samples"], 1, bits=32)
    check_integer("seed", group["seed"], 0)
    check_choice("bias_correction", group["bias_correction"], BIAS_CORRECTIONS)
    for name in ("adaptive", "maximize"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be a bool, got {group[name]!r}")


def check_groups(groups: Sequence[dict[str, Any]], wait: bool = True) -> None:
    """Checks every hyperparameter of all groups, and that they share what belongs to the optimizer."""
    for group in groups:
        check_hyperparameters(group, wait)
        for name in SHARED:
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"{name} must be the same in all groups, got {groups[0][name]!r} in the first and {group[name]!r} "
                    "in another"
                )


_NUMBERS = ("lr", "eps", "weight_decay", "rho", "hessian_power")
values_of = itemgetter(*_NUMBERS, "betas", "adaptive", "maximize", "bias_correction", *SHARED)


def is_single(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step has but one pass: w' is w where rho is 0 in every group."""
    return not any(group["rho"] > 0 for group in groups)


class AcceptedGroups:
    """The groups as they were when they were last checked.

    Attributes:
        values: their hyperparameters; whoever edits a group, a scheduler for one, puts another object there.
        single: whether a step has but one pass.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.single = False
        self._corrections: list[str] = []

    def accept(self, groups: Sequence[dict[str, Any]], has_state: bool) -> None:
        """Accepts the groups as they are; raises TypeError or ValueError, and accepts nothing, where one is wrong."""
        check_groups(groups, wait=False)
        corrections = [group["bias_correction"] for group in groups]
        if has_state:
            check_same_corrections(self._corrections, corrections)
        for group in groups:
            _in_own_types(group)
        self.values = list(chain.from_iterable(map(values_of, groups)))
        self._corrections = corrections
        self.single = is_single(groups)


def check_same_corrections(before: Sequence[str], now: Sequence[str]) -> None:
    """ValueError where a group's state was counted for another bias correction."""
    for old, new in zip(before, now, strict=False):
        if old != new:
            raise ValueError(
                f"bias_correction cannot change from {old!r} to {new!r} once there is state, whose hessian_step counts "
                "what it says: make a new optimizer with it"
            )


def _in_own_types(group: dict[str, Any]) -> None:
    """Numbers and sequences of whatever library become Python's own, which a state_dict can hold safely."""
    for name in _NUMBERS:
        if not isinstance(group[name], Tensor) and type(group[name]) not in (int, float):
            group[name] = float(group[name])
    for name in SHARED:
        group[name] = int(group[name])
    group["betas"] = tuple(map(float, group["betas"]))


def check_parameter(param: Tensor) -> None:
    """Refuses parameters for which the method is not defined; frozen ones may be anything."""
    if not param.requires_grad:
        return
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


def refuse_grad_scaler(optimizer: object) -> None:
    """ValueError, after taking off the optimizer what a GradScaler leaves there and takes away if no error comes."""
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)
    raise ValueError(
        "GradScaler is not supported yet: its scale would stay in the Hessian. Use bfloat16 autocast, which needs no "
        "scaler, or GradScaler(enabled=False)"
    )
