"""Trains one model with each optimizer and records what the comparison needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from examples.chargpt.contenders import Contender
from examples.chargpt.model import GPT, gpt
from examples.chargpt.text import Batch, Text
from examples.memory import state_bytes

WARMUP = 0.1  # of the steps
LARGEST_NORM = 1.0
VALIDATE_EVERY = 100


@dataclass
class Run:
    parameters: int
    losses: dict[int, float] = field(default_factory=dict)  # on the validation text, after so many steps
    seconds: float = 0.0  # in all steps
    state_bytes: int = 0

    @property
    def final(self) -> float:
        return self.losses[max(self.losses)]


class Learner:
    """A model and its optimizer."""

    def __init__(self, contender: Contender, model: GPT, steps: int, seed: int) -> None:
        self.model = model
        self.parameters = list(self.model.parameters())
        self.optimizer = contender(self.parameters, seed)
        self.scheduler = LambdaLR(self.optimizer, lambda step: schedule(step, steps))
        self.run = Run(sum(parameter.numel() for parameter in self.parameters))

    def loss(self, batch: Batch) -> Tensor:
        characters, following = batch
        return cross_entropy(self.model(characters).flatten(0, 1), following.flatten())

    def step(self, batch: Batch) -> None:
        """The same loop for every optimizer: the gradients of each pass are clipped, Hessian products are not."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)  # in place, so that gradients keep their graph
            return loss

        start = perf_counter()
        self.optimizer.step(closure)
        self.run.seconds += perf_counter() - start
        self.scheduler.step()

    @torch.no_grad()
    def validate(self, step: int, batches: list[Batch]) -> None:
        self.run.losses[step] = torch.stack([self.loss(batch) for batch in batches]).mean().item()
        self.run.state_bytes = state_bytes(self.optimizer, self.parameters)


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: a linear warm-up, then a cosine to 0."""
    done = step / steps
    return (step + 1) / (WARMUP * steps + 1) if done < WARMUP else (1 + cos(pi * (done - WARMUP) / (1 - WARMUP))) / 2


def train(
    contenders: Mapping[str, Contender],
    text: Text,
    steps: int,
    deviation: float,
    seed: int,
    step_done: Callable[[], object],
) -> dict[str, Run]:
    """The same seed gives the same first weights and batches, whatever the optimizer; embeddings start with deviation.

    Optimizers take turns step by step, so that a machine whose speed varies is as slow for one as for the other.
    """
    learners = {
        name: Learner(contender, gpt(text.characters, deviation, seed), steps, seed)
        for name, contender in contenders.items()
    }
    generator = torch.Generator().manual_seed(seed)
    validation = text.validation_batches()
    for step in range(1, steps + 1):
        batch = text.random_batch(generator)
        for learner in learners.values():
            learner.step(batch)
            if step % VALIDATE_EVERY == 0 or step == steps:
                learner.validate(step, validation)
            step_done()
    return {name: learner.run for name, learner in learners.items()}
