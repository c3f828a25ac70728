"""The four optimizers compared.

Their settings were chosen alike, by three-fold cross-validation over the 1,000 training digits (20 epochs, cosine decay
of the learning rate): of 18 settings each, the lowest validation loss among those within 0.2 points of the best
accuracy. Tried were all of
- Sassha: lr .05 .15 .3 with rho .05 .1 .2 and weight decay .001; lr .1 .2 .4 with rho .2 and weight decay .01 .05 .2;
- AdamW: lr .001 .003 .01 with weight decay .01 .1 1; lr .003 .01 .03 with weight decay 1 2 4;
- SGD: lr .03 .1 .3 with weight decay .0005 .002 .01; lr .1 .3 1 with weight decay .01 .02 .05; momentum .9.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sassha_fused import Sassha, running_stats_once
from tests.support.reference import ReferenceSassha

Loss = Callable[[], Tensor]
Step = Callable[[Loss], Tensor]  # one step with the function that computes the loss; returns that loss
Contender = Callable[[nn.Module, int], tuple[torch.optim.Optimizer, Step]]  # from a model and a seed

SASSHA = {"lr": 0.4, "weight_decay": 0.05, "rho": 0.2}
ADAMW = {"lr": 0.03, "weight_decay": 1.0}
SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}


def fused(model: nn.Module, seed: int, backend: str = "cpu") -> tuple[torch.optim.Optimizer, Step]:
    optimizer = Sassha(model.parameters(), **SASSHA, seed=seed, backend=backend)
    running_stats_once(model, optimizer)
    return optimizer, optimizer.step


def eager(model: nn.Module, seed: int) -> tuple[torch.optim.Optimizer, Step]:
    return fused(model, seed, "eager")


def loop(model: nn.Module, seed: int) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = ReferenceSassha(model.parameters(), **SASSHA, seed=seed)
    running_stats_once(model, optimizer)
    return optimizer, optimizer.step


def adamw(model: nn.Module, seed: int) -> tuple[torch.optim.Optimizer, Step]:
    return one_pass(torch.optim.AdamW(model.parameters(), **ADAMW))


def sgd(model: nn.Module, seed: int) -> tuple[torch.optim.Optimizer, Step]:
    return one_pass(torch.optim.SGD(model.parameters(), **SGD))


def one_pass(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, Step]:
    """The optimizers of torch leave clearing gradients and backward to the caller."""

    def step(loss: Loss) -> Tensor:
        def closure() -> Tensor:
            value = loss()
            value.backward()
            return value

        optimizer.zero_grad()
        return optimizer.step(closure)

    return optimizer, step


FUSED, EAGER, LOOP = "Sassha (cpu)", "Sassha (eager)", "Sassha (per-tensor loop)"
CONTENDERS: dict[str, Contender] = {FUSED: fused, LOOP: loop, "AdamW": adamw, "SGD": sgd}
