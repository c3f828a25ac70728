"""What an optimizer knows beside torch's groups and state."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import Optimizer

from .accepted_groups import AcceptedGroups
from .checks import is_single
from .counts import Counts
from .flat import FlatState, Groups
from .gradients import of_groups
from .hessian_pass import GradientWatch, building_graphs
from .interrupts import uninterrupted
from .parameter_state import States
from .precision import LossScale
from .processes import Replicas, refuse_unknown_modules

if TYPE_CHECKING:
    from .step import Step


@dataclass(eq=False)
class Run:
    """The run-time record of an optimizer.

    Created once and mutated, never rebound: Lightning and Fabric wrap an optimizer in a subclass whose reads fall
    through to it and whose writes do not.

    Attributes:
        flat: where the state lies.
        states: opt.state.
        hvp: the name of the source of Hessian products.
        step: the step under way.
        given_up: what ended the step under way before its time, until step() has said so.
        watch: hooks of a hessian_pass() that no step owns yet.
        others: parameters outside the optimizer that its losses reach, as the last Hessian pass found them.
        graphs_in_vain: steps that built a graph for the first Hessian of parameters that then had no gradient.
        loss_scale: that of the step to come, where its scaler was given already.
        processes: the replicas, where data_parallel() was called.
        stuck_since: the counts of steps and of skipped ones behind the last step that was taken, as far as noticed.
        optimizer: whose record it is, for a scaler, which knows nothing of wrappers.
    """

    flat: FlatState
    hvp: str
    optimizer: weakref.ref[Optimizer]
    counts: Counts = field(default_factory=Counts)
    states: States = field(default_factory=lambda: States({}))
    accepted: AcceptedGroups = field(init=False)
    step: Step | None = None
    given_up: str | None = None
    watch: GradientWatch | None = None
    others: Sequence[Tensor] = ()
    graphs_in_vain: int = 0
    loss_scale: LossScale | None = None
    processes: Replicas | None = None
    stuck_since: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.accepted = AcceptedGroups(self.flat.method)
        self.uninterrupted = uninterrupted(self)

    def accept(self, groups: Groups, movable: bool) -> None:
        """Checks the groups, and takes in what they say.

        Args:
            movable: whether the state may be laid out anew for it.

        Raises:
            TypeError, ValueError: a hyperparameter is refused.
        """
        try:
            self.accepted.accept(groups)
            self.flat.take_in_groups(groups, movable)
        except BaseException:
            self.accepted.forget()  # so that nobody takes them for accepted
            raise

    def lay_out_anew(self, groups: Groups) -> None:
        """Makes the flat state without a step; the next one takes in what the groups say then."""
        self.counts.catch_up()
        self.accepted.forget()
        self.flat = FlatState(self.flat.backend, self.flat.method)
        self.flat.lay_out(groups, self.states)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w'."""
        return self.step is not None and self.step.perturbed

    @property
    def second_pass(self) -> bool:
        """Whether this step's batch has been through the network once, at w, and now goes through it at w'."""
        return self.step is not None and self.step.is_second_pass

    @contextmanager
    def back_at_w(self) -> Iterator[None]:
        """While the handler of a signal runs, which may save a checkpoint, the weights are w; afterwards w' again."""
        step = self.step
        if step is None or not step.perturbed:
            return (yield)
        try:
            step.swap()  # a second signal may come
            yield
        except BaseException:
            step.end()
            raise
        step.swap()

    def outside(self, groups: Groups) -> list[Tensor]:
        """Those of others that have not been added to the groups since."""
        own = set(of_groups(groups)) if self.others else ()
        return [param for param in self.others if param not in own]

    def hessian_is_coming(self, groups: Groups) -> bool:
        """Whether the coming step is a Hessian step, as far as can be told before its first pass.

        Where a step has one pass alone, any trained parameter may get a gradient in it.
        """
        if self.counts.next_is_scheduled(groups[0]):
            return True
        if not self.flat.method.takes_hessian:
            return False
        only = is_single(groups) or self.flat.of_trained
        params = [p for p in of_groups(groups) if (p.requires_grad if only else p.grad is not None)]
        return self.flat.lacks_hessian(params)

    @contextmanager
    def only_pass(self, groups: Groups) -> Iterator[None]:
        """Around the pass of a Hessian step that is not perturbed, before there is a step."""
        with self.uninterrupted:
            self.watch = self.watch or self.new_watch(groups)
        try:
            with building_graphs():
                yield
        except BaseException:
            self.forget_watch()
            raise

    def new_watch(self, groups: Groups) -> GradientWatch:
        """Hooks for the pass of a Hessian step."""
        return GradientWatch((p for p in of_groups(groups) if p.requires_grad), refuse_unknown_modules(self))

    def groups(self) -> Groups:
        """The optimizer's."""
        optimizer = self.optimizer()
        assert optimizer is not None
        return optimizer.param_groups

    @property
    def builds_graph(self) -> bool:
        """Whether the pass that comes next, or is under way, is that of a Hessian step."""
        if self.step is not None:
            return self.step.awaits_products
        return is_single(self.groups()) and self.hessian_is_coming(self.groups())

    def forget_watch(self) -> None:
        """Takes off the hooks of an only pass whose gradients no step has used."""
        if self.watch is not None:
            with self.uninterrupted:
                self.watch.remove()
                self.watch = None

    def refuse_interference(self, step: Step) -> None:
        """ValueError where something that the closure of a step called has ended it, or begun another."""
        if self.step is not step:
            self.raise_given_up()
            raise ValueError(
                "the closure has ended or begun a step of its own optimizer: leave perturb(), restore(), step() and "
                "load_state_dict() out of it"
            )

    def raise_given_up(self, error: BaseException | None = None) -> None:
        """ValueError where somebody has given the step up that was under way."""
        if self.given_up is not None:
            because, self.given_up = self.given_up, None
            raise ValueError(
                f"the step under way was given up, its weights put back to w, by {because} between its passes: save "
                "and copy before perturb() or after step(), or in the handler of a signal"
            ) from error
