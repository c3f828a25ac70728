"""Hessian products of several backward passes, each taken by itself and summed: those of micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import passes
from ..flat import Groups
from ..gradients import name_of, of_groups
from ..hessian_pass import NO_GRAPH, GradientWatch, twice_differentiable
from ..layout import empty_dense, state_dtype
from ..run import Run
from ..selection import Selection, with_gradients
from .estimate import estimate
from .exact import SOURCES
from .of_step import Curvature, release_graphs

if TYPE_CHECKING:
    from ..step import Step


class SummedCurvature(Curvature):
    """The Hessian's part in a step whose gradients come from several backward passes; add() follows each of them.

    All take their products with the same random signs, so that the sum is the product of the sum of their losses, and
    each graph is freed before the next pass. Without add() it is any other Curvature.
    """

    def __init__(self, run: Run, groups: Groups, of: Sequence[Selection]) -> None:
        super().__init__(run, groups, of)
        self._sums: dict[Tensor, Tensor] = {}

    def add(self, step: Step) -> None:
        """Takes the products of the backward pass before it, and lets go of its graph.

        Raises:
            ValueError: no gradient has a graph, or one that has just arrived has lost it.
        """
        with self._run.uninterrupted:  # hooks are moved about
            selections = with_gradients(self.of)
            self._refuse_without_graph(selections)
            self.number_evaluation()
            samples, seed = (int(self._groups[0][name]) for name in ("hessian_samples", "seed"))
            with passes.explaining_refusals(selections), twice_differentiable():
                keeps_sign = self._run.flat.method.second_average == "signed"
                found = estimate(SOURCES[self._run.hvp], selections, samples, seed, keeps_sign, keep_graph=False)
            for selection, products in zip(selections, found, strict=True):
                for param, product in zip(selection.params, products, strict=True):
                    self._sums[param] = self._sum_of(param).add_(product)
            self.taken = True
            release_graphs(step, selections)
            self._watch_next_pass()

    def clear(self) -> None:
        """Forgets what was added."""
        self._sums, self.taken = {}, False

    def products_of(self, selections: Sequence[Selection]) -> passes.Products:
        """The sums; what no pass has reached has none but 0."""
        if not self._sums:
            return super().products_of(selections)
        self.end()
        return [[self._sum_of(param) for param in selection.params] for selection in selections]

    def _sum_of(self, param: Tensor) -> Tensor:
        known = self._sums.get(param)
        return torch.zeros_like(empty_dense(param), dtype=state_dtype(param)) if known is None else known

    def _refuse_without_graph(self, selections: Sequence[Selection]) -> None:
        """A gradient that this pass has not reached may be there without a graph: it is that of a pass before."""
        pairs = [pair for s in selections for pair in zip(s.params, s.grads, strict=True)]
        if not any(grad.requires_grad for _, grad in pairs) and not (self._watch and self._watch.saw_graph):
            raise ValueError(NO_GRAPH)
        for param, grad in pairs if self._watch is not None else ():
            if self._watch.has_seen(param) and (fault := self._watch.fault(param, grad)) is not None:  # type: ignore[union-attr]
                raise ValueError(
                    f"set_hessian() found that the gradient of {name_of(param, self._groups)} {fault}. Its curvature "
                    "would be taken for 0. Call loss.backward(create_graph=True) before each set_hessian()"
                )

    def _watch_next_pass(self) -> None:
        self.end()
        self._watch = GradientWatch(param for param in of_groups(self._groups) if param.requires_grad)
        self.end = weakref.finalize(self, self._watch.remove)
