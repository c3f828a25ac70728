"""Lightning: accumulate_grad_batches and 16-mixed for steps that pass each batch through the network twice.

Automatic optimization needs nothing of this file. ``training_step``, ``self.log`` and the hooks around backward run in
both passes: ``if not self.optimizers().second_pass`` keeps metrics to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
    from lightning.pytorch.loops.optimization.automatic import ClosureResult
    from lightning.pytorch.loops.optimization.closure import AbstractClosure
    from lightning.pytorch.plugins.precision import MixedPrecision, Precision
    from lightning.pytorch.utilities import GradClipAlgorithmType
except ImportError as error:
    raise ImportError("sassha_fused.lightning needs Lightning: pip install 'lightning>=2.6'") from error

from .steps import SteppingOptimizer


class Accumulate(Callback):
    """Lets ``Trainer(accumulate_grad_batches=n)`` take the gradients of both passes, and the Hessian, of n batches.

        Trainer(accumulate_grad_batches=n, callbacks=[Accumulate()])

    The last step of an epoch has fewer batches where n does not divide their number. As always in Lightning each loss
    is divided by n. A batch is passed through the network again when its step comes, and must not change meanwhile.
    Optimizers of others accumulate as Lightning has them do.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has the training loop hand its closures to opt.accumulate()."""
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        loop._make_closure = partial(_closure_of, trainer)  # type: ignore[assignment, method-assign]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives up batches whose step does not come, where training stops between them."""
        _give_up(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception."""
        _give_up(trainer)


def _give_up(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, SteppingOptimizer):
            optimizer.restore()


def _closure_of(trainer: Trainer, kwargs: Any, optimizer: Any, batch_idx: int) -> AbstractClosure[ClosureResult]:
    """Lightning's closure of a batch, or where its step is yet to come what takes its first pass."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    closure = type(loop)._make_closure(loop, kwargs, optimizer, batch_idx)
    if isinstance(optimizer, SteppingOptimizer) and trainer.fit_loop._should_accumulate():
        return _FirstPass(closure, optimizer, getattr(trainer.precision_plugin, "scaler", None))
    return closure


class _FirstPass(AbstractClosure[ClosureResult]):
    """Called by the training loop as Lightning's closure would be; that one is kept for the second pass."""

    def __init__(
        self, closure: AbstractClosure[ClosureResult], optimizer: SteppingOptimizer, scaler: GradScaler | None
    ) -> None:
        super().__init__()
        self._closure, self._optimizer, self._scaler = closure, optimizer, scaler

    def __call__(self) -> None:
        self._optimizer.accumulate(self._pass, scaler=self._scaler)

    def _pass(self) -> Tensor | None:
        result = self.closure()
        if not self._optimizer.second_pass:
            self._result = result
        return result.loss

    def closure(self) -> ClosureResult:
        """One pass; nothing keeps its result, which holds the graph of the loss."""
        self._closure()
        return self._closure.consume_result()


class HalfPrecision(MixedPrecision):
    """``precision="16-mixed"`` for steps that pass each batch through the network twice.

        Trainer(plugins=[HalfPrecision()])

    The loss scale is lowered after every step that was skipped, and resumes from a checkpoint. Gradients are unscaled
    before ``on_before_optimizer_step`` and before clipping. In manual optimization both styles work:
    ``opt.step(closure)``, whose closure returns the loss after ``self.manual_backward(loss)``, and
    ``opt.perturb(scaler=self.trainer.precision_plugin.scaler)`` with ``opt.step()``.

    Args:
        device: the device type of autocast.
        scaler: one with other settings than torch's defaults.
    """

    scaler: GradScaler

    def __init__(self, device: str = "cuda", scaler: GradScaler | None = None) -> None:
        super().__init__("16-mixed", device, scaler)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Takes the step by its closure, which Lightning's own plugin would have evaluated once before it."""
        if closure is do_nothing_closure:  # of opt.step() in manual optimization
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        loss = optimizer.step(partial(self._wrap_closure, model, optimizer, closure), scaler=self.scaler, **kwargs)
        self.scaler.update()
        return loss

    def _wrap_closure(self, model: LightningModule, optimizer: Any, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._unscale(optimizer)
        self._after_closure(model, optimizer)
        return loss

    def clip_gradients(
        self,
        optimizer: Any,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clips gradients that are unscaled, or unscales them first."""
        self._unscale(optimizer)
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)

    def _unscale(self, optimizer: Any) -> None:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        if self.scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            self.scaler.unscale_(optimizer)
