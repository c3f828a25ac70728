"""The passes over the parameters: the only calls of the operators, but for those of a Hessian estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

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
            forget_copies()
    return total


def put_back(selections: Sequence[Selection]) -> None:
    """w' -> w, bit for bit."""
    for selection in selections:
        torch._foreach_copy_(list(selection.params), selection.backups())
    forget_copies()


def forget_copies() -> None:
    """Casts that autocast keeps of the weights, and parametrized weights, are of where the weights were."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def swap_with_backup(selections: Sequence[Selection]) -> None:
    """Puts w in the parameters' place and w' in the backup's, or the other way round, unseen by autograd."""
    for selection in selections:
        for param, backup in zip(selection.params, selection.backups(), strict=True):
            elsewhere = param.data.clone()
            param.data.copy_(backup)
            backup.copy_(elsewhere)
    forget_copies()


def update(
    selections: Sequence[Selection], products: Products, norm_of_first: Tensor | None, losses: Sequence[Tensor]
) -> None:
    """From w to the new weights in every bucket; what is wrong with a scalar is found before any bucket is written.

    Where anything is not finite, nothing is written but that the step was skipped.

    Args:
        products: the Hessian estimates of each selection; none on a lazy step.
        norm_of_first: the norm of the gradients by which the weights were perturbed, whose backup holds w; None where
            they were not.
        losses: of every pass.
    """
    lrs = [s.group["lr"] for s in selections if isinstance(s.group["lr"], Tensor)]
    guards = [_guard(scalar) for scalar in (*losses, *lrs)]
    # Of several buckets none may be written before all are known to be finite; one alone, update_ itself looks at.
    look = norm_of_first is not None and len(selections) == 1
    if not look:
        guards.append(norm(selections))
        guards += [s.bucket.operators.grad_norm(p, (), False) for s, p in zip(selections, products, strict=False)]
    if norm_of_first is None:
        for selection in selections:
            torch._foreach_copy_(selection.backups(), list(selection.params))
    else:
        guards.append(norm_of_first)
    with explained(selections):
        updates = [
            _prepared_update(selection, products[i] if products else (), guards, look)
            for i, selection in enumerate(selections)
        ]
        for selection, run in zip(selections, updates, strict=True):
            run()
            increment_version(selection.params)
    forget_copies()


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


def _guard(scalar: Tensor) -> Tensor:
    """A scalar as update_ takes it; a closure that runs backward itself may return a loss of any dtype."""
    return (scalar if scalar.dtype in DTYPES else scalar.double()).reshape(())


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
