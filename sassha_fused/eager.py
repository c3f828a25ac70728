"""The operators in plain torch, one tensor at a time: the readable reference, and the backend of last resort.

Same names, arguments and meaning as the schemas in csrc/schema.cpp; the arithmetic, operation for operation, is that of
csrc/math. Any device, and nothing here waits for it. Where it has no float64 (Apple's MPS) everything is worked out in
float32: results are then as close to the formulas, but not the same bits as elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .arithmetic import perturbation_factors, rows_of, second_average, updated
from .checks import BIAS_CORRECTIONS, check_gradients
from .layout import block_index, check_layouts, flat_of, state_dtype, view_of, wide_dtype
from .settings import SECOND_AVERAGES, Settings, dtype_along, settings_of

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
    return _norm([piece for term in terms for (piece,) in _pieces(term)])


def _norm(terms: Sequence[Tensor]) -> Tensor:
    if wide_dtype(terms[0].device) == torch.float64:
        return torch.stack([term.double().square().sum() for term in terms]).sum().sqrt()
    # Squares of float32 numbers are not all float32 numbers: those over the largest are where it matters.
    largest = torch.stack([term.float().abs().amax() for term in terms if term.numel()] or [terms[0].new_zeros(())])
    scale = torch.where(largest.amax() > 0, largest.amax(), 1.0)
    return torch.stack([(term.float() / scale).square().sum() for term in terms]).sum().sqrt() * scale


def _pieces(*tensors: Tensor) -> Iterable[Sequence[Tensor]]:
    """On a CPU stretches of rows whose temporaries stay in the caches; elsewhere launches are what counts."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _PIECE:
        return [tensors]
    rows = max(1, _PIECE * len(first) // first.numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor | None,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    norm: Tensor,
    measure: bool,
    per_row: Tensor,
    settings: Sequence[float],
) -> None:
    r"""backup <- w, if there is one; :math:`w \leftarrow w + \rho g / (N + 10^{-12})`, times :math:`w^2` if adaptive.

    N is in norm, or if measure it is that of grads, and put there. Where it is not finite, w stays as it is. g: the
    gradient; or, where the ascent is along exp_avg, its parts, which count with the other sign.
    """
    shared = settings_of(settings)
    check_gradients(params, grads, dtype_along(params, shared))
    check_layouts(params, layouts, backup)
    if measure:
        norm.copy_(grad_norm(grads, params if shared.adaptive else (), None, bool(shared.adaptive)))
    finite = torch.isfinite(norm)
    factors = perturbation_factors(per_row, norm, shared)
    results = []
    backups = [] if backup is None else [view_of(backup, offset, w) for w, offset in zip(params, offsets, strict=True)]
    for w, g, row in zip(params, grads, rows, strict=True):
        dtype = state_dtype(w)
        weight = w.to(dtype)
        step = factors[row].to(dtype) * g.to(dtype)
        moved = weight + step * (weight * weight) if shared.adaptive else weight + step
        results.append(torch.where(finite, moved.to(w.dtype), w))
    # Nothing is written before all is worked out: memory may run out above, not below.
    for w, old in zip(params, backups, strict=False):
        old.copy_(w)
    for w, result in zip(params, results, strict=True):
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


def block_average_(
    products: Sequence[Tensor],
    exp_hessian: Tensor,
    averaged: Tensor,
    offsets: Sequence[int],
    blocked: int,
    settings: Sequence[float],
) -> None:
    r"""averaged :math:`\leftarrow \beta_2 D + (1 - \beta_2)` times the mean of ``|products|`` over each block.

    Sums go pairwise by the bits of an element's index; a last block that is short has the mean of what it has.
    """
    shared = settings_of(settings)
    for product, offset in zip(products, offsets, strict=True):
        block = int(shared.hessian_block) if offset < blocked else 1
        x = flat_of(product).to(exp_hessian.dtype).abs()
        present = torch.full((-(-len(x) // block),), block, dtype=x.dtype, device=x.device)
        present[-1:] -= -len(x) % block
        x = torch.nn.functional.pad(x, (0, -len(x) % block))
        for _ in range(block.bit_length() - 1):
            x = x[0::2] + x[1::2]
        start = block_index(offset, int(shared.hessian_block), blocked)
        part = slice(start, start + len(x))
        averaged[part] = second_average(exp_hessian[part], x / present, shared)


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    products: Sequence[Tensor],
    averaged: Tensor | None,
    backup: Tensor | None,
    norm: Tensor | None,
    exp_avg: Tensor,
    exp_hessian: Tensor | None,
    exp_avg_norm: Tensor | None,
    steps: Tensor,
    skipped: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    layouts: Tensor,
    blocked: int,
    guards: Sequence[Tensor],
    guard_grads: bool,
    per_row: Tensor,
    settings: Sequence[float],
) -> None:
    r"""One step from :math:`w` = backup, or from params; nothing where a guard is not finite.

    With norm, that of perturb_ along exp_avg, :math:`w` is what params were before it. If guard_grads, all elements of
    grads and products are guards too. D changes only where products are given, or averaged, which is what
    block_average_ has made of them; or, where it averages the squares of gradients, in every step. exp_avg_norm, if
    any, becomes the norm of :math:`m` over these parameters, as grad_norm has it.

    .. math::
        D \leftarrow \beta_2 D + (1 - \beta_2) |H|, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \quad
        w \leftarrow w (1 - \eta\lambda) - \frac{\eta}{c_1} \frac{m}{(D / c_2)^\alpha + \epsilon}

    Of a clipped direction the fraction is :math:`m / (\gamma \max(D, 0) + \epsilon)`, between -1 and 1. A plain one
    takes :math:`\tilde g + \lambda w` for the gradient, and
    :math:`w \leftarrow w - \eta m`, with :math:`m \leftarrow \beta_1 m + (1 - d) \tilde g` as in torch.optim.SGD.
    """
    check_gradients(params, grads)
    check_layouts(params, layouts, exp_avg)
    shared = settings_of(settings)
    if guard_grads:
        guards = [*guards, *(grad_norm(tensors, (), None, False) for tensors in (grads, products) if tensors)]
    finite = torch.stack([torch.isfinite(guard) for guard in guards]).all()
    if not params:
        skipped.copy_(~finite)
        return
    changes: list[tuple[Tensor, Tensor]] = [(skipped, ~finite)]
    new_averages: list[Tensor] = []
    counts, own = (torch.stack([table[row] for row in rows]) for table in (steps, per_row))
    step, hessian_step = counts.unbind(1)
    step = step + 1
    of_gradients = SECOND_AVERAGES[int(shared.second_average)] == "gradient" and exp_hessian is not None
    if products or averaged is not None or of_gradients:
        by_step = BIAS_CORRECTIONS[int(shared.bias_correction)] == "step"
        hessian_step = step if by_step else hessian_step + 1
    each = rows_of(step, hessian_step, own, norm, shared, exp_avg.dtype)
    for i, (w, g, offset, row) in enumerate(zip(params, grads, offsets, each, strict=True)):
        average = view_of(exp_avg, offset, w)
        hessian = average  # not read where there is none
        if exp_hessian is not None:
            hessian = _hessian_of(exp_hessian, w, offset, blocked, shared, changes, averaged, finite)
        old = w if backup is None else view_of(backup, offset, w)
        product = products[i] if products else g
        for piece in _pieces(w, old, g, product, average, hessian):
            target, old, gradient, product, average, hessian = piece
            gradient, weight = gradient.to(average.dtype), old.to(average.dtype)
            if norm is not None:
                old = weight = torch.where(torch.isfinite(norm), weight - row.perturbation * average, weight)
            new_hessian = None if exp_hessian is None else hessian
            if products or of_gradients:
                new_hessian = second_average(hessian, product, shared)
                changes.append((hessian, torch.where(finite, new_hessian, hessian)))
            new, new_average = updated(weight, gradient, average, new_hessian, row, shared)
            changes.append((target, torch.where(finite, new.to(w.dtype), old)))
            new_averages.append(torch.where(finite, new_average, average))
            changes.append((average, new_averages[-1]))
        changes.append((steps[rows[i]], torch.where(finite, torch.stack([step[i], hessian_step[i]]), counts[i])))
    if exp_avg_norm is not None:
        changes.append((exp_avg_norm, torch.where(finite, _norm(new_averages), exp_avg_norm)))
    # Nothing is written before all is worked out: memory may run out above, not below.
    for target, value in changes:
        target.copy_(value)


def _hessian_of(
    exp_hessian: Tensor,
    w: Tensor,
    offset: int,
    blocked: int,
    settings: Settings,
    changes: list[tuple[Tensor, Tensor]],
    averaged: Tensor | None,
    finite: Tensor,
) -> Tensor:
    """A parameter's D as this step takes it, of its shape: a part of exp_hessian, or of averaged, which replaces it."""
    block = int(settings.hessian_block) if offset < blocked else 1
    start = block_index(offset, int(settings.hessian_block), blocked)
    part = exp_hessian[start : start + -(-w.numel() // block)]
    if averaged is not None:
        new = averaged[start : start + len(part)]
        changes.append((part, torch.where(finite, new, part)))
        part = new
    elif block == 1:
        return view_of(exp_hessian, start, w)
    return view_of(part.repeat_interleave(block), 0, w)
