"""What a step takes of the Hessian: gradients with a graph, their products once, and the graph gone afterwards."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import passes
from ..flat import Groups
from ..gradients import detach, is_graph_taken, name_of, of_groups
from ..hessian_pass import (
    NO_GRAPH,
    leaves_of,
    nodes_of,
    set_aside,
    twice_differentiable,
    warning_of_constants,
)
from ..run import Run
from ..selection import Selection, with_gradients
from .estimate import estimate
from .exact import SOURCES, refuse_once_differentiable

if TYPE_CHECKING:
    from ..step import Step

_requires_grad = attrgetter("requires_grad")

# Steps that may build a graph in vain before somebody is told.
_PATIENCE = 20


class _AtWPrime(threading.local):
    """Steps of this thread whose weights are at w'.

    Of several optimizers of one loss none may move before all have their products.
    """

    def __init__(self) -> None:
        self.steps: weakref.WeakSet[Step] = weakref.WeakSet()


at_w_prime = _AtWPrime()


def about(steps: Iterable[Step]) -> set[Tensor]:
    """The parameters of their optimizers."""
    return {param for step in steps for param in of_groups(step.groups)}


class Curvature:
    """The Hessian's part in a Hessian step.

    Attributes:
        of: the parameters that were perturbed; of a step without perturbation, those that have a gradient.
        taken: whether the products have been taken.
        products: for each selection that took part the estimates of its Hessian; none before they are taken, and
            none where the only parameters that asked for this Hessian step had no second gradient.
        parts: of how many micro-batches products have been added.
    """

    def __init__(self, run: Run, groups: Groups, of: Sequence[Selection]) -> None:
        self._run, self._groups, self.of = run, groups, of
        self.products: passes.Products = ()
        self._took_part: Sequence[Selection] = ()
        self.parts, self._sums = 0, dict[Tensor, Tensor]()
        self.taken = False
        self._watch, run.watch = run.watch, None
        if self._watch is None and SOURCES[run.hvp].needs_graph:
            self._watch = run.new_watch(groups)
        # No hook stays where the optimizer is dropped in the middle of a step.
        self._unwatch = weakref.finalize(self, self._watch.remove) if self._watch is not None else lambda: None

    def end(self) -> None:
        """No pass of this step is to come: its hooks go, and what else it holds of graphs."""
        self._unwatch()
        if self._run.processes is not None:
            self._run.processes.let_go(of_groups(self._groups))

    @contextmanager
    def around_backward(self, step: Step, loss: Tensor) -> Iterator[None]:
        """Keeps the graph from the gradients of parameters that no step under way is about."""
        nodes = nodes_of([loss])
        own = about({step, *at_w_prime.steps})
        others = [leaf for leaf in leaves_of(nodes) if leaf not in own]
        self._run.others = [*self._run.others, *(leaf for leaf in others if isinstance(leaf, Parameter))]
        try:
            with warning_of_constants(nodes), set_aside(others) if step.is_second_pass else nullcontext():
                yield
        finally:
            detach(others)

    def may_take(self) -> bool:
        """Whether the gradients that are there tell the Hessian, or have told it to another optimizer's step."""
        return self.taken or self._has_graphs() or (self._watch is not None and self._watch.saw_graph)

    def _own(self) -> Sequence[Selection]:
        """What takes part, with its gradients; of several replicas, with this one's."""
        selections = with_gradients(self.of)
        return selections if self._run.processes is None else self._run.processes.own(selections)

    def _has_graphs(self) -> bool:
        return any(any(map(_requires_grad, selection.grads)) for selection in self._own())

    def graph(self) -> list[Any]:
        """The nodes of the graph of the gradients."""
        return nodes_of(grad for selection in self._own() for grad in selection.grads)

    def take(self, graph: Sequence[Any], keep_graph: bool) -> None:
        """Products from the gradients in .grad, of every parameter that takes part.

        Args:
            graph: the nodes of these gradients' graph.
            keep_graph: whether another step needs it afterwards.

        Raises:
            ValueError: a gradient has no graph, and is not known to be that of a parameter that enters linearly.
            RuntimeError: the graph cannot be differentiated.
        """
        with self._run.uninterrupted:  # hooks are moved about
            selections, own = with_gradients(self.of), self._own()
            self.products = ()
            if self._are_due(selections):
                products = self._estimate(own, graph, keep_graph)
                if self._run.processes is None:
                    self.products = products
                else:  # each may have taken products of other parameters
                    self._add(own, products)
            elif selections:
                self._notice_graph_in_vain()
            self._took_part = [selection.with_grads(()) for selection in selections]
            self.conclude()

    def take_part(self, graph: Sequence[Any], is_last: bool) -> None:
        """Adds the products of one of several micro-batches, with the same probe, as take() takes them of a batch.

        is_last: whether no other is to come; where hessian_batches are fewer, the last of those is.
        """
        with self._run.uninterrupted:
            own = self._own()
            self._add(own, self._estimate(own, graph, keep_graph=False))
            if is_last or self.parts == self._groups[0]["hessian_batches"]:
                self.conclude()

    def _are_due(self, selections: Sequence[Selection]) -> bool:
        """Whether products are due where these are the parameters that take part."""
        return self._run.counts.next_is_scheduled(self._groups[0]) or any(s.lacks_hessian() for s in selections)

    def _estimate(self, selections: Sequence[Selection], graph: Sequence[Any], keep_graph: bool) -> passes.Products:
        if not selections and self._run.processes is not None:
            return ()  # this replica has used none of the parameters
        if SOURCES[self._run.hvp].needs_graph:
            self._refuse_lost_graphs(selections)
        self.number_evaluation()
        samples, seed = (int(self._groups[0][name]) for name in ("hessian_samples", "seed"))
        with passes.explaining_refusals(selections), twice_differentiable():
            refuse_once_differentiable(graph)
            keeps_sign = self._run.flat.method.second_average == "signed"
            return estimate(SOURCES[self._run.hvp], selections, samples, seed, keeps_sign, keep_graph)

    def _add(self, selections: Sequence[Selection], products: passes.Products) -> None:
        for selection, of_bucket in zip(selections, products, strict=True):
            for param, product in zip(selection.params, of_bucket, strict=True):
                self._sums[param] = self._sums[param] + product if param in self._sums else product
        self.parts += 1

    def conclude(self) -> None:
        """No products are to come."""
        self.taken = True
        self.end()

    def forget_parts(self) -> None:
        """Forgets the products that were taken of micro-batches so far."""
        self.parts, self._sums = 0, {}
        if self._watch is not None:
            self._watch.forget()

    def expect_next(self) -> None:
        """The graph of a micro-batch is gone; another one comes."""
        if self._watch is not None and not self.taken:
            self._watch.next_micro_batch()

    def _notice_graph_in_vain(self) -> None:
        """Warns where a graph is built in step after step, for the first Hessian of what never has a gradient."""
        self._run.graphs_in_vain += 1
        if self._run.graphs_in_vain != _PATIENCE:
            return
        trained = [param for param in of_groups(self._groups) if param.requires_grad]
        if missing := [param for param in trained if self._run.flat.lacks_hessian([param])]:
            warnings.warn(
                f"{_PATIENCE} steps have built a graph, and taken the time of Hessian steps, for the first Hessian of "
                f"parameters that had no gradient in them, as {name_of(missing[0], self._groups)}: freeze these, or "
                "leave them out of the optimizer",
                stacklevel=2,
            )

    def number_evaluation(self) -> None:
        """Tells the devices the index of this Hessian evaluation, on which the random signs depend."""
        for bucket in self._run.flat.buckets:
            bucket.evaluation.fill_(self._run.counts.evaluations)

    def products_of(self, selections: Sequence[Selection], micro_batches: int) -> passes.Products:
        """The products that were taken of these; ValueError where they were taken of other parameters."""
        if self.parts:
            if not self._are_due(selections):  # which only the last micro-batch tells where a parameter joins
                self._notice_graph_in_vain()
                return ()
            factor, processes = micro_batches / self.parts, self._run.processes
            sums = [[self._sum_of(param, factor) for param in selection.params] for selection in selections]
            return sums if processes is None else processes.mean(sums)
        taken, now = ([(s.bucket, s.rows) for s in these] for these in (self._took_part, selections))
        if self.products and taken != now:
            raise ValueError(
                "step() found gradients of other parameters than restore() took Hessian products of: give the same "
                "parameters their gradients, or call restore() after the last backward"
            )
        return self.products

    def _sum_of(self, param: Tensor, factor: float) -> Tensor:
        if param not in self._sums:  # used by none of the micro-batches that products were taken of
            if self._run.processes is None and self._run.flat.lacks_hessian([param]):
                raise ValueError(
                    f"hessian_batches={self.parts}, and none of the first {self.parts} micro-batches uses "
                    f"{name_of(param, self._groups)}, whose first curvature would be taken for 0: set it to a larger "
                    "number, or to None for all micro-batches"
                )
            return torch.zeros_like(param)
        return self._sums[param] if factor == 1 else self._sums[param] * factor

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
