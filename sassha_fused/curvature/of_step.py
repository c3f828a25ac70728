"""What a step takes of the Hessian: gradients with a graph, their products once, and the graph gone afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter

from torch import Tensor

from .. import passes
from ..flat import Groups, Selection, with_gradients
from ..gradients import detach, is_graph_taken, name_of, of_groups, take_graphs
from ..hessian_pass import (
    NO_GRAPH,
    GradientWatch,
    building_graphs,
    leaves_of,
    nodes_of,
    set_aside,
    twice_differentiable,
    warning_of_constants,
)
from ..run import Run
from .estimate import estimate
from .exact import SOURCES

_requires_grad = attrgetter("requires_grad")

# Those of steps at w': of several optimizers of one loss, none may move before all have their products.
_under_way: weakref.WeakSet[Curvature] = weakref.WeakSet()


class Curvature:
    """The Hessian's part in a step.

    Attributes:
        due: whether the gradients of the pass that comes next need a graph: this is a Hessian step.
        of: the parameters that were perturbed; of a step without perturbation, those that have a gradient.
        products: for each selection that took part the estimates of its Hessian; none before they are taken, and
            none on a lazy step.
    """

    def __init__(self, run: Run, groups: Groups) -> None:
        self._run, self._groups = run, groups
        self.due = False
        self.of: Sequence[Selection] = ()
        self.products: passes.Products = ()
        self._took_part: Sequence[Selection] = ()
        self._taken = False
        self._watch, run.watch = run.watch, None

    def expect(self, due: bool) -> None:
        """Gets ready for a pass that is a Hessian step's, or not."""
        self.due = due
        if due and self._watch is None and SOURCES[self._run.hvp].needs_graph:
            self._watch = GradientWatch(param for param in of_groups(self._groups) if param.requires_grad)

    def concerns(self, selections: Sequence[Selection]) -> bool:
        """Whether the schedule, or a parameter that has never had a Hessian, makes this a Hessian step."""
        return self._run.is_scheduled(self._groups) or any(selection.lacks_hessian() for selection in selections)

    def leave_w(self, moved: Sequence[Selection]) -> None:
        """The weights of these are at w' now."""
        self.of = moved
        _under_way.add(self)

    def gradients(self, repeated: bool) -> AbstractContextManager[None]:
        """What a pass of the network runs in, the second of its batch if repeated, so that its gradients are right."""
        if self.due:
            return building_graphs(lambda loss: self._around_backward(loss, repeated))
        return set_aside(self._run.others) if repeated else nullcontext()

    @contextmanager
    def _around_backward(self, loss: Tensor, repeated: bool) -> Iterator[None]:
        """Keeps the graph from the gradients of parameters that no step under way is about."""
        about = {param for one in {self, *_under_way} for param in of_groups(one._groups)}
        nodes = nodes_of([loss])
        self._run.others = [leaf for leaf in leaves_of(nodes) if leaf not in about]
        with warning_of_constants(nodes), set_aside(self._run.others) if repeated else nullcontext():
            yield
        detach(self._run.others)

    def take(self) -> None:
        """Takes the products where this is a Hessian step and they were not taken of the gradients that are there.

        So do other optimizers of the same loss whose weights are at w': all graphs hold the weights of all.
        """
        waiting = [self] if self.due and (not self._taken or self._has_graphs()) else []
        waiting += [other for other in list(_under_way) if other is not self and other._holds_weights_of(self)]
        taken = [one._take(keep_graph=one is not waiting[-1]) for one in waiting]
        for one, selections in zip(waiting, taken, strict=True):
            one.release(selections)

    def _holds_weights_of(self, other: Curvature) -> bool:
        """Whether the graph of gradients that wait for their products was built on the weights of the other."""
        if not self.due or not self._has_graphs():
            return False
        grads = [grad for selection in with_gradients(self.of) for grad in selection.grads]
        return not set(of_groups(other._groups)).isdisjoint(leaves_of(nodes_of(grads)))

    def may_take(self) -> bool:
        """Whether the gradients that are there tell the Hessian, or have told it to another optimizer's step."""
        return self._taken or self._has_graphs() or (self._watch is not None and self._watch.saw_graph)

    def _has_graphs(self) -> bool:
        return any(any(map(_requires_grad, selection.grads)) for selection in with_gradients(self.of))

    def _take(self, keep_graph: bool) -> Sequence[Selection]:
        """Products from the gradients in .grad, of every parameter that takes part; returns these.

        Raises:
            ValueError: a gradient has no graph, and is not known to be that of a parameter that enters linearly.
        """
        selections = with_gradients(self.of)
        products: passes.Products = ()
        if self.concerns(selections):
            if SOURCES[self._run.hvp].needs_graph:
                self._refuse_lost_graphs(selections)
            self.number_evaluation()
            first = self._groups[0]
            with passes.explained(selections), twice_differentiable():
                products = estimate(
                    SOURCES[self._run.hvp], selections, first["hessian_samples"], first["seed"], keep_graph
                )
        self.products, self._taken = products, True
        self._took_part = [selection.with_grads(()) for selection in selections]
        return selections

    def number_evaluation(self) -> None:
        """Tells the devices the index of this Hessian evaluation, on which the random signs depend."""
        for bucket in self._run.flat.buckets:
            bucket.evaluation.fill_(self._run.counts.evaluations)

    def release(self, selections: Sequence[Selection]) -> None:
        """Lets go of the graph of these gradients, and of those that others have got of it."""
        graph = [grad for selection in selections for grad in selection.grads]
        awaited = {param for one in _under_way if one is not self for param in of_groups(one._groups)}
        detach(of_groups(self._groups))
        take_graphs(leaf for leaf in leaves_of(nodes_of(graph)) if leaf not in awaited)

    def refuse_others(self, selections: Sequence[Selection]) -> None:
        """ValueError where products were taken of other parameters than these."""
        taken, now = ([(s.bucket, s.rows) for s in these] for these in (self._took_part, selections))
        if self.products and taken != now:
            raise ValueError(
                "step() found gradients of other parameters than restore() took Hessian products of: give the same "
                "parameters their gradients, or call restore() after the last backward"
            )

    def _refuse_lost_graphs(self, selections: Sequence[Selection]) -> None:
        grads = [(param, grad) for s in selections for param, grad in zip(s.params, s.grads, strict=True)]
        if any(is_graph_taken(grad) for _, grad in grads):
            raise ValueError(
                "another optimizer's step has used and freed the graph of these gradients. Two optimizers of one loss: "
                "call perturb() of both before the second backward, and step() of both after it"
            )
        if not any(grad.requires_grad for _, grad in grads) and not (self._watch and self._watch.saw_graph):
            raise ValueError(NO_GRAPH)
        for param, grad in grads:
            if self._watch is not None:
                fault = self._watch.fault(param, grad)
            else:
                fault = None if grad.requires_grad else "carries no graph, while others do"
            if fault is not None:
                raise ValueError(
                    f"this is a Hessian step, and the gradient of {name_of(param, self._groups)} {fault}. Its "
                    "curvature would be taken for 0. Within opt.hessian_pass() every backward builds a graph"
                )

    def end(self) -> None:
        """The step is over: no hook stays."""
        if self._watch is not None:
            self._watch.remove()
        _under_way.discard(self)
