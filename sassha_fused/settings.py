"""The numbers that go with a call of an operator: csrc/math/settings.h has the same fields in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import ASCENTS, BIAS_CORRECTIONS, BLOCKS
from .layout import state_dtype

# What modes mean by their index, as csrc/math/sassha.h has them.
SECOND_AVERAGES = ("absolute", "square", "signed", "gradient")
DIRECTIONS = ("scaled", "clipped", "plain")


class Settings(NamedTuple):
    """What all parameters of a call share. Modes are numbers too: 0 is false.

    Attributes:
        beta1: of exp_avg; SGD's momentum.
        bias_correction, ascent, second_average, direction: indices in BIAS_CORRECTIONS, ASCENTS, SECOND_AVERAGES and
            DIRECTIONS.
        clip_threshold: of a clipped direction, the factor of exp_hessian.
        dampening, nesterov: of a plain direction, as in torch.optim.SGD.
        hessian_block: how many elements share one of exp_hessian: a power of 2, at most 128.
    """

    beta1: float
    beta2: float
    eps: float
    hessian_power: float
    adaptive: float
    maximize: float
    bias_correction: float
    ascent: float
    second_average: float
    direction: float
    clip_threshold: float
    dampening: float
    nesterov: float
    hessian_block: float


class RowSettings(NamedTuple):
    """What each parameter has of its own: a row of per_row, ``[rows, 3]`` in the widest dtype of the device."""

    lr: float
    weight_decay: float
    rho: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> RowSettings:
        """Those of a parameter group; of a learning rate that is a tensor, which the host must not wait for, 0."""
        lr = group["lr"]
        number = 0.0 if isinstance(lr, Tensor) else float(lr)
        return cls(number, float(group["weight_decay"]), float(group.get("rho", 0.0)))


# The fields that are an index, and what they are the index of.
_MODES = {
    "bias_correction": BIAS_CORRECTIONS,
    "ascent": ASCENTS,
    "second_average": SECOND_AVERAGES,
    "direction": DIRECTIONS,
}


def settings_of(numbers: Sequence[float]) -> Settings:
    """The settings by their names; ValueError where they are too many, too few, or of an unknown mode."""
    if len(numbers) != len(Settings._fields):
        raise ValueError(f"settings must be {len(Settings._fields)} numbers, got {len(numbers)}")
    settings = Settings(*numbers)
    for name, choices in _MODES.items():
        if (mode := getattr(settings, name)) not in range(len(choices)):
            raise ValueError(f"{name} must be the index of one of {choices}, got {mode}")
    if settings.hessian_block not in BLOCKS:
        raise ValueError(f"hessian_block must be one of {BLOCKS}, got {settings.hessian_block}")
    return settings


def dtype_along(params: Sequence[Tensor], settings: Settings) -> torch.dtype | None:
    """The dtype of what a perturbation of these points along: where that is exp_avg the state's, else their own."""
    return state_dtype(params[0]) if params and ASCENTS[int(settings.ascent)] == "momentum" else None
