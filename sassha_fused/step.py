"""The step under way: where the weights are, the order of the passes, and every way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor

from . import passes
from .caches import forget_copies_of_weights
from .counts import StepTaken
from .curvature.of_step import Curvature
from .flat import Groups, Selection, States, with_gradients
from .gradients import mark_used, refuse_used
from .interrupts import arrive_at_w, leave_w, uninterrupted
from .run import Run

_grad = attrgetter("grad")
_version = attrgetter("_version")


def _versions_of(selections: Sequence[Selection]) -> list[int]:
    return [version for selection in selections for version in map(_version, selection.params)]


class Step:
    """One step, made when its first gradient is used, walked to its end, and dropped.

        w --perturb--> w' --second pass, products--> w' --restore--> w --update--> the next w

    With rho 0 in every group the first pass is the only one, and w' is w.

    Attributes:
        curvature: the Hessian's part in it.
        perturbed: whether the weights are at w'.
    """

    def __init__(self, run: Run, groups: Groups, states: States) -> None:
        run.accepted.check(groups, bool(run.flat.buckets))
        self._run, self._groups, self._states = run, groups, states
        self.single = not any(group["rho"] > 0 for group in groups)
        self.curvature = Curvature(run, groups)
        self.perturbed = False
        self._moved: list[Selection] = []
        self._versions: list[int] = []
        self._norm: Tensor | None = None
        run.step, run.given_up = self, None

    # ---------------------------------------------------------------- the way there

    def begin(self) -> None:
        """Before the first pass of a closure: where it is the only one, it may need a graph already."""
        if self.single:
            self._run.counts.settle()
            self.curvature.expect(self._run.is_scheduled(self._groups))

    def gradients(self) -> AbstractContextManager[None]:
        """What a pass of the network runs in, so that its gradients are those that this step needs."""
        return self.curvature.gradients(repeated=self.perturbed)

    def arrive(self) -> bool:
        """Takes in the gradients of a pass; whether another one is needed."""
        if self.perturbed or self.curvature.due:
            return False
        if not self.single:
            self.perturb()
            return self.perturbed
        # A parameter that gets its first gradient late needs a Hessian as well.
        if not self._run.flat.lacks_hessian(self._groups):
            return False
        self.curvature.expect(True)
        return True

    def perturb(self) -> None:
        """w -> w' by the gradients in .grad, which are cleared; then this step knows whether it is a Hessian step."""
        leave_w(self)
        try:
            with uninterrupted():
                self._norm = self._with_current(self._perturb)
            if not self._moved:
                return self.end()
            # Only now: the device has this step's first pass to work on while the host waits for the step before.
            self._run.counts.settle()
            self.curvature.expect(self.curvature.concerns(self._moved))
        except BaseException:
            self.give_up()
            raise
        for selection in self._moved:
            for param in selection.params:
                param.grad = None
        self._versions = _versions_of(self._moved)

    def _perturb(self, selections: list[Selection]) -> Tensor | None:
        refuse_used(selections, "perturb()")
        if not selections:
            return None
        try:
            return passes.perturb(selections, self._moved)
        finally:
            if self._moved:
                self.perturbed = True
                self.curvature.leave_w(self._moved)
                forget_copies_of_weights()

    def _with_current(self, act: Callable[[list[Selection]], Any]) -> Any:
        """What act makes of the parameters that have a gradient, where they are and as they are now."""
        flat, counts = self._run.flat, self._run.counts
        try:
            return act(flat.select(self._groups, self._states, counts.settle))
        except (RuntimeError, TypeError, ValueError):
            if self._moved or not flat.laid_out or flat.is_current():
                raise
        # A part of the model has moved to another device or dtype, and its state moves along.
        flat.forget()
        return act(flat.select(self._groups, self._states, counts.settle))

    # ---------------------------------------------------------------- the way back

    def finish(self, losses: Sequence[Tensor] = ()) -> None:
        """From the gradients of the last pass to the new weights: Hessian products, checks, and the update."""
        run = self._run
        run.accepted.check(self._groups, bool(run.flat.buckets))
        selections, guards = self._arrived()
        if not selections:
            return self.end()
        self.curvature.take()
        selections = self._without_graphs(selections)
        self.curvature.refuse_others(selections)
        products = self.curvature.products
        guards += map(passes.guard_of, losses)
        guards += [passes.guard_of(group["lr"]) for group in self._groups if isinstance(group["lr"], Tensor)]
        # Of several buckets none may be written before all are known to be finite; one alone, update_ itself looks at.
        alone = self._norm is not None and len(selections) == 1
        if not alone:
            guards += [passes.norm(selections)] if self._norm is not None else []
            guards += passes.norms_of(selections, products)
        with uninterrupted():
            if self.perturbed:
                self._put_back_all_but(selections)
            else:
                passes.back_up(selections)
            try:
                passes.update(selections, products, guards, guard_grads=alone)
            except BaseException:
                self.put_back(selections)
                # Should one bucket's update have gone through before another's failed, its state knows its counts.
                run.flat.forget()
                raise
            forget_copies_of_weights()
            mark_used(selection.grads[0] for selection in selections)
            self.count(StepTaken(selections[0].bucket.skipped, [s.with_grads(()) for s in selections], bool(products)))
            self.perturbed = False
        self.end()

    def _arrived(self) -> tuple[Sequence[Selection], list[Tensor]]:
        """The parameters that take part, with their gradients; and what is known of these."""
        if self._norm is not None:
            if self.weights_were_written():
                raise ValueError(
                    "the weights were written between perturb() and step(), which would be lost: load or change "
                    "weights before perturb() or after step()"
                )
            if self._run.flat.is_replaced(self._states):
                raise ValueError(
                    "opt.state was replaced between perturb() and step(), which would be lost: edit it before "
                    "perturb() or after step()"
                )
            selections = with_gradients(self._moved)
            if not selections:
                raise ValueError(
                    "step() found no parameter with a gradient in both passes: between perturb() and step() the second "
                    "backward is missing, or it reached other parameters than the first. restore() gives a step up"
                )
            return selections, [self._norm]

        def look_at(selections: list[Selection]) -> tuple[list[Selection], list[Tensor]]:
            refuse_used(selections, "step()")
            return selections, [passes.norm(selections)] if selections else []

        selections, guards = self._with_current(look_at)
        self._run.counts.settle()
        self.curvature.of = selections
        self.curvature.due = self.curvature.due or self.curvature.concerns(selections)
        return selections, guards

    def _without_graphs(self, selections: Sequence[Selection]) -> Sequence[Selection]:
        if not any(any(grad.requires_grad for grad in selection.grads) for selection in selections):
            return selections
        self.curvature.release(selections)
        return [selection.with_grads(list(map(_grad, selection.params))) for selection in selections]

    def count(self, taken: StepTaken) -> None:
        """Has the step counted, once it is known whether the device has skipped it."""
        self._run.counts.count(taken)

    def restore(self) -> None:
        """w' -> w; the Hessian products of gradients that carry their graph are taken first and kept.

        Without second gradients, or where a Hessian step's have no graph, the step is over.
        """
        if not self.perturbed:
            return
        over = not with_gradients(self._moved)
        try:
            over = over or (self.curvature.due and not self.curvature.may_take())
            if not over:
                self.curvature.take()
        finally:
            with uninterrupted():
                self.put_back(self._moved)
                self.perturbed = False
            arrive_at_w(self)
            if over:
                self.end()

    def give_up(self, because: str | None = None) -> None:
        """After an exception, or where the state is asked for between the passes: w' -> w, and the step is over."""
        with uninterrupted():
            try:
                if self.perturbed:
                    self.put_back(self._moved)
            finally:
                self.perturbed = False
                self._run.given_up = because
        self.end()

    def weights_were_written(self) -> bool:
        """Whether somebody has written into the weights since they are at w', as in loading a model."""
        return self.perturbed and self._versions != _versions_of(self._moved)

    def refuse_given_up(self) -> None:
        """ValueError where something that the closure called has given this step up."""
        if self._run.step is not self:
            self._run.raise_given_up()

    def forget(self) -> None:
        """The step is over, and the weights stay as they are."""
        self.perturbed = False
        self.end()

    def end(self) -> None:
        """The step is over."""
        self.curvature.end()
        if self._run.step is self:
            self._run.step = None
        arrive_at_w(self)

    @contextmanager
    def back_at_w(self) -> Iterator[None]:
        """While the handler of a signal runs, which may save a checkpoint, the weights are w; afterwards w' again."""
        if not self.perturbed:
            yield
            return
        self.perturbed = False
        try:
            passes.swap_with_backup(self._moved)
            yield
        except BaseException:
            self.end()
            raise
        passes.swap_with_backup(self._moved)
        self.perturbed = True

    def put_back(self, selections: Sequence[Selection]) -> None:
        """w' -> w of these."""
        passes.put_back(selections)
        forget_copies_of_weights()

    def _put_back_all_but(self, selections: Sequence[Selection]) -> None:
        """Restores what was perturbed and has no second gradient; the update restores the others itself."""
        if sum(len(s.params) for s in selections) == sum(len(s.params) for s in self._moved):
            return
        updated = {param for selection in selections for param in selection.params}
        for selection in self._moved:
            self.put_back([selection.at([i for i, p in enumerate(selection.params) if p not in updated])])
