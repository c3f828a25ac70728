"""Lightning's training of the problems of the tests, and the plain loops that it is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.problems import Problem, weights

BATCHES = 7  # in an epoch


def import_lightning() -> Any:
    """Not imported before it is needed: that takes seconds."""
    return pytest.importorskip("lightning", reason="lightning is not installed (requirements-dev.txt, frameworks)")


class Resumable:
    """The numbers of the batches, as a loader that goes on in the middle of an epoch."""

    def __init__(self) -> None:
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        self.done %= BATCHES
        while self.done < BATCHES:
            self.done += 1
            yield self.done - 1

    def __len__(self) -> int:
        return BATCHES

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def module_of(problem: Problem, **methods: Callable[..., Any]) -> Any:
    """The problem as a LightningModule, with some methods of its own."""

    class Module(import_lightning().LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = problem.model
            self.automatic_optimization = "training_step" not in methods

        def training_step(self, batch: int, index: int) -> Tensor:
            return loss_of(problem, batch)

        def configure_optimizers(self) -> Any:
            return problem.opt

    for name, method in methods.items():
        setattr(Module, name, method)
    return Module()


def fit(problem: Problem, tmp_path: Any, module: Any = None, checkpoint: Any = None, **options: Any) -> Any:
    """Trains it, for two epochs unless options say otherwise; returns the trainer."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = import_lightning().Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options}
    )
    trainer.fit(module_of(problem) if module is None else module, Resumable(), ckpt_path=checkpoint)
    return trainer


def loss_of(problem: Problem, batch: int) -> Tensor:
    problem.steps = int(batch)
    return problem.loss()


def snapshot(problem: Problem) -> dict[str, Any]:
    """Weights and whole state."""
    return {"weights": weights(problem.params), **copy.deepcopy(problem.opt.state_dict())}


def groups_of_batches(count: int) -> list[Sequence[int]]:
    """The batches of each step of an epoch."""
    return [range(BATCHES)[i : i + count] for i in range(0, BATCHES, count)]


def plain_loop(
    problem: Problem,
    count: int = 1,
    epochs: int = 2,
    forward: Callable[[Callable[[], Tensor]], Tensor] = lambda loss: loss(),
    at_the_end: Callable[[], Any] = lambda: None,
    scaler: torch.amp.GradScaler | None = None,
    after: Callable[[], Any] = lambda: None,
) -> Problem:
    """What a user would write without Lightning.

    Args:
        count: how many batches make a step.
        forward: what a forward pass runs in.
        at_the_end: called in each pass after its last backward, as clipping is.
        after: called after each step.
    """

    def closure(batch: int, is_last: bool) -> Tensor:
        loss = forward(partial(loss_of, problem, batch)) / count
        (loss if scaler is None else scaler.scale(loss)).backward()
        if is_last:
            at_the_end()
        return loss

    for batches in groups_of_batches(count) * epochs:
        problem.opt.step([partial(closure, batch, batch == batches[-1]) for batch in batches], scaler=scaler)
        if scaler is not None:
            scaler.update()
        after()
    return problem
