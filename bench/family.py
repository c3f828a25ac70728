"""The members of the family, each with the implementations by others that do the same.

Each asks autograd for its own products and draws its own signs. What pytorch_optimizer compiles is left out: that takes
a minute a row.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from bench.peers import (
    Make,
    of_loop,
    of_pytorch_optimizer,
    of_pytorch_optimizer_sam,
    of_sassha_fused,
    of_torch,
    of_torchzero,
)

OURS, LOOP = "sassha_fused", "per-tensor loop"
LR, RHO, MOMENTUM, DECAY = 1e-4, 0.05, 0.9, 0.01
BASES = {"SAMSGD": torch.optim.SGD, "SAMAdamW": torch.optim.AdamW}
OPTIONS: dict[str, dict[str, Any]] = {
    "SAMSGD": {"lr": LR, "momentum": MOMENTUM},
    "SAMAdamW": {"lr": LR, "weight_decay": DECAY},
}


def installed(name: str) -> ModuleType | None:
    with suppress(ImportError):
        return importlib.import_module(name)
    return None


PACKAGES = {name: installed(name) for name in ("pytorch_optimizer", "torchzero")}


@dataclass(frozen=True)
class Row:
    """A member with its settings, and who does the same.

    Attributes:
        steps: of one round, all that lie between two Hessian evaluations.
        bases: those of the contenders that do less, in as many passes: what the member adds its idea to.
    """

    title: str
    steps: int
    contenders: dict[str, Make]
    bases: tuple[str, ...] = ()


def rows() -> list[Row]:
    return [
        *(_with_hessian(member, k) for member in ("Sassha", "MSassha", "AdaHessian", "SophiaH") for k in (1, 10)),
        *map(_with_two_passes, BASES),
        *map(_along_momentum, BASES),
    ]


def _with_hessian(member: str, interval: int) -> Row:
    options = {"lr": LR, "weight_decay": 0.0}
    contenders = _ours_and_loop(member, hessian_interval=interval, **options)
    if theirs := getattr(PACKAGES["pytorch_optimizer"], member, None):
        make = partial(of_pytorch_optimizer, theirs, interval, hessian_distribution="rademacher", **options)
        contenders["pytorch_optimizer"] = make(foreach=False)
        contenders["pytorch_optimizer, foreach"] = make(foreach=True)
    tz = PACKAGES["torchzero"]
    if tz and member in ("AdaHessian", "SophiaH"):
        own = {"averaging": False} if member == "AdaHessian" else {}
        module = partial(getattr(tz.m, member), update_freq=interval, distribution="rademacher", **own)
        contenders["torchzero"] = of_torchzero(tz, module, partial(tz.m.LR, LR))
    return Row(f"{member}, k = {interval}", interval, contenders)


def _with_two_passes(member: str) -> Row:
    options = OPTIONS[member]
    contenders = _ours_and_loop(member, rho=RHO, **options)
    if theirs := PACKAGES["pytorch_optimizer"]:
        make = partial(of_pytorch_optimizer_sam, theirs.SAM, BASES[member], rho=RHO, **options)
        contenders["pytorch_optimizer, foreach"] = make(foreach=True)
        contenders["pytorch_optimizer, fused base"] = make(fused=True)
    if tz := PACKAGES["torchzero"]:
        sam, lr = partial(tz.m.SAM, RHO), partial(tz.m.LR, LR)
        contenders["torchzero"] = of_torchzero(tz, sam, *_descent(tz, member), lr)
    return Row(f"{member}, two passes", 1, contenders)


def _along_momentum(member: str) -> Row:
    options = OPTIONS[member]
    contenders = _ours_and_loop(member, rho=RHO, ascent="momentum", **options)
    # torchzero's MSAM, which takes any optimizer, AdamW too, raises at its first step.
    if member == "SAMSGD" and (tz := PACKAGES["torchzero"]):
        contenders["torchzero"] = of_torchzero(tz, partial(tz.m.MSAMMomentum, LR, momentum=MOMENTUM, rho=RHO))
    bases = {f"torch, {how}": of_torch(BASES[member], **{how: True}, **options) for how in ("fused", "foreach")}
    return Row(f"{member}, along the momentum", 1, contenders | bases, tuple(bases))


def _ours_and_loop(member: str, **options: Any) -> dict[str, Make]:
    return {OURS: of_sassha_fused(member, **options), LOOP: of_loop(member, **options)}


def _descent(tz: ModuleType, member: str) -> list[Any]:
    """The modules that are SGD with momentum, or AdamW, but for the learning rate."""
    if member == "SAMSGD":
        return [partial(tz.m.HeavyBall, MOMENTUM)]
    return [tz.m.Adam, partial(tz.m.WeightDecay, DECAY)]
