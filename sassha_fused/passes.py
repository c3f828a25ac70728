"""The passes over the parameters: the only calls of the operators, but for those of a Hessian estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .checks import BIAS_CORRECTIONS, DTYPES, check_gradients
from .flat import Selection

Products = Sequence[Sequence[Tensor]]


def norm(selections: Sequence[Selection]) -> Tensor:
    """The norm of the gradients over all selections, a 0-d float64 tensor; refuses gradients that do not fit."""
    with explained(selections):
        norms = [
            selection.bucket.operators.grad_norm(selection.grads, selection.params, selection.group["adaptive"])
            for selection in selections
        ]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def perturb(selections: Sequence[Selection], moved: list[Selection]) -> Tensor:
    """w -> w' in every bucket; returns N. What has moved stands in moved, also where a later bucket fails."""
    # A pass over a single bucket measures the norm itself; of several, all are measured before one is written.
    measure = len(selections) == 1
    device = selections[0].bucket.device
    total = torch.empty((), dtype=torch.float64, device=device) if measure else norm(selections)
    with explained(selections):
        for selection in selections:
            group, bucket = selection.group, selection.bucket
            bucket.operators.perturb_(
                selection.params,
                selection.grads,
                bucket.backup,
                selection.offsets,
                total.to(bucket.device, non_blocking=True),
                measure,
                group["rho"],
                group["adaptive"],
                group["maximize"],
            )
            moved.append(selection)
            increment_version(selection.params)
    return total


def back_up(selections: Sequence[Selection]) -> None:
    """backup <- w, where nothing was perturbed."""
    for selection in selections:
        torch._foreach_copy_(selection.backups(), list(selection.params))


def put_back(selections: Sequence[Selection]) -> None:
    """w' -> w, bit for bit."""
    for selection in selections:
        torch._foreach_copy_(list(selection.params), selection.backups())


def swap_with_backup(selections: Sequence[Selection]) -> None:
    """Puts w in the parameters' place and w' in the backup's, or the other way round, unseen by autograd."""
    for selection in selections:
        for param, backup in zip(selection.params, selection.backups(), strict=True):
            elsewhere = param.data.clone()
            param.data.copy_(backup)
            backup.copy_(elsewhere)


def update(
    selections: Sequence[Selection], products: Products, guards: Sequence[Tensor], guard_grads: bool = False
) -> None:
    """From w to the new weights in every bucket; what is wrong with a scalar is found before any bucket is written.

    products: the Hessian estimates of each selection, none on a lazy step. Nothing is written but skipped where a
    guard, or if guard_grads any gradient or product, is not finite.
    """
    with explained(selections):
        updates = [
            _prepared_update(selection, products[i] if products else (), guards, guard_grads)
            for i, selection in enumerate(selections)
        ]
        for selection, run in zip(selections, updates, strict=True):
            run()
            increment_version(selection.params)


def _prepared_update(
    selection: Selection, products: Sequence[Tensor], guards: Sequence[Tensor], guard_grads: bool
) -> Callable[[], None]:
    group, bucket, lr = selection.group, selection.bucket, selection.group["lr"]
    is_tensor = isinstance(lr, Tensor)
    beta1, beta2 = group["betas"]
    arguments = (
        selection.params,
        selection.grads,
        products,
        bucket.backup,
        bucket.exp_avg,
        bucket.exp_hessian,
        bucket.counts,
        bucket.skipped,
        selection.offsets,
        selection.rows,
        [guard.to(bucket.device, non_blocking=True) for guard in guards],
        guard_grads,
        lr.to(bucket.device, non_blocking=True) if is_tensor else None,
        0.0 if is_tensor else float(lr),
        beta1,
        beta2,
        float(group["eps"]),
        float(group["weight_decay"]),
        float(group["hessian_power"]),
        BIAS_CORRECTIONS.index(group["bias_correction"]),
        group["maximize"],
    )
    return lambda: bucket.operators.update_(*arguments)


def guard_of(scalar: Tensor) -> Tensor:
    """A scalar as update_ takes it; a closure that runs backward itself may return a loss of any dtype."""
    return (scalar if scalar.dtype in DTYPES else scalar.double()).reshape(())


def norms_of(selections: Sequence[Selection], products: Products) -> list[Tensor]:
    """A guard for the products of each bucket."""
    return [
        selection.bucket.operators.grad_norm(found, (), False)
        for selection, found in zip(selections, products, strict=False)
    ]


@contextmanager
def explained(selections: Sequence[Selection]) -> Iterator[None]:
    """Where an operator refuses its arguments, says which gradient or parameter it was, and why."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError):
        for selection in selections:
            check_gradients(selection.params, selection.grads)
            selection.check_shapes()
        raise
