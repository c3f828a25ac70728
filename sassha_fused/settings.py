"""The numbers that go with a call of an operator: csrc/math/settings.h has the same fields in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from .checks import BIAS_CORRECTIONS


class Settings(NamedTuple):
    """What all parameters of a call share. Modes are numbers too: 0 is false.

    Attributes:
        bias_correction: the index in BIAS_CORRECTIONS.
    """

    beta1: float
    beta2: float
    eps: float
    hessian_power: float
    adaptive: float
    maximize: float
    bias_correction: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> Settings:
        """Those of a parameter group."""
        beta1, beta2 = group["betas"]
        return cls(
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["hessian_power"]),
            float(group["adaptive"]),
            float(group["maximize"]),
            float(BIAS_CORRECTIONS.index(group["bias_correction"])),
        )


# Of a group, once it is accepted: equal where the Settings are, and quicker to compare.
shared_of = itemgetter("betas", *Settings._fields[2:])


class RowSettings(NamedTuple):
    """What each parameter has of its own: a row of per_row, ``[rows, 3]`` in the widest dtype of the device."""

    lr: float
    weight_decay: float
    rho: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> RowSettings:
        """Those of a parameter group; of a learning rate that is a tensor, which the host must not wait for, 0."""
        lr = group["lr"]
        return cls(0.0 if isinstance(lr, Tensor) else float(lr), float(group["weight_decay"]), float(group["rho"]))


def settings_of(numbers: Sequence[float]) -> Settings:
    """The settings by their names; ValueError where they are too many, too few, or of an unknown bias correction."""
    if len(numbers) != len(Settings._fields):
        raise ValueError(f"settings must be {len(Settings._fields)} numbers, got {len(numbers)}")
    settings = Settings(*numbers)
    if settings.bias_correction not in range(len(BIAS_CORRECTIONS)):
        raise ValueError(
            f"bias_correction must be the index of one of {BIAS_CORRECTIONS}, got {settings.bias_correction}"
        )
    return settings
