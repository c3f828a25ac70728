"""What distinguishes the members of the family: a row of data for each, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch

from .checks import ASCENTS, BIAS_CORRECTIONS, SHARED
from .settings import DIRECTIONS, SECOND_AVERAGES, RowSettings, Settings


def _agrees(group: dict[str, Any]) -> None:
    """Any hyperparameters go together."""


def check_exact_restore(group: dict[str, Any]) -> None:
    """ValueError where w would have to be worked out from w' and cannot be."""
    if group["exact_restore"]:
        return
    if group.get("ascent", "momentum") != "momentum":
        raise ValueError("exact_restore=False needs ascent='momentum': along the gradient nothing tells w but a copy")
    if group["adaptive"]:
        raise ValueError("exact_restore=False does not go with adaptive=True, whose w cannot be worked out from w'")


@dataclass(frozen=True)
class Method:
    """One member's row. What a group says takes the place of what stands here.

    Attributes:
        ascent: what the perturbation points along, one of ASCENTS; None where there is none.
        second_average: what the second average is of, one of SECOND_AVERAGES; None where there is none.
        direction: one of DIRECTIONS.
        bias_correction: one of BIAS_CORRECTIONS.
        averages: the names of the averages in ``opt.state``.
        check: raises ValueError where hyperparameters of a group do not go together.
        names: the hyperparameters that a group has.
    """

    ascent: str | None = "gradient"
    second_average: str | None = "absolute"
    direction: str = "scaled"
    bias_correction: str = "step"
    averages: tuple[str, ...] = ("exp_avg", "exp_hessian")
    check: Callable[[dict[str, Any]], None] = _agrees
    names: tuple[str, ...] = ()

    @cached_property
    def takes_hessian(self) -> bool:
        """Whether the second average is of the Hessian."""
        return self.second_average not in (None, "gradient")

    @cached_property
    def states(self) -> tuple[str, ...]:
        """What ``opt.state`` holds of a parameter."""
        return ("step", *(["hessian_step"] if self.takes_hessian else []), *self.averages)

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The hyperparameters that have one value for all groups."""
        return tuple(name for name in SHARED if name in self.names)

    @cached_property
    def values_of(self) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
        """The hyperparameters of a group, the learning rate first."""
        return itemgetter("lr", *(name for name in self.names if name != "lr"))

    @cached_property
    def shared_of(self) -> Callable[[dict[str, Any]], Any]:
        """Of a group, once it is accepted: equal where the Settings are, and quicker to compare."""
        return itemgetter(*(name for name in self.names if name not in (*RowSettings._fields, *SHARED)))

    def along_momentum(self, group: dict[str, Any]) -> bool:
        """Whether the perturbation points along the first average, so that a step has one pass alone, at w'."""
        return bool(group.get("ascent", self.ascent) == "momentum")

    def check_dtype(self, dtype: torch.dtype, group: dict[str, Any], trained: bool = True) -> None:
        """ValueError where parameters of a group that are trained are too narrow for where its passes are taken."""
        if not trained or dtype in (torch.float64, torch.float32):
            return
        if not group.get("exact_restore", True):
            raise ValueError(
                f"exact_restore=False needs float64 or float32 parameters, got {dtype}, in which w worked out from w' "
                "would lose what a step changes"
            )
        if self.along_momentum(group) and group["adaptive"]:
            raise ValueError(f"adaptive=True along the momentum needs float64 or float32 parameters, got {dtype}")

    def settings_of(self, group: dict[str, Any]) -> Settings:
        """The Settings of a parameter group."""
        beta1, beta2 = group["betas"] if "betas" in group else (group["momentum"], 0.0)
        power = float(group.get("hessian_power", 1.0))
        squares = self.second_average in ("square", "gradient")
        return Settings(
            float(beta1),
            float(beta2),
            float(group.get("eps", 0.0)),
            power / 2 if squares else power,
            float(group.get("adaptive", False)),
            float(group["maximize"]),
            float(BIAS_CORRECTIONS.index(group.get("bias_correction", self.bias_correction))),
            float(ASCENTS.index(group.get("ascent", self.ascent or "gradient"))),
            float(SECOND_AVERAGES.index(self.second_average or "absolute")),
            float(DIRECTIONS.index(self.direction)),
            float(group.get("clip_threshold", 0.0)),
            # Without momentum torch.optim.SGD knows of no dampening.
            float(group.get("dampening", 0.0)) if beta1 > 0 else 0.0,
            float(group.get("nesterov", False)),
            float(group.get("hessian_block", 1)),
        )
