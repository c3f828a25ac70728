"""Hutchinson's estimate of the Hessian's diagonal, from products with random signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import empty_dense, view_of
from ..selection import Selection
from .exact import HessianSource


def estimate(
    source: HessianSource, selections: Sequence[Selection], samples: int, seed: int, keeps_sign: bool, keep_graph: bool
) -> list[Sequence[Tensor]]:
    r"""Hutchinson's estimate :math:`\frac1S \sum_s z_s \cdot H z_s` of the Hessian's diagonal.

    Args:
        source: where the products come from.
        selections: the parameters, with their gradients; the buckets know the index of this evaluation.
        samples: S, the number of probes.
        seed: key of the random signs.
        keeps_sign: whether the second average is of H itself, not of |H| or H^2.
        keep_graph: whether somebody else needs the gradients' graph afterwards.

    Returns:
        For each selection one tensor per parameter, of its shape. With S = 1 the sign is left off where none is needed:
        |z Hz| = |Hz|.
    """
    if samples == 1:
        return _sample(source, selections, seed, 0, keep_graph, times_probe=keeps_sign)
    means = [torch.empty_like(selection.bucket.exp_avg) for selection in selections]
    for sample in range(samples):
        products = _sample(source, selections, seed, sample, keep_graph or sample < samples - 1)
        for selection, mean, found in zip(selections, means, products, strict=True):
            bucket = selection.bucket
            bucket.operators.hutchinson_(
                found, mean, selection.offsets, selection.indices, seed, bucket.evaluation, sample, samples
            )
        del products, found  # before the next probe takes its memory
    return [
        [view_of(mean, offset, param) for param, offset in zip(selection.params, selection.offsets, strict=True)]
        for selection, mean in zip(selections, means, strict=True)
    ]


def _sample(
    source: HessianSource,
    selections: Sequence[Selection],
    seed: int,
    sample: int,
    keep_graph: bool,
    times_probe: bool = False,
) -> list[Sequence[Tensor]]:
    """The products Hz with one probe z, or z Hz, by selection, in the memory order of their parameters."""
    params = [param for selection in selections for param in selection.params]
    gradients = [gradient for selection in selections for gradient in selection.grads]
    probe: list[Tensor] = []
    for selection in selections:
        signs = [empty_dense(param) for param in selection.params]
        selection.bucket.operators.rademacher_(signs, selection.indices, seed, selection.bucket.evaluation, sample)
        probe += signs
    found = list(source.products(params, gradients, probe, keep_graph))
    products = iter(_times(probe, found) if times_probe else map(_in_order_of, probe, found))
    return [[next(products) for _ in selection.params] for selection in selections]


def _times(probe: list[Tensor], products: list[Tensor]) -> Sequence[Tensor]:
    """z Hz, in the memory of z, unless autograd gives some of the probe back, as where the loss is a product ab."""
    memory_of_probe = {z.untyped_storage()._cdata for z in probe}
    if not memory_of_probe.isdisjoint([product.untyped_storage()._cdata for product in products]):
        return torch._foreach_mul(probe, products)
    torch._foreach_mul_(probe, products)
    return probe


def _in_order_of(z: Tensor, product: Tensor) -> Tensor:
    product = product.detach()
    return product if product.stride() == z.stride() else torch.empty_like(z).copy_(product)
