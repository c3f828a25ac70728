"""What is refused, before anything changes: each message names the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .method import Method

# What c1 and c2 count; of this and the next an operator takes the index.
BIAS_CORRECTIONS = ("step", "update", "none")
# What the perturbation points along: up the gradient, or along the first average of the gradients, ahead of the step.
ASCENTS = ("gradient", "momentum")
# How many elements of a parameter may share one of the Hessian's average.
BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# They belong to the schedule, to the random signs and to where the passes are taken, which are the optimizer's.
SCHEDULE = ("hessian_interval", "hessian_warmup", "hessian_samples", "hessian_batches", "seed")
SHARED = (*SCHEDULE, "ascent", "exact_restore")


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


def _check_betas(name: str, betas: Any) -> None:
    pair = list(betas) if isinstance(betas, Sequence) and not isinstance(betas, str) else []
    if len(pair) != 2 or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in pair):
        raise ValueError(f"{name} must be a pair of numbers in [0, 1), got {betas!r}")


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


def _check_power(name: str, value: Any) -> None:
    if not _is_number(value) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def _check_fraction(name: str, value: Any) -> None:
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def _check_batches(name: str, value: Any) -> None:
    if value is not None:
        check_integer(name, value, smallest=1)


def _check_block(name: str, value: Any) -> None:
    check_integer(name, value, smallest=1)
    if value not in BLOCKS:
        raise ValueError(f"{name} must be one of {', '.join(map(str, BLOCKS))}, got {value!r}")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "eps": _check_number,
    "weight_decay": _check_number,
    "rho": _check_number,
    "clip_threshold": _check_number,
    "betas": _check_betas,
    "momentum": _check_fraction,
    "dampening": _check_fraction,
    "nesterov": _check_bool,
    "ascent": partial(check_choice, choices=ASCENTS),
    "exact_restore": _check_bool,
    "hessian_block": _check_block,
    "hessian_power": _check_power,
    "hessian_interval": partial(check_integer, smallest=1),
    "hessian_warmup": partial(check_integer, smallest=0),
    "hessian_samples": partial(check_integer, smallest=1, bits=32),
    "hessian_batches": _check_batches,
    "seed": partial(check_integer, smallest=0),
    "bias_correction": partial(check_choice, choices=BIAS_CORRECTIONS),
    "adaptive": _check_bool,
    "maximize": _check_bool,
}


def check_hyperparameters(
    group: dict[str, Any], names: Sequence[str], wait: bool = True, accepted: dict[str, Any] | None = None
) -> None:
    """Checks the hyperparameters of one parameter group.

    Args:
        names: of the hyperparameters that it must have.
        wait: whether a learning rate that is a tensor is waited for, on its device.
        accepted: the group as it was checked before; what is still the same object is not checked again.
    """
    try:
        if accepted is None or isinstance(group["lr"], Tensor) or group["lr"] is not accepted["lr"]:
            _check_lr(group["lr"], wait)
        for name in names:
            if name != "lr" and (accepted is None or group[name] is not accepted[name]):
                _CHECKS[name](name, group[name])
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing in a parameter group: put it back") from None


def foreign_names(group: dict[str, Any], method: Method) -> list[str]:
    """Hyperparameters of other members of the family."""
    return sorted((group.keys() & _CHECKS.keys()) - set(method.names))


def check_groups(
    groups: Sequence[dict[str, Any]],
    method: Method,
    wait: bool = True,
    accepted: Sequence[dict[str, Any] | None] = (),
) -> None:
    """Checks the hyperparameters of all groups, and that they share what belongs to the optimizer."""
    for group, known in zip_longest(groups, accepted[: len(groups)]):
        for name in foreign_names(group, method):
            raise ValueError(f"{name} is no hyperparameter of this optimizer, got {group[name]!r} in a parameter group")
        check_hyperparameters(group, method.names, wait, known)
        method.check(group)
        for name in method.shared:
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"{name} must be the same in all groups, got {groups[0][name]!r} in the first and {group[name]!r} "
                    "in another"
                )


def is_single(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step has but one pass: w' is w where rho is 0 in every group."""
    return not any(group.get("rho", 0.0) > 0 for group in groups)


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


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError for the first gradient that does not fit its parameter, or has another dtype than asked for."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        where = f"the gradient of parameter {i}, of shape {tuple(param.shape)},"
        if grad.layout != torch.strided:
            raise ValueError(f"{where} is sparse ({grad.layout}): use dense gradients (sparse=False in nn.Embedding)")
        if param.dtype != params[0].dtype:
            raise ValueError(f"parameter {i} has dtype {param.dtype}, the others of its list {params[0].dtype}")
        for name in ("shape", "dtype", "device"):
            expected, got = getattr(param, name), getattr(grad, name)
            if name == "dtype":
                expected = dtype or expected
            if got != expected:
                raise ValueError(f"{where} has {name} {got} instead of the parameter's {expected}")


def refuse_unperturbed(groups: Sequence[dict[str, Any]], along_momentum: bool) -> None:
    """ValueError: the gradients are those at w, and the step takes those at w'."""
    rho = max(group["rho"] for group in groups)
    way = "before the backward" if along_momentum else "after the first backward and run a second one"
    raise ValueError(
        f"step() without perturb(), though rho is {rho}: the step takes its gradients at w', not at w. Give step() a "
        f"closure, or call perturb() {way}; or set rho to 0 in every group, and nothing is perturbed. In a Trainer of "
        "transformers: sassha_fused.huggingface.two_pass(trainer)"
    )
