"""The operators in plain torch, one tensor at a time: the readable reference, and the backend of last resort.

Same names, arguments and meaning as the schemas in csrc/schema.cpp; the arithmetic, operation for operation, is that of
csrc/math. Any device, and nothing here waits for it. Where it has no float64 (Apple's MPS) everything is worked out in
float32: results are then as close to the formulas, but not the same bits as elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bias_correction import bias_correction
from .checks import BIAS_CORRECTIONS, check_gradients
from .fused_multiply_add import fma, nearest_float32
from .layout import check_layouts, state_dtype, view_of, wide_dtype
from .power import raised
from .settings import RowSettings, settings_of

_WORD = 0xFFFFFFFF
_PIECE = 1 << 16  # elements


def grad_norm(grads: Sequence[Tensor], params: Sequence[Tensor], layouts: Tensor | None, adaptive: bool) -> Tensor:
    r""":math:`\|g\|_2`, or :math:`\| |w| \cdot g \|_2` if adaptive, as a 0-d float64 tensor.

    params may be left empty where not adaptive; where given, gradients that do not fit them are refused, and with
    layouts params that have other shapes or strides.
    """
    check_gradients(params or grads, grads)
    if layouts is not None:
        check_layouts(params, layouts)
    wide = wide_dtype(grads[0].device)
    terms = [g.to(wide) * w.to(wide) for g, w in zip(grads, params, strict=True)] if adaptive else grads
    if wide == torch.float64:
        return torch.stack([term.double().square().sum() for term in terms]).sum().sqrt()
    # Squares of float32 numbers are not all float32 numbers: those over the largest are where it matters.
    largest = torch.stack([term.float().abs().amax() for term in terms if term.numel()] or [grads[0].new_zeros(())])
    scale = torch.where(largest.amax() > 0, largest.amax(), 1.0)
    return torch.stack([(term.float() / scale).square().sum() for term in terms]).sum().sqrt() * scale


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    norm: Tensor,
    measure: bool,
    per_row: Tensor,
    settings: Sequence[float],
) -> None:
    r"""backup <- w; :math:`w \leftarrow w + \rho g / (N + 10^{-12})`, times :math:`w^2` if adaptive.

    N is in norm, or if measure it is that of grads, and put there. Where it is not finite, w stays as it is.
    """
    check_gradients(params, grads)
    check_layouts(params, layouts, backup)
    shared = settings_of(settings)
    if measure:
        norm.copy_(grad_norm(grads, params, None, bool(shared.adaptive)))
    finite = torch.isfinite(norm)
    factors = per_row.select(1, RowSettings._fields.index("rho")) * (1 / (norm + 1e-12))
    results, backups = [], [view_of(backup, offset, w) for w, offset in zip(params, offsets, strict=True)]
    for w, g, row in zip(params, grads, rows, strict=True):
        dtype = state_dtype(w)
        factor = factors[row].to(dtype)
        weight = w.to(dtype)
        step = (-factor if shared.maximize else factor) * g.to(dtype)
        moved = weight + step * (weight * weight) if shared.adaptive else weight + step
        results.append(torch.where(finite, moved.to(w.dtype), w))
    # Nothing is written before all is worked out: memory may run out above, not below.
    for w, old, result in zip(params, backups, results, strict=True):
        old.copy_(w)
        w.copy_(result)


def _philox4x32_10(counter: list[Tensor], key: list[int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps to 64 bits as the unsigned one does; the mask undoes the sign of the shift.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def _signs(index: int, count: int, seed: int, evaluation: Tensor, sample: int, device: torch.device) -> Tensor:
    """The signs of elements index .. index + count as an int64 tensor of +-1."""
    first = index // 128
    blocks = torch.arange(first, (index + count + 127) // 128, device=device)
    counter = [blocks & _WORD, blocks >> 32, evaluation.expand_as(blocks), torch.full_like(blocks, sample)]
    words = torch.stack(_philox4x32_10(counter, [seed & _WORD, seed >> 32]), dim=1)
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=device)) & 1
    return bits.flatten()[index - 128 * first :][:count] * 2 - 1


def rademacher_(signs: Sequence[Tensor], indices: Sequence[int], seed: int, evaluation: Tensor, sample: int) -> None:
    """signs <- the independent +-1 of this sample in the Hessian evaluation whose index is in evaluation, an int64."""
    for z, index in zip(signs, indices, strict=True):
        values = _signs(index, z.numel(), seed, evaluation, sample, z.device).to(z.dtype)
        z.copy_(view_of(values, 0, z))


def hutchinson_(
    products: Sequence[Tensor],
    estimate: Tensor,
    offsets: Sequence[int],
    indices: Sequence[int],
    seed: int,
    evaluation: Tensor,
    sample: int,
    samples: int,
) -> None:
    r"""estimate :math:`\leftarrow` estimate :math:`+ z \cdot Hz`, from 0 at the first sample; at last the mean."""
    for product, offset, index in zip(products, offsets, indices, strict=True):
        part = view_of(estimate, offset, product)
        signs = _signs(index, product.numel(), seed, evaluation, sample, product.device).to(part.dtype)
        term = view_of(signs, 0, product) * product.to(part.dtype)
        total = term if sample == 0 else part + term
        part.copy_(total / samples if sample == samples - 1 else total)


def _raise(x: Tensor, power: float) -> Tensor:
    if power == 1.0:
        return x
    if power == 0.5:
        # Through float64 also float32: torch's float32 square root on CPU is not always the nearest float.
        return x.to(wide_dtype(x.device)).sqrt().to(x.dtype)
    return raised(x, power) if x.dtype == torch.float32 else (x.log2() * power).exp2()


class _Parts(NamedTuple):
    """A number as the sum of two of the dtype that is computed in; of float64 the first is the number."""

    high: Tensor | float
    low: Tensor | float


def _parts(x: Tensor | float, dtype: torch.dtype) -> _Parts:
    if isinstance(x, Tensor):
        high = x.to(dtype)
        return _Parts(high, (x - high.to(x.dtype)).to(dtype))
    nearest = x if dtype == torch.float64 else nearest_float32(x)
    return _Parts(nearest, nearest_float32(x - nearest))


def _parts_of_each(x: Tensor, dtype: torch.dtype) -> list[_Parts]:
    return [_parts(element, dtype) for element in x.unbind()]


def _average(mean: Tensor, beta: _Parts, x: Tensor, weight: _Parts) -> Tensor:
    """beta mean + weight x"""
    if mean.dtype == torch.float64:
        return beta.high * mean + weight.high * x
    return fma(mean, beta.high, fma(x, weight.high, fma(mean, beta.low, x * weight.low)))


def _times(x: Tensor, factor: _Parts) -> Tensor:
    return x * factor.high if x.dtype == torch.float64 else fma(x, factor.high, x * factor.low)


def _moved(w: Tensor, direction: Tensor, decay: _Parts, step_size: _Parts) -> Tensor:
    """decay w - step_size direction"""
    if w.dtype == torch.float64:
        return w * decay.high - step_size.high * direction
    rest = fma(w, decay.low, -(direction * step_size.low))
    return fma(w, decay.high, fma(direction, -step_size.high, rest))


def _pieces(*tensors: Tensor) -> Iterable[Sequence[Tensor]]:
    """On a CPU stretches of rows whose temporaries stay in the caches; elsewhere launches are what counts."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _PIECE:
        return [tensors]
    rows = max(1, _PIECE * len(first) // first.numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    products: Sequence[Tensor],
    backup: Tensor | None,
    exp_avg: Tensor,
    exp_hessian: Tensor,
    steps: Tensor,
    skipped: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    guards: Sequence[Tensor],
    guard_grads: bool,
    per_row: Tensor,
    settings: Sequence[float],
) -> None:
    r"""One step from :math:`w` = backup, or without backup from params; nothing where a guard is not finite.

    If guard_grads, all elements of grads and products are guards too. D changes only where products are given.

    .. math::
        D \leftarrow \beta_2 D + (1 - \beta_2) |H|, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \quad
        w \leftarrow w (1 - \eta\lambda) - \frac{\eta}{c_1} \frac{m}{(D / c_2)^\alpha + \epsilon}

    bias_correction: the index in BIAS_CORRECTIONS; with "none", :math:`c_1 = c_2 = 1`.
    """
    check_gradients(params, grads)
    check_layouts(params, layouts, exp_avg)
    shared = settings_of(settings)
    kind = BIAS_CORRECTIONS[int(shared.bias_correction)]
    if guard_grads:
        guards = [*guards, *(grad_norm(tensors, (), None, False) for tensors in (grads, products) if tensors)]
    finite = torch.stack([torch.isfinite(guard) for guard in guards]).all()
    dtype = exp_avg.dtype
    beta1, beta2 = _parts(shared.beta1, dtype), _parts(shared.beta2, dtype)
    gradient_weight = _parts(-(1 - shared.beta1) if shared.maximize else 1 - shared.beta1, dtype)
    hessian_weight = _parts(1 - shared.beta2, dtype)
    if not params:
        skipped.copy_(~finite)
        return
    changes: list[tuple[Tensor, Tensor]] = [(skipped, ~finite)]
    counts, own = (torch.stack([table[row] for row in rows]) for table in (steps, per_row))
    step, hessian_step = counts.unbind(1)
    step = step + 1
    if products:
        hessian_step = step if kind == "step" else hessian_step + 1
    lr, weight_decay, _ = own.unbind(1)
    c1 = c2 = torch.ones_like(lr)
    if kind != "none":
        c1, c2 = bias_correction(shared.beta1, step), bias_correction(shared.beta2, hessian_step)
    decays, step_sizes, inverses = (_parts_of_each(x, dtype) for x in (1 - lr * weight_decay, lr / c1, 1 / c2))
    for i, (w, g, offset) in enumerate(zip(params, grads, offsets, strict=True)):
        average, hessian = (view_of(flat, offset, w) for flat in (exp_avg, exp_hessian))
        old = w if backup is None else view_of(backup, offset, w)
        product = products[i] if products else g  # not read where there are none
        for piece in _pieces(w, old, g, product, average, hessian):
            target, old, gradient, product, average, hessian = piece
            new_average = _average(average, beta1, gradient.to(dtype), gradient_weight)
            new_hessian = hessian
            if products:
                new_hessian = _average(hessian, beta2, product.to(dtype).abs(), hessian_weight)
                changes.append((hessian, torch.where(finite, new_hessian, hessian)))
            root = _raise(_times(new_hessian, inverses[i]), shared.hessian_power)
            direction = new_average / (root + _parts(shared.eps, dtype).high)
            new = _moved(old.to(dtype), direction, decays[i], step_sizes[i])
            changes.append((target, torch.where(finite, new.to(w.dtype), old)))
            changes.append((average, torch.where(finite, new_average, average)))
        changes.append((steps[rows[i]], torch.where(finite, torch.stack([step[i], hessian_step[i]]), counts[i])))
    # Nothing is written before all is worked out: memory may run out above, not below.
    for target, value in changes:
        target.copy_(value)
