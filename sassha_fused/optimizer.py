"""What every member of the family shares: torch's view of the optimizer, its groups and its state."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .checks import check_choice, check_groups, check_parameter
from .curvature.exact import SOURCES
from .flat import FlatState
from .hessian_pass import show_no_warning_of_cycles
from .method import Method
from .ops import check_backend
from .parameter_state import States
from .run import Run
from .steps import SteppingOptimizer


class FusedOptimizer(SteppingOptimizer):
    """What members of the family derive from, each with its constructor, its equation and its row of data."""

    method: Method

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], backend: str, hvp: str = "autograd") -> None:
        check_choice("hvp", hvp, tuple(SOURCES))
        check_backend(backend)
        method = replace(self.method, names=tuple(defaults))
        check_groups([defaults], method)
        show_no_warning_of_cycles()
        self._run = Run(FlatState(backend, method), hvp, weakref.ref(self))
        super().__init__(params, defaults)

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
            self._run = Run(FlatState(backend, method), hvp, weakref.ref(self))
        self.state = state.pop("state", self.state)
        super().__setstate__(state)
        run = self._run
        checkpoint.take_in_saved(run.states, self.param_groups, self.defaults)
        if run.step is not None:
            run.step.end()
        run.counts.set(*checkpoint.counts_of(self.param_groups, run.states))
        checkpoint.publish_counts(self.param_groups, run.counts)
        run.lay_out_anew(self.param_groups)
