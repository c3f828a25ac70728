"""The step under way: where the weights are, the order of the passes, and every way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from . import passes
from .accepted_groups import ascents_of, lr_of, refuse_other_ascents
from .counts import StepTaken
from .curvature.of_step import Curvature, at_w_prime
from .curvature.taking import release_graphs, take_products
from .flat import Groups
from .gradients import mark_droppable, of_groups, refuse_used
from .hessian_pass import building_graphs, set_aside
from .micro_batches import MicroBatches
from .run import Run
from .selection import Selection, others_than, with_gradients

_requires_grad = attrgetter("requires_grad")


def accept_edited(run: Run, groups: Groups, movable: bool) -> None:
    """Checks and takes in groups that somebody has edited; movable: whether the state may be laid out anew."""
    known, edited = run.accepted, True
    with suppress(KeyError, RuntimeError, ValueError):  # where one is gone, or is a tensor without one truth value
        values = list(map(known.method.values_of, groups))
        if movable:
            ones, others = map(chain.from_iterable, (values, known.values))
            edited = len(values) != len(known.values) or not all(map(is_, ones, others))
        else:  # in half the time: what equals what a first look has accepted may wait for that of the next step
            edited = not all(map(is_, map(lr_of, values), map(lr_of, known.values))) or values != known.values
    if edited:
        run.accept(groups, movable)


def _telling_grads(selections: Sequence[Selection]) -> list[Tensor]:
    return [selection.grads[i] for selection in selections for i in selection.telling]


def _versions_of(selections: Sequence[Selection]) -> list[int]:
    return [selection.params[i]._version for selection in selections for i in selection.telling]


class Step:
    """One step, made when its first gradient is used, walked to its end, and dropped.

        w --perturb--> w' --second pass, products--> w' --restore--> w --update--> the next w

    With rho 0 in every group w' is w, and the first pass is the only one; along exp_avg the one at w' is.

    Attributes:
        run: the optimizer's record.
        groups: the optimizer's.
        perturbed: whether the weights are at w'.
        curvature: the Hessian's part, where the pass that comes next is that of a Hessian step.
        scale: its loss scale, where it has one.
        micro_batches: those of each pass.
    """

    def __init__(self, run: Run, groups: Groups) -> None:
        self.run: Run = weakref.proxy(run)  # which owns the step: an optimizer that is dropped takes it along
        self.groups = groups
        accept_edited(run, groups, movable=True)
        self._single = run.accepted.single
        self._exact = bool(groups[0].get("exact_restore", True))
        self._along_momentum = run.flat.of_trained and not self._single
        self.perturbed = False
        self.curvature: Curvature | None = None
        self.scale, run.loss_scale = run.loss_scale, None
        self.micro_batches = MicroBatches()
        self._moved: list[Selection] = []
        self._versions: list[int] = []
        self._norm: Tensor | None = None
        self._ascents = [] if self._exact else ascents_of(groups)
        run.step, run.given_up = self, None

    @classmethod
    def to_w_prime(cls, run: Run, groups: Groups) -> None:
        cls(run, groups).perturb()

    def begin(self) -> None:
        """Before the first pass of a closure: where it is the only one, it may need a graph already."""
        if self._along_momentum:
            self.perturb()
        elif self._single and self.run.hessian_is_coming(self.groups):
            self.make_curvature()

    def make_curvature(self, kind: type[Curvature] = Curvature) -> None:
        """The coming pass is that of a Hessian step."""
        with self.run.uninterrupted:
            self.curvature = kind(self.run, self.groups, self._moved)

    @property
    def is_second_pass(self) -> bool:
        """Whether this step's batch has been through the network once, at w, and now goes through it at w'."""
        return self.perturbed and not self._along_momentum

    @property
    def awaits_products(self) -> bool:
        """Whether this is a Hessian step whose products have not been taken."""
        return self.curvature is not None and not self.curvature.taken

    def around_pass(self) -> AbstractContextManager[None]:
        """What a pass of the network runs in, so that its gradients are those that this step needs."""
        if self.curvature is not None and not self.curvature.taken:
            self.run.others = self.run.others if self.micro_batches.arrivals is not None else ()  # the pass begins
            return building_graphs(partial(self.curvature.around_backward, self))
        return set_aside(self.run.outside(self.groups)) if self.is_second_pass else nullcontext()

    def arrive(self) -> bool:
        """Takes in the gradients of a pass; whether another one is needed."""
        if self._moved or self._single or self._along_momentum:
            return False
        self.perturb()
        return self.perturbed

    def perturb(self) -> None:
        """w -> w' by the gradients in .grad, which are cleared, or along exp_avg; now it is known what step this is."""
        run = self.run
        try:
            with run.uninterrupted:
                self._norm = self.with_current(self._perturb, self._along_momentum)
            if not self._moved:
                return None if self._along_momentum else self.end()
            # Only now: the device has this step's first pass to work on while the host waits for the step before.
            due = run.counts.next_is_scheduled(self.groups[0])
            if due or any(s.bucket.without_hessian and s.lacks_hessian() for s in self._moved):
                self.make_curvature()
            for selection in self._moved:
                selection.grads = ()
                for param in () if self._along_momentum else selection.params:
                    param.grad = None
            self._versions = _versions_of(self._moved)
        except BaseException:
            self.give_up()
            raise

    def _perturb(self, selections: list[Selection]) -> Tensor | None:
        if marked := [grad for grad in _telling_grads(selections) if hasattr(grad, "_used_in_version")]:
            refuse_used(marked, "perturb()")
        if not selections:
            return None
        try:
            return passes.perturb(selections, self._moved, self._along_momentum, self._exact)
        finally:
            if self._moved:
                self.perturbed = True
                at_w_prime.steps.add(self)

    def with_current(self, act: Callable[[list[Selection]], Any], with_averages: bool = False) -> Any:
        """What act makes of what FlatState.select() finds, where the parameters are and as they are now."""
        run, flat = self.run, self.run.flat
        try:
            return act(flat.select(self.groups, run.states, run.counts.catch_up, with_averages))
        except (RuntimeError, TypeError, ValueError):
            if self._moved or not flat.laid_out or flat.is_current():
                raise
        flat.forget()  # a part of the model has moved to another device or dtype, and its state moves along
        return act(flat.select(self.groups, run.states, run.counts.catch_up, with_averages))

    def finish(self, losses: Sequence[Tensor] = ()) -> None:
        """From the gradients of the last pass to the new weights: Hessian products, checks, and the update."""
        if self.perturbed and not self._exact:
            refuse_other_ascents(self._ascents, self.groups)
        accept_edited(self.run, self.groups, movable=not self._moved)
        selections = self._perturbed_and_back() if self._moved else self.with_current(self._at_w)
        if not selections or self._norm is None:
            return self.end()
        if self.scale is not None:
            self.scale.settle(not (self._single or self._along_momentum) or self.curvature is not None, self._single)
        if self.curvature is not None or len(at_w_prime.steps) > 1:
            take_products(self)
            selections = [selection.as_now() for selection in selections]
        if any(any(map(_requires_grad, selection.grads)) for selection in selections):
            selections = release_graphs(self, selections)
        taken, count = self.curvature, self.micro_batches.count
        products = taken.products_of(selections, count) if taken is not None else ()
        if self.scale is not None:
            products = self.scale.unscale(selections, products)
            losses = [*losses, *self.scale.guards]
        with self.run.uninterrupted:
            if self.perturbed and [len(s.params) for s in selections] != [len(s.params) for s in self._moved]:
                self.put_back(others_than(selections, self._moved))  # the update restores those that it updates
            backed_up = bool(self._moved) and self._exact
            if not self._moved and len(selections) > 1:  # the update of one may go through before another's fails
                passes.back_up(selections)
                backed_up = True
            updated: list[Selection] = []
            try:
                passes.update(selections, products, self._norm, bool(self._moved), backed_up, losses, updated)
            except BaseException:
                without = [s for s in selections[len(updated) :] if s.norm is not None]
                self.put_back((self._moved or selections) if backed_up else without)
                self.perturbed = False
                # Should one bucket's update have gone through before another's failed, its state knows its counts.
                self.run.flat.forget()
                raise
            for grad in _telling_grads(selections):
                grad._used_in_version = grad._version  # type: ignore[attr-defined]
            for selection in selections:
                selection.grads = ()
            if self.scale is not None:
                self.scale.tell(selections[0].bucket.skipped)
            self.count(StepTaken(selections[0].bucket.skipped, selections, bool(products)))
            self.end()

    def _perturbed_and_back(self) -> list[Selection]:
        """The perturbed parameters that have a second gradient, with it."""
        if self.weights_were_written():
            self._moved = self._moved if self._exact else []  # which no copy tells, so that they stay
            raise ValueError(
                "the weights were written between perturb() and step(): load or change them before or after these two"
            )
        if self.run.states.edits.made:
            self.run.flat.refuse_replaced(self.run.states)
        selections = with_gradients(self._moved)
        if not selections:
            raise ValueError(
                "step() found no parameter with a gradient in both passes: between perturb() and step() the second "
                "backward is missing, or it reached other parameters than the first. restore() gives a step up"
            )
        if self._along_momentum:
            refuse_used(_telling_grads(selections), "step()")
        return selections

    def _at_w(self, selections: list[Selection]) -> list[Selection]:
        """The parameters that have a gradient of the only pass."""
        refuse_used(_telling_grads(selections), "step()")
        # Refuses what does not fit, as where a part of the model has moved.
        self._norm = passes.norm(selections) if selections else None
        due = self.run.counts.next_is_scheduled(self.groups[0]) or any(s.lacks_hessian() for s in selections)
        if selections and due and self.curvature is None:
            self.make_curvature()
        if self.curvature is not None:
            self.curvature.of = selections
        return selections

    def count(self, taken: StepTaken) -> None:
        """Has the step counted, once the device's verdict is known."""
        self.run.counts.count(taken)

    def restore(self) -> None:
        """w' -> w, after the products of a Hessian step; without second gradients, or their graph, the step is over."""
        if not self.perturbed:
            return
        if not self._exact and self.weights_were_written():
            return self.end()  # no copy tells w
        over = not with_gradients(self._moved) or (self.curvature is not None and not self.curvature.may_take())
        try:
            if not over:
                take_products(self)
        finally:
            with self.run.uninterrupted:
                if self.perturbed:  # not where a handler has raised, and so has left w
                    self.put_back(self._moved)
                    self._versions = _versions_of(self._moved)
                self.perturbed = False
            if over:
                self.end()

    def give_up(self, because: str | None = None) -> None:
        """After an exception, or where the state is asked for between the passes: w' -> w; the step is over."""
        with self.run.uninterrupted:
            try:
                if self.perturbed:
                    self.put_back(self._moved)
            finally:
                self.perturbed = False
                self.run.given_up = because
                mark_droppable(of_groups(self.groups) if self.micro_batches.closures else ())
                self.end()

    def weights_were_written(self) -> bool:
        """Whether somebody has written into the weights since this step moved them."""
        return self._versions != _versions_of(self._moved)

    def end(self) -> None:
        """The step is over, wherever the weights are."""
        self.perturbed = False
        if self.curvature is not None:
            self.curvature.end()
        at_w_prime.steps.discard(self)
        if self.run.step is self:
            self.run.step = None

    def swap(self) -> None:
        """w' -> w, or back to w', which is kept meanwhile."""
        with self.run.uninterrupted:
            passes.swap_with_backup(self._moved)
            self.perturbed = not self.perturbed

    put_back = staticmethod(passes.put_back)
