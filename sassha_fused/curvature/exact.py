"""Exact Hessian products by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functions


@dataclass(frozen=True)
class HessianSource:
    """A way to obtain Hz.

    Attributes:
        products: ``(params, gradients, signs, keep_graph) -> [Hz]``, the products of the Hessian of the loss at the
            current parameters with the probe ``signs``, one tensor per parameter; ``keep_graph``: the graph is needed
            once more.
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
    try:
        with _hooks_at_rest(params):
            return torch.autograd.grad(
                [gradients[i] for i in curved],
                params,
                [signs[i] for i in curved],
                retain_graph=keep_graph,
                allow_unused=True,
                materialize_grads=True,
            )
    except RuntimeError as error:
        raise RuntimeError(with_way_out(error)) from error


@contextmanager
def _hooks_at_rest(params: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of the user's change gradients, and their graph has them in it; products they would change once more."""
    resting = [(hooks, dict(hooks)) for param in params if (hooks := param._backward_hooks)]
    try:
        for hooks, _ in resting:
            hooks.clear()
        yield
    finally:
        for hooks, entries in resting:
            hooks.update(entries)


def refuse_once_differentiable(nodes: Iterable[Any]) -> None:
    """RuntimeError where one of these, of the graph of gradients, is that of a function marked @once_differentiable.

    Torch raises where it comes to such a node, which it does not on its way to inputs that are asked for by name.
    """
    if _functions.Error in set(map(type, nodes)):  # type: ignore[attr-defined]
        raise RuntimeError(
            with_way_out("trying to differentiate twice a function that was marked with @once_differentiable")
        )


def with_way_out(error: RuntimeError | str) -> str:
    """Torch's message of an operator that has no double backward, and what to do."""
    return (
        f"{error}\n\nThis was the double backward of a Hessian step of sassha_fused. Where it is an operator that "
        "cannot be differentiated twice: run the second pass within opt.hessian_pass(), which avoids those that torch "
        "has a substitute for (attention, compiled models; closures are run in it anyway); else write that operation "
        "with others (nn.Embedding and a mean for nn.EmbeddingBag), or leave its parameters to another optimizer"
    )


SOURCES: dict[str, HessianSource] = {"autograd": HessianSource(autograd_products, needs_graph=True)}
