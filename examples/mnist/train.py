"""Trains one model with one optimizer and records what the comparison needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, pi
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.memory import state_bytes
from examples.mnist.contenders import Contender
from examples.mnist.data import Digits
from examples.mnist.model import resnet
from examples.mnist.stopwatch import Stopwatch

BATCH = 50


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)  # of every step, before it
    train_losses: list[float] = field(default_factory=list)  # mean of these over every epoch
    test_losses: list[float] = field(default_factory=list)  # after every epoch
    accuracies: list[float] = field(default_factory=list)  # on the test digits, after every epoch
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    state_bytes: int = 0  # the most during a step
    weights: Tensor = field(default_factory=lambda: torch.empty(0))  # in the end

    @property
    def parameters(self) -> int:
        return self.weights.numel()


def train(
    contender: Contender, train_set: Digits, test_set: Digits, epochs: int, seed: int, epoch_done: Callable[[Run], None]
) -> Run:
    """In the digits' precision. The same seed gives the same first weights and batches, whatever the optimizer."""
    run = Run()
    model = resnet(seed).to(train_set.images.dtype)
    optimizer, step = contender(model, seed)
    parameters = list(model.parameters())
    rate = optimizer.param_groups[0]["lr"]
    order = torch.Generator().manual_seed(seed)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with run.stopwatch.passes():
            if not run.accuracies:  # in the first epoch, which is not timed
                run.state_bytes = max(run.state_bytes, state_bytes(optimizer, parameters))
            return cross_entropy(model(images), labels)

    with run.stopwatch.watching():
        for epoch in range(epochs):
            if epoch == 1:
                run.stopwatch.restart()
            batches = torch.randperm(len(train_set.labels), generator=order).split(BATCH)
            model.train()
            for number, batch in enumerate(batches):
                done = (epoch + number / len(batches)) / epochs
                optimizer.param_groups[0]["lr"] = rate * (1 + cos(pi * done)) / 2
                digits = train_set.images[batch], train_set.labels[batch]
                with run.stopwatch.step():
                    value = step(lambda digits=digits: loss(*digits))
                run.losses.append(value.item())
            run.train_losses.append(mean(run.losses[-len(batches) :]))
            test_loss, accuracy = evaluate(model, test_set)
            run.test_losses.append(test_loss)
            run.accuracies.append(accuracy)
            epoch_done(run)
    run.weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return run


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    logits = torch.cat([model(images) for images in digits.images.split(500)])
    accuracy = (logits.argmax(1) == digits.labels).float().mean()
    return cross_entropy(logits, digits.labels).item(), accuracy.item()
