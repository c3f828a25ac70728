"""Steps of two passes in a Trainer of transformers, which runs each batch once and calls step() without a closure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .closures import evaluate_each
from .gradients import of_groups
from .precision import loss_scale
from .step import Step
from .steps import SteppingOptimizer


def two_pass(trainer: Trainer) -> None:
    """Has a Trainer take whole steps of its optimizer: both passes, and the graphs that Hessian products need.

    Call it once, before ``trainer.train()``; a second call changes nothing more. When the last micro-batch of a step
    has been through the network, all of them go through it again at w'. Then the Trainer clips and calls step() as
    ever. It logs the loss of the first pass, and the norm of the gradients at w'. Each pass draws its own dropout
    masks. With one pass a step (``MSassha``, ``ascent="momentum"``, ``rho=0``) no micro-batch is seen twice.

    Args:
        trainer: a transformers.Trainer, or of a class derived from it. Its optimizer may be made later, when training
            begins.

    Raises:
        TypeError: its optimizer is not one of this package; found at the start of training where it is made then.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {trainer!r}")
    if trainer.optimizer is not None:
        _optimizer_of(trainer)
    if not any(isinstance(callback, _TwoPass) for callback in trainer.callback_handler.callbacks):
        two_pass = _TwoPass(trainer)
        trainer.add_callback(two_pass)
        trainer.training_step = two_pass.training_step


def _optimizer_of(trainer: Trainer) -> SteppingOptimizer:
    """What Accelerate may have wrapped."""
    optimizer = trainer.optimizer
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, SteppingOptimizer):
        raise TypeError(
            f"two_pass(trainer) needs an optimizer of sassha_fused, got {type(optimizer).__name__}: give it to the "
            "Trainer, as in Trainer(..., optimizers=(Sassha(model.parameters()), None))"
        )
    return optimizer


class _TwoPass(TrainerCallback):
    """Takes the place of a Trainer's training_step, and leaves a step that lacks nothing but step() itself."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._training_step = trainer, trainer.training_step
        self._closures: list[Callable[[], Tensor]] = []  # the micro-batches of the step under way

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._give_up()  # what an exception may have left

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        if self._closures:  # a callback has stopped training between micro-batches
            self._give_up()

    def training_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Tensor:
        """The loss of a micro-batch, whose gradients are in .grad; after the last of a step the gradients at w'."""
        try:
            return self._pass(partial(self._evaluate, model, inputs, *others, **named))
        except BaseException:
            self._give_up()
            raise

    def _evaluate(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Tensor:
        # The Trainer's step, or a user's, may take entries out.
        return self._training_step(model, copy.copy(inputs), *others, **named)

    @torch.no_grad()
    def _pass(self, closure: Callable[[], Tensor]) -> Tensor:
        optimizer, accelerator = _optimizer_of(self._trainer), self._trainer.accelerator
        run, params = optimizer._run, of_groups(optimizer.param_groups)
        if not self._closures:
            run.loss_scale = loss_scale(optimizer._run.optimizer, accelerator.scaler, "two_pass(trainer)")
            Step(run, optimizer.param_groups).begin()
        self._closures.append(closure)
        step, is_last = run.step, accelerator.sync_gradients
        assert step is not None
        (loss,) = evaluate_each(step, [closure], params, ends=is_last)
        if is_last:
            closures, self._closures = self._closures, []
            step.micro_batches.count = len(closures)
            if step.arrive():
                evaluate_each(step, closures, params, ends=True)
        return loss

    def _give_up(self) -> None:
        """The weights go back to w, and nothing of the step is left."""
        optimizer = _optimizer_of(self._trainer)
        self._closures.clear()
        if optimizer._run.step is not None:
            optimizer._run.step.give_up()
        optimizer.zero_grad()
