"""The two styles of taking a step: by closures, and by hand, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from . import checkpoint
from .checks import is_single, refuse_unperturbed
from .closures import accumulate, closures_of, ends_step, walk
from .curvature.check import check_products
from .gradients import drop_spent, grads_of, mark_droppable, of_groups, refuse_dropping, would_drop
from .precision import LossScale, is_scale_of, loss_scale, warn_where_stuck
from .run import Run
from .step import Step


class SteppingOptimizer(Optimizer):
    """What takes the steps of an optimizer whose groups and state its subclass sees to."""

    # torch's GradScaler then leaves its scale and what it has found to step().
    _step_supports_amp_scaling = True

    _run: Run

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w'."""
        return self._run.perturbed

    @property
    def second_pass(self) -> bool:
        """Whether this step's batch has been through the network once, at w, and now goes through it at w'."""
        return self._run.second_pass

    @property
    def hessian_due(self) -> bool:
        """Whether the second pass of this step, or of the next if none is under way, needs a graph of its gradients."""
        run = self._run
        return run.step.awaits_products if run.step is not None else run.hessian_is_coming(self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something in them was not finite."""
        self._run.counts.catch_up()
        return self._run.counts.skipped

    @torch.no_grad()
    def perturb(self, scaler: GradScaler | None = None) -> None:
        """Takes the weights to w' by the gradients in ``.grad``, and clears these; or, along -m, before any backward.

        Args:
            scaler: that of the losses, whose scale these gradients still have; needed where ``scaler.unscale_(opt)``
                comes before ``scaler.step(opt)``, which then does not say what the scale was.

        Raises:
            TypeError, ValueError: the weights are at w' already; a gradient is sparse or of another shape, dtype or
                device, or was used by the step before, or is there though the way is along -m; a hyperparameter was
                edited to a value that is refused; the scaler has unscaled the gradients, or waits for its update().
        """
        step = self._run.step
        if step is not None:
            if step.perturbed or step.micro_batches.closures:
                done = "perturb() after accumulate()" if step.micro_batches.closures else "perturb() called twice"
                raise ValueError(f"{done}: call step(), or restore() to give the step up")
            step.end()
        run, groups = self._run, self.param_groups
        if along_momentum := run.flat.method.along_momentum(groups[0]):
            drop_spent(of_groups(groups))
        elif run.processes is not None:
            run.processes.refuse_unaveraged(groups)
        run.loss_scale = None if scaler is None else loss_scale(run.optimizer, scaler, "perturb()")
        if not (along_momentum and is_single(groups)):
            Step.to_w_prime(run, groups)

    @contextmanager
    def hessian_pass(self, scaler: GradScaler | None = None) -> Iterator[None]:
        """Around the second pass of a hand-written loop: on Hessian steps gradients get what their products need.

        Within it every ``loss.backward()`` builds the graph of its gradients, scaled_dot_product_attention runs by
        torch's own arithmetic and compiled models run uncompiled, both of which can be differentiated twice; and
        parameters outside the optimizer keep the gradients of the first pass. On other steps it does nothing.
        Closures need no hessian_pass(): the optimizer runs them in one.

        Args:
            scaler: as perturb() takes it, for loops without a perturb().
        """
        run = self._run
        # Along -m perturb() comes before, whatever rho is, and may have been told it.
        told_before = scaler is None and run.flat.method.along_momentum(self.param_groups[0])
        if run.step is not None and scaler is not None:
            run.step.scale = loss_scale(run.optimizer, scaler, "hessian_pass()")
        elif run.step is None and is_single(self.param_groups) and not told_before:
            run.loss_scale = loss_scale(run.optimizer, scaler, "hessian_pass()")
        if not self.hessian_due:
            yield
        elif run.step is not None:
            with run.step.around_pass():
                yield
        elif not is_single(self.param_groups):
            yield  # a first pass, whose gradients perturb() takes without a graph
        else:
            with run.only_pass(self.param_groups):
                yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as in torch.optim; in the closure of one of several micro-batches does nothing."""
        if self._run.step is not None and self._run.step.micro_batches.in_one_of_several:
            return
        super().zero_grad(set_to_none)
        if not set_to_none:
            mark_droppable(of_groups(self.param_groups))
        self._run.forget_watch()

    @torch.no_grad()
    def restore(self) -> None:
        """Takes the weights back to w, bit for bit, before step() does; does nothing where they are there already.

        Hessian products that are due are taken first, at w', and kept for step(), which takes the gradients that are in
        ``.grad`` when it is called. Without second gradients, or between micro-batches, the step is given up.
        """
        if (step := self._run.step) is not None:
            step.give_up() if step.micro_batches.closures else step.restore()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None,
        *,
        scaler: GradScaler | None = None,
    ) -> Tensor | None:
        """Performs one step.

        Args:
            closure: computes and returns the loss, and may run backward itself; called at w and at w', or once where
                a step has one pass. A list: a closure for each micro-batch, whose gradients and Hessian products are
                summed. Without it, the rest of the step after perturb() and the backward at w'; or, where
                nothing is perturbed, a step by the gradients in ``.grad``.
            scaler: scales the loss before each backward; ``scaler.update()`` comes after step(), as always. A closure
                that runs backward itself scales its loss itself, and may unscale its gradients to clip them.

        Returns:
            The loss of the first pass, detached, of several micro-batches the sum; None without a closure.

        Raises:
            TypeError, ValueError: the closure is not callable or returns no scalar tensor; no perturb() came before,
                though rho is not 0; a gradient is sparse or of another shape, dtype or device, was used already, or has
                no graph on a Hessian step; gradients were accumulated that the closure's step would drop; a
                hyperparameter was edited to a value that is refused; the loss scale is not known, or the scaler waits
                for its update(). The weights are then at w.
        """
        closures, run = closures_of(closure) if closure is not None else (), self._run
        try:
            if scaler is not None and not closures:
                raise ValueError(f"step(scaler={scaler!r}) needs a closure; without one call scaler.step(opt)")
            if "found_inf" in vars(self):
                if closures:
                    raise ValueError("scaler.step(opt, closure): call opt.step(closure, scaler=scaler)")
                self._take_over_scale()
            accumulates = run.step is not None and run.step.micro_batches.closures
            params = of_groups(self.param_groups) if closures else []
            by_hand = closures and (self.perturbed or (would_drop(params) and is_single(self.param_groups)))
            if closures and (accumulates or not (by_hand and ends_step(closures, params, self.perturbed))):
                return self._by_closures(walk, closures, params, scaler)
            self._finish()
            run.loss_scale = None
            return None
        except BaseException as error:
            self._give_up(error)
            raise

    @torch.no_grad()
    def accumulate(self, closure: Callable[[], Any], *, scaler: GradScaler | None = None) -> Tensor:
        """The first pass of a micro-batch that is not the last of its step: ``step(closure)`` takes the last one.

        The closure is kept, and called again for the second pass: what it reads must be the same then. Where a
        step has one pass, along the momentum, the weights stay at w' until step().

        Args:
            closure, scaler: as in step(), which is given the same scaler.

        Returns:
            The loss, detached.

        Raises:
            TypeError, ValueError: as step() does; the weights are then at w, and the step is given up.
        """
        closures = closures_of([closure])
        try:
            return self._by_closures(accumulate, closures, of_groups(self.param_groups), scaler)
        except BaseException as error:
            self._give_up(error)
            raise

    def _by_closures(
        self,
        take: Callable[[Step, Sequence[Callable[[], Any]], Sequence[Tensor]], Tensor],
        closures: Sequence[Callable[[], Any]],
        params: Sequence[Tensor],
        scaler: GradScaler | None,
    ) -> Tensor:
        """In the step that micro-batches have begun, or a new one."""
        run, step = self._run, self._run.step
        if step is None or not step.micro_batches.closures:
            if step is not None:
                step.give_up()
            if grads_of(params):  # of micro-batches that a new step would leave out
                run.raise_given_up()
            if would_drop(params):
                refuse_dropping()
            run.loss_scale = loss_scale(run.optimizer, scaler, "step(closure)")
            step = Step(run, self.param_groups)
        elif not is_scale_of(step.scale, scaler):
            raise ValueError(f"scaler must be the same in accumulate() and step(), got {scaler!r}")
        try:
            return take(step, closures, params)
        except BaseException:
            step.micro_batches.in_one_of_several = False
            if run.processes is not None:
                run.processes.hold_back(False)
            if step.scale is not None:
                step.scale.await_gradients()
            self.zero_grad()  # lets go of a graph that the interrupted pass may have left
            raise

    def _take_over_scale(self) -> None:
        """What scaler.step() has left here, and takes away afterwards."""
        run, attributes = self._run, vars(self)
        scale = (run.step.scale if run.step is not None else run.loss_scale) or LossScale(run.optimizer)
        if scale.scaler is None:
            warn_where_stuck(run)
        scale.take_over(attributes["found_inf"], attributes["grad_scale"])
        if run.step is not None:
            run.step.scale = scale
        else:
            run.loss_scale = scale

    def _give_up(self, error: BaseException) -> None:
        """After an exception: the weights go back to w."""
        run = self._run
        if (scale := run.loss_scale if run.step is None else run.step.scale) is not None:
            scale.await_gradients()
        run.loss_scale = None
        for name in ("grad_scale", "found_inf"):  # which a scaler takes away only where no error comes
            vars(self).pop(name, None)
        if run.step is not None:
            run.step.give_up()
        if isinstance(error, RuntimeError):  # torch's, where the closure has given up its own step
            run.raise_given_up(error)

    def _finish(self) -> None:
        """The rest of a step in phase style, or the whole of one whose only pass is at w."""
        run, grads = self._run, list[Tensor]()
        if run.step is None:
            run.raise_given_up()
            grads = grads_of(of_groups(self.param_groups))
            if checkpoint.initialises_state(self.param_groups, run.states, grads):
                run.lay_out_anew(self.param_groups)
                return
        if run.processes is not None:
            run.processes.refuse_unaveraged(self.param_groups)
        if run.step is not None:
            if run.step.micro_batches.closures:
                raise ValueError("step() after accumulate() needs the closure of the last micro-batch")
            run.step.groups = self.param_groups
            return run.step.finish()
        if grads and not is_single(self.param_groups):
            refuse_unperturbed(self.param_groups, run.flat.of_trained)
        Step(run, self.param_groups).finish()

    @torch.no_grad()
    def check_products(self, closure: Callable[[], Tensor], tolerance: float = 0.1) -> dict[str, float]:
        """Compares one exact Hessian product with finite differences, to find operations that have no double backward.

        A custom ``torch.autograd.Function`` whose backward is a kernel counts as a constant under double backward: its
        part of the Hessian is missing, and no error says so. Weights, gradients, state, random generators and
        batch-norm statistics are as before afterwards.

        Args:
            closure: returns the loss, or runs backward itself.
            tolerance: how far the two may differ, relative to the larger one's norm.

        Returns:
            The difference for each parameter, by its name or place.

        Raises:
            ValueError: naming the parameters whose products disagree.
        """
        if self._run.step is not None:
            raise ValueError("check_products() within a step: call it before perturb() or after step()")
        return check_products(closure, self.param_groups, tolerance)
