"""What every member of the family shares: torch's view of the optimizer, and the two styles of taking a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import checkpoint
from .checks import check_choice, check_groups, check_parameter, is_single, refuse_grad_scaler, refuse_unperturbed
from .closures import ends_step, walk
from .curvature.check import check_products
from .curvature.exact import SOURCES
from .flat import FlatState
from .gradients import grads_of, mark_droppable, of_groups, refuse_accumulated
from .hessian_pass import show_no_warning_of_cycles
from .method import Method
from .ops import check_backend
from .parameter_state import States
from .run import Run
from .step import Step


class FusedOptimizer(Optimizer):
    """What members of the family derive from, each with its constructor, its equation and its row of data."""

    method: Method

    # torch's GradScaler then leaves its scale and what it found to step(), which refuses them by name.
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], backend: str, hvp: str = "autograd") -> None:
        check_choice("hvp", hvp, tuple(SOURCES))
        check_backend(backend)
        method = replace(self.method, names=tuple(defaults))
        check_groups([defaults], method)
        show_no_warning_of_cycles()
        self._run = Run(FlatState(backend, method), hvp)
        super().__init__(params, defaults)

    # ---------------------------------------------------------------- the passes

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
    def perturb(self) -> None:
        """Takes the weights to w' by the gradients in ``.grad``, and clears these; or, along -m, before any backward.

        Raises:
            TypeError, ValueError: the weights are at w' already; a gradient is sparse or of another shape, dtype or
                device, or was used by the step before, or is there though the way is along -m; a hyperparameter was
                edited to a value that is refused.
        """
        step = self._run.step
        if step is not None:
            if step.perturbed:
                raise ValueError("perturb() called twice: call step(), or restore() to give the step up")
            step.end()
        Step.take_in_first_gradients(self._run, self.param_groups)

    @contextmanager
    def hessian_pass(self) -> Iterator[None]:
        """Around the second pass of a hand-written loop: on Hessian steps gradients get what their products need.

        Within it every ``loss.backward()`` builds the graph of its gradients, scaled_dot_product_attention runs by
        torch's own arithmetic and compiled models run uncompiled, both of which can be differentiated twice; and
        parameters outside the optimizer keep the gradients of the first pass. On other steps it does nothing.
        Closures need no hessian_pass(): the optimizer runs them in one.
        """
        run = self._run
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
        """Clears the gradients, as in torch.optim."""
        super().zero_grad(set_to_none)
        if not set_to_none:
            mark_droppable(of_groups(self.param_groups))
        self._run.forget_watch()

    @torch.no_grad()
    def restore(self) -> None:
        """Takes the weights back to w, bit for bit, before step() does; does nothing where they are there already.

        Hessian products that are due are taken first, at w', and kept for step(), which takes the gradients that are in
        ``.grad`` when it is called. Without second gradients the step is given up.
        """
        if self._run.step is not None:
            self._run.step.restore()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Performs one step.

        Args:
            closure: computes and returns the loss, and may run backward itself; called at w and at w', or once where
                a step has one pass. Without it, the rest of the step after perturb() and the backward at w'; or, where
                nothing is perturbed, a step by the gradients in ``.grad``.

        Returns:
            The loss of the first pass, detached; None without a closure.

        Raises:
            TypeError, ValueError: the closure is not callable or returns no scalar tensor; no perturb() came before,
                though rho is not 0; a gradient is sparse or of another shape, dtype or device, was used already, or has
                no graph on a Hessian step; gradients were accumulated that the closure's step would drop; a
                hyperparameter was edited to a value that is refused. The weights are then at w.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be callable, got {closure!r}")
        run = self._run
        try:
            if "found_inf" in vars(self):
                refuse_grad_scaler(self)
            if closure is None or (self.perturbed and ends_step(closure, of_groups(self.param_groups))):
                self._finish()
                return None
            if run.step is not None:
                run.step.give_up()
            params = of_groups(self.param_groups)
            refuse_accumulated(params)
            step = Step(run, self.param_groups)
            try:
                return walk(step, closure, params)
            except BaseException:
                self.zero_grad()  # lets go of a graph that the interrupted pass may have left
                raise
        except BaseException as error:
            if run.step is not None:
                run.step.give_up()
            if isinstance(error, RuntimeError):  # torch's, where the closure has given up its own step
                run.raise_given_up(error)
            raise

    def _finish(self) -> None:
        """The rest of a step in phase style, or the whole of one whose only pass is at w."""
        run = self._run
        if run.step is not None:
            run.step.groups = self.param_groups
            return run.step.finish()
        run.raise_given_up()
        grads = grads_of(of_groups(self.param_groups))
        if checkpoint.initialises_state(self.param_groups, run.states, grads):
            run.lay_out_anew(self.param_groups)
            return
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

    # ---------------------------------------------------------------- groups and state

    @property
    def state(self) -> States:
        """For each parameter its state by name, as views of flat buffers. A dict that is put here is copied."""
        self._run.flat.hand_out(self._run.states)
        return self._run.states

    @state.setter
    def state(self, entries: dict[Tensor, dict[str, Any]]) -> None:
        if entries is not self._run.states:
            self._run.states = States(entries)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, at any time; its parameters come last in the order of the random signs."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                check_parameter(param)
                self._run.flat.method.check_dtype(param.dtype, group, param.requires_grad)
            check_groups([self.param_groups[0], group], self._run.flat.method)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        checkpoint.publish_counts(self.param_groups, self._run.counts)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state in torch's usual form.

        Between perturb() and step() the weights go back to w, and the step is given up: the next step() says so.
        """
        self._leave_step("state_dict()")
        checkpoint.publish_counts(self.param_groups, self._run.counts)
        # Registered first, so that the user's hooks see what torch.load reads with weights_only.
        handle = self.register_state_dict_post_hook(checkpoint.with_plain_states, prepend=True)
        try:
            with self._run.flat.lent(self._run.states):
                return super().state_dict()
        finally:
            handle.remove()

    def _leave_step(self, because: str) -> None:
        """Where state is asked for between the passes, that is of w."""
        if self.perturbed:
            self._run.step.give_up(because)  # type: ignore[union-attr]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict, each state in its own dtype and on its parameter's device.

        Between perturb() and step() the step is given up; weights that were loaded meanwhile stay as they are.

        Raises:
            TypeError, ValueError: the groups do not match, a hyperparameter is wrong, or the state is not of this kind.
        """
        step = self._run.step
        if step is not None and step.weights_were_written():
            with self._run.uninterrupted:
                step.end()
        self._leave_step("load_state_dict()")
        # Registered last, so that it sees what the user's hooks made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(checkpoint.check_and_protect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    @torch.no_grad()
    def __getstate__(self) -> dict[str, Any]:
        self._leave_step("a copy of the optimizer")
        checkpoint.publish_counts(self.param_groups, self._run.counts)
        flat, states = self._run.flat, self._run.states
        written = defaultdict(dict, flat.written_out(states, lambda param: param))
        with flat.lent(states):  # torch's reads them too
            plain = super().__getstate__()
        return {**plain, "state": written, "_flat_state": (flat.backend, flat.method, self._run.hvp)}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_flat_state" in state:  # a copy, or what was pickled
            backend, method, hvp = state.pop("_flat_state")
            self._run = Run(FlatState(backend, method), hvp)
        self.state = state.pop("state", self.state)
        super().__setstate__(state)
        run = self._run
        checkpoint.take_in_saved(run.states, self.param_groups, self.defaults)
        if run.step is not None:
            run.step.end()
        run.counts.set(*checkpoint.counts_of(self.param_groups, run.states))
        checkpoint.publish_counts(self.param_groups, run.counts)
        run.lay_out_anew(self.param_groups)
