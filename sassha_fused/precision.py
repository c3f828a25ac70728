"""The loss scale of a step: what torch.amp.GradScaler has multiplied, and what it must hear of a step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim.optimizer import Optimizer

from .layout import wide_dtype
from .selection import Selection

if TYPE_CHECKING:
    from .run import Run

# Steps that may be skipped in a row before somebody is told: more than a scale usually has to come down by.
_PATIENCE = 20


def loss_scale(optimizer: weakref.ref[Optimizer], scaler: GradScaler | None, call: str) -> LossScale | None:
    """The loss scale of a step that is told its scaler; None where that is none or not enabled.

    Raises:
        TypeError: it is no GradScaler.
        ValueError: this optimizer's gradients are unscaled already, or scaler.update() has not been called.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
    if not scaler.is_enabled():
        return None
    scale = LossScale(optimizer, scaler)
    scale.refuse_stage(call)
    return scale


def is_scale_of(scale: LossScale | None, scaler: GradScaler | None) -> bool:
    """Whether a step that has this loss scale has it of this scaler; None and a disabled one are the same."""
    expected = None if scaler is None or not scaler.is_enabled() else scaler
    return (None if scale is None else scale.scaler) is expected


def warn_where_stuck(run: Run) -> None:
    """Warns where step after step is skipped, and the scaler, which is not known, may not hear why."""
    steps, skipped = run.counts.catch_up(), run.counts.skipped
    if steps != run.stuck_since[0]:
        run.stuck_since = steps, skipped
    elif skipped - run.stuck_since[1] == _PATIENCE:
        warnings.warn(
            f"{_PATIENCE} steps in a row were skipped. Where Hessian products or first gradients overflow and the last "
            "ones do not, the scaler keeps its scale, unless opt.perturb(scaler=scaler), or without perturb() "
            "opt.hessian_pass(scaler=scaler), lets the optimizer tell it",
            stacklevel=2,
        )


class LossScale:
    """The loss scale of one step, and its scaler where that is known.

    The first gradients keep it: g / N is the same, but for the 1e-12 beside N. The Hessian's products and the gradients
    of the last pass are divided by it.
    """

    def __init__(self, optimizer: weakref.ref[Optimizer], scaler: GradScaler | None = None) -> None:
        self._optimizer = optimizer
        self.scaler = scaler
        self._in_closure = False
        self._scaled_by_closure = False
        self._of_gradients: Tensor | None = None
        self._of_products: Tensor | None = None
        self._found_inf: Tensor | None = None
        self._found_before: list[Tensor] = []
        self._settled = False

    @property
    def _entry(self) -> dict[str, Any]:
        """What the scaler notes of this optimizer until its update()."""
        assert self.scaler is not None
        return self.scaler._per_optimizer_states[id(self._optimizer())]

    def refuse_stage(self, call: str) -> None:
        """ValueError unless the scaler waits for this optimizer's gradients."""
        if self._entry["stage"] is OptState.UNSCALED:
            raise ValueError(
                f"{call} after scaler.unscale_(): the gradients that come next would stay multiplied by the loss "
                "scale. Call unscale_() once a step, after its last backward"
            )
        if self._entry["stage"] is OptState.STEPPED:
            raise ValueError(f"{call} found that scaler.update() was not called after the step before")

    # ---------------------------------------------------------------- closures

    @contextmanager
    def around_closure(self) -> Iterator[None]:
        """Notices whether the closure scales its loss itself."""
        scaler = self.scaler
        assert scaler is not None
        before, scale, self._scaled_by_closure = vars(scaler).get("scale"), scaler.scale, False

        def noticed(outputs: Any) -> Any:
            self._scaled_by_closure = True
            return scale(outputs)

        scaler.scale = noticed  # type: ignore[method-assign]
        try:
            yield
        finally:
            del scaler.scale
            if before is not None:  # of a closure within which this one runs
                scaler.scale = before  # type: ignore[method-assign]
        self._in_closure = True

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss that backward is run on."""
        if self._scaled_by_closure:
            raise ValueError(
                "closure must return the loss itself, got one that scaler.scale() has multiplied: "
                "step(closure, scaler=scaler) scales it"
            )
        return self.scaler.scale(loss)  # type: ignore[union-attr]

    def refuse_unscaled_backward(self) -> None:
        """ValueError where the closure ran backward on a loss that it had not scaled."""
        if not self._scaled_by_closure:
            raise ValueError(
                "the closure ran backward on a loss without the loss scale: let it return the loss and leave backward "
                "to step(closure, scaler=scaler), or call scaler.scale(loss).backward() in it"
            )

    def next_micro_batch(self) -> None:
        """ValueError where a closure that is not the last of its pass has unscaled the gradients of all before."""
        if self._entry["stage"] is not OptState.READY:
            raise ValueError("scaler.unscale_() in the closure of a micro-batch that is not the last of its step")

    def await_gradients(self) -> None:
        """The scaler may unscale gradients once more: those of a second pass, or after an error those of a new step."""
        if self.scaler is not None and self._entry["stage"] is OptState.UNSCALED:
            self._found_before += self._entry["found_inf_per_device"].values()
            self._entry["stage"] = OptState.READY

    # ---------------------------------------------------------------- the end of a step

    def take_over(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """What scaler.step() leaves on the optimizer; no grad_scale where unscale_() was called before."""
        self._found_inf, self._of_gradients = found_inf, grad_scale
        self._of_products = grad_scale
        if grad_scale is None and self.scaler is not None and self._entry["stage"] is OptState.UNSCALED:
            self._of_products = self.scaler._scale
        self._settled = True

    def settle(self, needed: bool, single: bool) -> None:
        """In a step by closures does what scaler.step() would do.

        Args:
            needed: whether this is a Hessian step or one of two passes, which must know the scale.
            single: whether a step has one pass, and no perturb().

        Raises:
            ValueError: scaler.step() is missing; or the gradients are unscaled, and nobody has said by what.
        """
        if not self._settled:
            if not self._in_closure:
                raise ValueError("step() without the scaler that perturb() was given: call scaler.step(opt)")
            assert self.scaler is not None and self.scaler._scale is not None
            found, scale = self._found_before, self.scaler._scale
            if unscaled := self._entry["stage"] is OptState.UNSCALED:
                found = [*found, *self._entry["found_inf_per_device"].values()]
            # Of gradients that still have the scale the step itself sees what is not finite.
            total = torch.stack([one.to(scale.device) for one in found]).sum() if found else None
            self.take_over(total, None if unscaled else scale)
        if needed and self._of_products is None:
            call = "with opt.hessian_pass(scaler=scaler)" if single else "opt.perturb(scaler=scaler)"
            raise ValueError(
                "scaler.unscale_() was called before scaler.step(), which then does not say by what the gradients of "
                f"both passes and the Hessian products were multiplied: say it by {call}"
            )

    @property
    def guards(self) -> list[Tensor]:
        """Not finite where the scaler has found something that is not."""
        found = self._found_inf
        return [] if found is None else [torch.where(found > 0, torch.inf, found)]

    def unscale(self, selections: Sequence[Selection], products: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Divides the gradients of the last pass, in place, and returns the products divided."""
        if self._of_gradients is not None:
            for selection in selections:
                torch._foreach_mul_(list(selection.grads), _inverse(self._of_gradients, selection))
        divided = []
        for selection, of_bucket in zip(selections, products, strict=False):
            inverse = _inverse(self._of_products, selection)  # type: ignore[arg-type]
            divided.append([product * inverse for product in of_bucket])
        return divided

    def tell(self, skipped: Tensor) -> None:
        """Tells the scaler, where it is known, that a step was skipped for whatever was not finite."""
        if self.scaler is None:
            return
        found = self._entry["found_inf_per_device"]
        was = found.get(skipped.device)
        verdict = skipped.reshape(()).float()
        found[skipped.device] = verdict if was is None else torch.maximum(was, verdict)
        if self._in_closure:
            self._entry["stage"] = OptState.STEPPED


def _inverse(scale: Tensor, selection: Selection) -> Tensor:
    """1 / scale, rounded to float32 as the scaler rounds it."""
    inverse = scale.to(wide_dtype(scale.device)).reciprocal().float()
    return inverse.to(selection.bucket.device)
