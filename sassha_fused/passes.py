"""The passes over the parameters: the only calls of the operators, but for those of a Hessian estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from .checks import BIAS_CORRECTIONS, DTYPES, check_gradients
from .flat import Selection

Products = Sequence[Sequence[Tensor]]


def norm(selections: Sequence[Selection]) -> Tensor:
    """The norm of the gradients over all selections, a 0-d float64 tensor; refuses gradients that do not fit."""
    with explaining_refusals(selections):
        norms = [
            selection.bucket.operators.grad_norm(selection.grads, selection.params, selection.group["adaptive"])
            for selection in selections
        ]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def perturb(selections: Sequence[Selection], moved: list[Selection]) -> Tensor:
    """w -> w' in every bucket; returns N. Lists what has moved in moved, also where a later bucket fails."""
    # perturb_ takes the norm of a single bucket itself; of several, it is taken before any of them is written.
    measure = len(selections) == 1
    total = selections[0].bucket.norm if measure else norm(selections)
    with explaining_refusals(selections):
        for selection in selections:
            group, bucket = selection.group, selection.bucket
            bucket.operators.perturb_(
                selection.params,
                selection.grads,
                bucket.backup,
                selection.offsets,
                _on(bucket.device, total),
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


def back_up(selections: Sequence[Selection]) -> None:
    """backup <- w, where no perturbation did so."""
    for selection in selections:
        torch._foreach_copy_(selection.backups(), list(selection.params))


def update(
    selections: Sequence[Selection], products: Products, first_norm: Tensor, perturbed: bool, losses: Sequence[Tensor]
) -> None:
    """From w, as the backup has it, to the new weights in every bucket; wrong scalars are found before one is written.

    Where anything is not finite, weights and averages stay as they are, and the step is marked as skipped.

    Args:
        products: the Hessian estimates of each selection; none on a lazy step.
        first_norm: the norm of the first pass's gradients.
        perturbed: whether these gradients are those of a second pass, which nobody has looked at yet.
        losses: of every pass.
    """
    lrs = [s.group["lr"] for s in selections if isinstance(s.group["lr"], Tensor)]
    guards = [first_norm, *(_guard(scalar) for scalar in (*losses, *lrs))]
    # Of several buckets none may be written before all are known to be finite; of a single one, update_ finds out.
    guard_grads = perturbed and len(selections) == 1
    if not guard_grads:
        guards += [norm(selections)] if perturbed else []
        guards += [s.bucket.operators.grad_norm(p, (), False) for s, p in zip(selections, products, strict=False)]
    with explaining_refusals(selections):
        updates = [
            _prepared_update(selection, products[i] if products else (), guards, guard_grads)
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
        [_on(bucket.device, guard) for guard in guards],
        guard_grads,
        _on(bucket.device, lr) if is_tensor else None,
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


def _on(device: torch.device, scalar: Tensor) -> Tensor:
    return scalar if scalar.device == device else scalar.to(device, non_blocking=True)


def _guard(scalar: Tensor) -> Tensor:
    """A scalar as update_ takes it; a closure that runs backward itself may return a loss of any dtype."""
    return (scalar if scalar.dtype in DTYPES else scalar.double()).reshape(())


# A class, since a generator under contextmanager costs five times as much in every step.
class explaining_refusals:
    """Where an operator refuses its arguments, says which gradient or parameter it was, and why."""

    def __init__(self, selections: Sequence[Selection]) -> None:
        self._selections = selections

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (RuntimeError, TypeError, ValueError)):
            for selection in self._selections:
                check_gradients(selection.params, selection.grads)
                selection.check_shapes()
