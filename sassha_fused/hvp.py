"""Where Hessian products come from, and how they become an estimate of the Hessian's diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from .layout import empty_dense, view_of
from .state import Selection

NO_GRAPH = (
    "this is a Hessian step, and the gradients carry no graph to differentiate a second time. Ways out: call "
    "loss.backward(create_graph=opt.hessian_due) in the second pass; or give step() a closure that only returns the "
    "loss, and the optimizer runs backward itself"
)


@dataclass(frozen=True)
class HessianSource:
    """A way to obtain Hz.

    Attributes:
        products: ``(params, gradients, signs, keep_graph) -> [Hz]``, the products of the Hessian of the loss at the
            current parameters with the probe ``signs``, one tensor per parameter; ``keep_graph``: more samples follow.
        needs_graph: whether the gradients must come from a backward with ``create_graph=True``.
    """

    products: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], bool], Sequence[Tensor]]
    needs_graph: bool


def autograd_products(
    params: Sequence[Tensor], gradients: Sequence[Tensor], signs: Sequence[Tensor], keep_graph: bool
) -> Sequence[Tensor]:
    r"""Exact products :math:`Hz = \partial \langle g, z \rangle / \partial w` by double backward (Pearlmutter, 1994).

    A parameter that enters the loss linearly, or not at all, has Hz = 0.
    """
    curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    if not curved:
        return [torch.zeros_like(z) for z in signs]
    return torch.autograd.grad(
        [gradients[i] for i in curved],
        params,
        [signs[i] for i in curved],
        retain_graph=keep_graph,
        allow_unused=True,
        materialize_grads=True,
    )


SOURCES: dict[str, HessianSource] = {"autograd": HessianSource(autograd_products, needs_graph=True)}


class GraphWatch:
    """Notices whether a backward pass builds the graph of its gradients: a linear loss leaves no other trace of it."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.built = False
        self._handle = register_multi_grad_hook(params, self._note, mode="any")

    def _note(self, _: Tensor) -> None:
        self.built = torch.is_grad_enabled()

    def remove(self) -> None:
        """Stops watching."""
        self._handle.remove()


def estimate(source: HessianSource, due: Sequence[Selection], samples: int, seed: int) -> list[list[Tensor]]:
    r"""Hutchinson's estimate :math:`\frac1S \sum_s z_s \cdot H z_s` of the Hessian's diagonal.

    Args:
        source: where the products come from.
        due: the parameters, with their gradients, that this evaluation concerns; the buckets know its index.
        samples: S, the number of probes.
        seed: key of the random signs.

    Returns:
        For each selection one tensor per parameter, of its shape. With S = 1 the sign is left off: |z Hz| = |Hz|.
    """
    if samples == 1:
        return _sample(source, due, seed, 0, keep_graph=False)
    means = [torch.empty_like(selection.bucket.exp_hessian) for selection in due]
    for sample in range(samples):
        products = _sample(source, due, seed, sample, keep_graph=sample < samples - 1)
        for selection, mean, found in zip(due, means, products, strict=True):
            bucket = selection.bucket
            bucket.operators.hutchinson_(
                found, mean, selection.offsets, selection.indices, seed, bucket.evaluation, sample, samples
            )
        del products, found  # before the next probe takes its memory
    return [
        [view_of(mean, offset, param) for param, offset in zip(selection.params, selection.offsets, strict=True)]
        for selection, mean in zip(due, means, strict=True)
    ]


def _sample(
    source: HessianSource, due: Sequence[Selection], seed: int, sample: int, keep_graph: bool
) -> list[list[Tensor]]:
    """The products Hz with one probe z, by selection, in the memory order of their parameters."""
    params = [param for selection in due for param in selection.params]
    gradients = [gradient for selection in due for gradient in selection.grads]
    probe: list[Tensor] = []
    for selection in due:
        signs = [empty_dense(param) for param in selection.params]
        selection.bucket.operators.rademacher_(signs, selection.indices, seed, selection.bucket.evaluation, sample)
        probe += signs
    found = source.products(params, gradients, probe, keep_graph)
    products = iter([_in_order_of(z, product) for z, product in zip(probe, found, strict=True)])
    return [[next(products) for _ in selection.params] for selection in due]


def _in_order_of(z: Tensor, product: Tensor) -> Tensor:
    product = product.detach()
    return product if product.stride() == z.stride() else torch.empty_like(z).copy_(product)
