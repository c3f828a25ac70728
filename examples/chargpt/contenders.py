"""The optimizers compared.

Of AdamW's learning rates the best counts; each of the others has one setting. Sassha's rho is the better of .02 and .1,
tried with blocks on one seed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from sassha_fused import MSassha, SAMAdamW, Sassha

Contender = Callable[[list[nn.Parameter], int], torch.optim.Optimizer]  # from parameters and a seed

CURVATURE = {"hessian_power": 1.0, "bias_correction": "update", "hessian_interval": 10}


def adamw(parameters: list[nn.Parameter], seed: int, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def sam_adamw(parameters: list[nn.Parameter], seed: int, ascent: str) -> torch.optim.Optimizer:
    return SAMAdamW(parameters, lr=0.005, rho=0.1, ascent=ascent)


def sassha(parameters: list[nn.Parameter], seed: int, **options: object) -> torch.optim.Optimizer:
    return Sassha(parameters, lr=0.3, rho=0.02, **CURVATURE, **options, seed=seed)


def msassha(parameters: list[nn.Parameter], seed: int, **options: object) -> torch.optim.Optimizer:
    return MSassha(parameters, lr=0.4, rho=0.1, **CURVATURE, **options, seed=seed)


ADAMW, ADAMW_LR = "AdamW, lr", 0.005  # of .003, .005 and .01 the best
SAM_ADAMW, MSASSHA = "SAMAdamW, momentum", "MSassha"
FAMILY: dict[str, Contender] = {
    "SAMAdamW, gradient": partial(sam_adamw, ascent="gradient"),
    SAM_ADAMW: partial(sam_adamw, ascent="momentum"),
    "Sassha": sassha,
    "Sassha, blocks of 32": partial(sassha, hessian_block=32),
    MSASSHA: msassha,
    "MSassha, blocks of 32, no backup": partial(msassha, hessian_block=32, exact_restore=False),
}


def contenders(adamw_lrs: Sequence[float] = (ADAMW_LR,)) -> dict[str, Contender]:
    """AdamW at each of these learning rates, and the members of the family."""
    return {f"{ADAMW} {lr}": partial(adamw, lr=lr) for lr in adamw_lrs} | FAMILY
