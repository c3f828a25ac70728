"""The passes over the parameters: the only calls of the operators, but for those of a Hessian estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from .checks import DTYPES, check_gradients
from .layout import sent, wide_dtype
from .selection import Selection
from .settings import SECOND_AVERAGES

Products = Sequence[Sequence[Tensor]]


def norm(selections: Sequence[Selection]) -> Tensor:
    """The norm of the gradients over all selections, a 0-d float64 tensor; refuses gradients that do not fit."""
    with explaining_refusals(selections):
        norms = [
            s.bucket.operators.grad_norm(s.grads, s.params, s.layouts, bool(s.bucket.settings.adaptive))
            for s in selections
        ]
    return _together(norms)


def _norm_of_averages(selections: Sequence[Selection]) -> Tensor:
    """The same of exp_avg, which has the dtype of the state; measured where the last update has not left it."""
    for s in selections:
        s.check_current()
        if not s.bucket.knows_norm_of(s.rows):
            s.bucket.norm_is_of = None
            place = (s.params, s.layouts, True) if s.bucket.settings.adaptive else ((), None, False)
            s.bucket.norm.copy_(s.bucket.operators.grad_norm(s.grads, *place))
    return _together([s.bucket.norm for s in selections])


def _together(norms: Sequence[Tensor]) -> Tensor:
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([_on(norms[0].device, norm) for norm in norms]))


def perturb(
    selections: Sequence[Selection], moved: list[Selection], along_averages: bool = False, exact: bool = True
) -> Tensor:
    """w -> w' in every bucket; returns N. Lists what has moved, also where a later bucket fails.

    Args:
        along_averages: whether the selections have exp_avg for gradients.
        exact: whether w goes into the backup; else it is worked out from w' and exp_avg.
    """
    # perturb_ takes the norm of a single bucket itself; of several, it is taken before any of them is written.
    single = selections[0] if len(selections) == 1 else None
    measure = single is not None and not (along_averages and single.bucket.knows_norm_of(single.rows))
    total_of = _norm_of_averages if along_averages else norm
    total = single.bucket.norm if single is not None else total_of(selections)
    with explaining_refusals(selections, of_gradients=not along_averages):
        for selection in selections:
            bucket, of_bucket = selection.bucket, _on(selection.bucket.device, total)
            if measure:
                bucket.norm_is_of = None
            _perturb(selection, of_bucket, measure, exact)
            if along_averages and not bucket.settings.adaptive:
                bucket.note_norm_of(selection.rows)
            selection.norm = None if exact else of_bucket
            moved.append(selection)
            increment_version(selection.params)
            forget_copies()
    return total


def back_up(selections: Sequence[Selection]) -> None:
    """backup <- w, where nothing was perturbed."""
    for selection in selections:
        torch._foreach_copy_(selection.backups(), list(selection.params))


def _perturb(selection: Selection, norm: Tensor, measure: bool, exact: bool) -> None:
    bucket = selection.bucket
    bucket.operators.perturb_(
        selection.params,
        selection.grads,
        bucket.backup if exact else None,
        selection.offsets,
        selection.rows,
        selection.layouts,
        norm,
        measure,
        bucket.table.values,
        bucket.settings,
    )


@torch.no_grad()  # Ctrl-C may come just as a pass turns gradients on
def put_back(selections: Sequence[Selection]) -> None:
    """w' -> w, bit for bit; to rounding, where there is no backup. Without either w is in the parameters."""
    for selection in selections:
        if selection.norm is not None:
            _unperturb(selection)
            selection.norm = None  # w is in the parameters again
        elif pairs := _with_backups(selection):
            torch._foreach_copy_([param for param, _ in pairs], [backup for _, backup in pairs])
    forget_copies()


def _unperturb(selection: Selection) -> None:
    """w' -> w, where no copy tells it: what update_ does in a step that is skipped, without more memory."""
    bucket = selection.bucket
    not_finite, skipped = torch.full_like(bucket.norm, torch.nan), torch.zeros_like(bucket.skipped)
    any_gradients = replace(selection, grads=selection.params)
    _prepared_update(any_gradients, (), None, None, [not_finite], False, False, skipped)()
    increment_version(selection.params)


def _with_backups(selection: Selection) -> list[tuple[Tensor, Tensor]]:
    # What somebody has given another shape between the passes keeps what it was given.
    pairs = zip(selection.params, selection.backups(), strict=True)
    return [(param, backup) for param, backup in pairs if param.shape == backup.shape]


def forget_copies() -> None:
    """Casts that autocast keeps of the weights, and parametrized weights, are of where the weights were."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def swap_with_backup(selections: Sequence[Selection]) -> None:
    """Puts w in the parameters' place and w' in the backup's, or the other way round, unseen by autograd."""
    for selection in selections:
        if selection.norm is not None:
            _swap_without_backup(selection)
            continue
        for param, backup in _with_backups(selection):
            elsewhere = param.data.clone()
            param.data.copy_(backup)
            backup.copy_(elsewhere)
    forget_copies()


def _swap_without_backup(selection: Selection) -> None:
    arrays = [param.data for param in selection.params]
    if selection.elsewhere is None:
        selection.elsewhere = [data.clone() for data in arrays]
        _unperturb(replace(selection, params=arrays))
    else:
        for data, elsewhere in zip(arrays, selection.elsewhere, strict=True):
            data.copy_(elsewhere)
        selection.elsewhere = None


def update(
    selections: Sequence[Selection],
    products: Products,
    first_norm: Tensor,
    perturbed: bool,
    backed_up: bool,
    losses: Sequence[Tensor],
    updated: list[Selection],
) -> None:
    """From w to the new weights in every bucket; wrong scalars are found before one is written.

    Where anything is not finite, weights and averages stay as they are, and the step is marked as skipped.

    Args:
        products: the Hessian estimates of each selection; none on a lazy step.
        first_norm: that of what was perturbed along, or of the only pass's gradients.
        perturbed: whether these gradients are those at w', which nobody has looked at yet.
        backed_up: whether w is in the backup; else it is in the parameters.
        losses: of every pass.
        updated: lists those whose update has run, also where that of a later one fails.
    """
    averaged = [_block_average(s, p) for s, p in zip(selections, products, strict=False)]
    guards = [first_norm, *map(_guard, losses)]
    for table in [selection.bucket.table for selection in selections if selection.bucket.table.rates]:
        guards.append(table.take_in_rates())
    # Of several buckets none may be written before all are known to be finite; of a single one, update_ finds out.
    guard_grads = perturbed and len(selections) == 1
    if perturbed and not guard_grads:
        guards.append(norm(selections))
    for selection, product, average in zip(selections, products, averaged, strict=False):
        if average is not None or not guard_grads:
            # The square of what is not finite counts as the largest float, so that the average does not tell.
            hidden = SECOND_AVERAGES[int(selection.bucket.settings.second_average)] == "square"
            estimates = product if average is None or hidden else [average]
            guards.append(selection.bucket.operators.grad_norm(estimates, (), None, False))
    with explaining_refusals(selections):
        updates = []
        for i, selection in enumerate(selections):
            bucket = selection.bucket
            summed = products[i] if products and averaged[i] is None else ()
            average = averaged[i] if products else None
            # Where exp_avg's norm is known of the same parameters it stays so, also if the device skips this step.
            known = bucket.norm_is_of is not None and bucket.knows_norm_of(selection.rows)  # no call for those without
            norm_of_next = bucket.norm if known and not summed else None
            flags = (guard_grads, backed_up, bucket.skipped)
            updates.append((norm_of_next, _prepared_update(selection, summed, average, norm_of_next, guards, *flags)))
        for selection, (norm_of_next, run) in zip(selections, updates, strict=True):
            selection.bucket.norm_is_of = None
            run()
            if norm_of_next is not None:
                selection.bucket.note_norm_of(selection.rows)
            updated.append(selection)
            increment_version(selection.params)
    if backed_up and not perturbed:
        for selection in selections:
            vars(selection.bucket).pop("backup")  # memory that no next perturbation needs
    forget_copies()


def _block_average(selection: Selection, products: Sequence[Tensor]) -> Tensor | None:
    """What D becomes by these products, where elements share it by blocks."""
    bucket = selection.bucket
    if bucket.block == 1 or bucket.exp_hessian is None:
        return None
    averaged = bucket.exp_hessian.clone()
    bucket.operators.block_average_(
        products, bucket.exp_hessian, averaged, selection.offsets, bucket.blocked, bucket.settings
    )
    return averaged


def _prepared_update(
    selection: Selection,
    products: Sequence[Tensor],
    averaged: Tensor | None,
    exp_avg_norm: Tensor | None,
    guards: Sequence[Tensor],
    guard_grads: bool,
    backed_up: bool,
    skipped: Tensor,
) -> Callable[[], None]:
    bucket = selection.bucket
    arguments = (
        selection.params,
        selection.grads,
        products,
        averaged,
        bucket.backup if backed_up else None,
        selection.norm,
        bucket.exp_avg,
        bucket.exp_hessian,
        exp_avg_norm,
        bucket.counts,
        skipped,
        selection.offsets,
        selection.rows,
        selection.layouts,
        bucket.blocked,
        [_on(bucket.device, guard) for guard in guards],
        guard_grads,
        bucket.table.values,
        bucket.settings,
    )
    return lambda: bucket.operators.update_(*arguments)


def _on(device: torch.device, scalar: Tensor) -> Tensor:
    return scalar if scalar.device == device else sent(device, scalar)


def _guard(scalar: Tensor) -> Tensor:
    """A scalar as update_ takes it; a closure that runs backward itself may return a loss of any dtype."""
    return (scalar if scalar.dtype in DTYPES else scalar.to(wide_dtype(scalar.device))).reshape(())


# A class, since a generator under contextmanager costs five times as much in every step.
class explaining_refusals:
    """Where an operator refuses its arguments, says which gradient or parameter it was, and why."""

    def __init__(self, selections: Sequence[Selection], of_gradients: bool = True) -> None:
        self._selections, self._of_gradients = selections, of_gradients

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (RuntimeError, TypeError, ValueError)):
            for selection in self._selections:
                if self._of_gradients:
                    check_gradients(selection.params, selection.grads)
                selection.check_current()
