"""When the products of steps are taken, and the graphs of their gradients let go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..gradients import detach, of_groups, take_graphs
from ..hessian_pass import leaves_of, nodes_of
from ..selection import Selection
from .of_step import Curvature, about, at_w_prime

if TYPE_CHECKING:
    from ..step import Step


def take_products(first: Step) -> None:
    """Takes the products of a step, where it is a Hessian step and they were not taken of the gradients that are there.

    So do other optimizers of the same loss whose weights are at w': all graphs hold the weights of all.
    """
    waiting: list[tuple[Step, Curvature, list[Any]]] = []
    if first.awaits_products and first.curvature:
        waiting.append((first, first.curvature, first.curvature.graph()))
    for other in list(at_w_prime.steps):
        if other is first or other.curvature is None:
            continue
        graph = other.curvature.graph()
        if not set(of_groups(first.groups)).isdisjoint(leaves_of(graph)):
            waiting.append((other, other.curvature, graph))
    for step, curvature, graph in waiting:
        curvature.take(graph, keep_graph=step is not waiting[-1][0])
    for step, _, graph in waiting:
        _release(step, graph)


def take_part(step: Step, is_last: bool) -> None:
    """Takes the products of one of a step's micro-batches, and lets go of its graph.

    Raises:
        ValueError: another optimizer of the same loss waits for its products, which would have to be taken as well.
    """
    curvature = step.curvature
    assert curvature is not None
    own = set(of_groups(step.groups))
    waiting = [o.curvature for o in at_w_prime.steps if o is not step and o.awaits_products and o.curvature]
    if not all(own.isdisjoint(leaves_of(other.graph())) for other in waiting):
        raise ValueError(
            "a Hessian step of several micro-batches while another optimizer waits for its second backward: take the "
            "steps one after the other, or the whole batch in one backward"
        )
    if not step.perturbed:
        curvature.of = step.with_current(list)
    graph = curvature.graph()
    curvature.take_part(graph, is_last)
    _release(step, graph)
    curvature.expect_next()


def release_graphs(step: Step, selections: Sequence[Selection]) -> list[Selection]:
    """Lets go of the graph of a step's gradients, and of those that others have got of it; returns what is left."""
    _release(step, nodes_of(grad for selection in selections for grad in selection.grads))
    return [selection.as_now() for selection in selections]


def _release(step: Step, graph: Iterable[Any]) -> None:
    awaited = about(other for other in at_w_prime.steps if other is not step)
    detach(of_groups(step.groups))
    take_graphs(leaf for leaf in leaves_of(graph) if leaf not in awaited)
