"""The operators in plain torch, one tensor at a time: the readable reference, and the backend of last resort.

Same names, arguments and meaning as the schemas in csrc/schema.cpp; the arithmetic, operation for operation, is that of
csrc/math. Any device; nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import BIAS_CORRECTIONS, check_gradients
from .layout import state_dtype, view_of
from .power import raised

_WORD = 0xFFFFFFFF


def grad_norm(grads: Sequence[Tensor], params: Sequence[Tensor], adaptive: bool) -> Tensor:
    r""":math:`\|g\|_2`, or :math:`\| |w| \cdot g \|_2` if adaptive, as a 0-d float64 tensor.

    params may be left empty where not adaptive; where given, gradients that do not fit them are refused.
    """
    check_gradients(params or grads, grads)
    terms = [g.double() * w.double() for g, w in zip(grads, params, strict=True)] if adaptive else grads
    return torch.stack([term.double().square().sum() for term in terms]).sum().sqrt()


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    offsets: Sequence[int],
    norm: Tensor,
    measure: bool,
    rho: float,
    adaptive: bool,
    maximize: bool,
) -> None:
    r"""backup <- w; :math:`w \leftarrow w + \rho g / (N + 10^{-12})`, times :math:`w^2` if adaptive.

    N is in norm, or if measure it is that of grads, and put there. Where it is not finite, w stays as it is.
    """
    check_gradients(params, grads)
    if measure:
        norm.copy_(grad_norm(grads, params, adaptive))
    finite = torch.isfinite(norm)
    factor = torch.full_like(norm, -rho if maximize else rho) / (norm + 1e-12)
    results, backups = [], [view_of(backup, offset, w) for w, offset in zip(params, offsets, strict=True)]
    for w, g in zip(params, grads, strict=True):
        dtype = state_dtype(w)
        weight = w.to(dtype)
        step = factor.to(dtype) * g.to(dtype)
        moved = weight + step * (weight * weight) if adaptive else weight + step
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
    if power != 0.5 and x.dtype == torch.float32:
        return raised(x, power)
    # In float64 also for float32: torch's float32 square root on CPU is not always the nearest float.
    exact = x.double()
    return (exact.sqrt() if power == 0.5 else (exact.log2() * power).exp2()).to(x.dtype)


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    products: Sequence[Tensor],
    backup: Tensor,
    exp_avg: Tensor,
    exp_hessian: Tensor,
    steps: Tensor,
    skipped: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    guards: Sequence[Tensor],
    guard_grads: bool,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    hessian_power: float,
    bias_correction: int,
    maximize: bool,
) -> None:
    r"""One step from :math:`w` = backup; D only where products are given; nothing where a guard is not finite.

    If guard_grads, all elements of grads and products are guards too.

    .. math::
        D \leftarrow \beta_2 D + (1 - \beta_2) |H|, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \quad
        w \leftarrow w (1 - \eta\lambda) - \frac{\eta}{c_1} \frac{m}{(D / c_2)^\alpha + \epsilon}

    bias_correction: the index in BIAS_CORRECTIONS; with "none", :math:`c_1 = c_2 = 1`.
    """
    check_gradients(params, grads)
    kind = BIAS_CORRECTIONS[bias_correction]
    if guard_grads:
        guards = [*guards, *(grad_norm(tensors, (), False) for tensors in (grads, products) if tensors)]
    finite = torch.stack([torch.isfinite(guard) for guard in guards]).all()
    skipped.copy_(~finite)
    rate = exp_avg.new_full((), lr, dtype=torch.float64) if lr_tensor is None else lr_tensor.double().reshape(())
    for i, (w, g, offset, row) in enumerate(zip(params, grads, offsets, rows, strict=True)):
        dtype = state_dtype(w)
        counts = steps[row]
        step = counts[0] + 1
        hessian_step = counts[1]
        if products:
            hessian_step = step if kind == "step" else hessian_step + 1
        if kind == "none":
            c1 = c2 = torch.ones_like(rate)
        else:
            c1, c2 = 1 - torch.pow(beta1, step.double()), 1 - torch.pow(beta2, hessian_step.double())
        step_size, correction = rate / c1, 1 / c2
        decay = 1 - rate * weight_decay

        average, hessian, old = (view_of(flat, offset, w) for flat in (exp_avg, exp_hessian, backup))
        gradient_weight = -(1 - beta1) if maximize else 1 - beta1
        new_average = (average.double() * beta1 + g.double() * gradient_weight).to(dtype)
        new_hessian = hessian
        if products:
            new_hessian = (hessian.double() * beta2 + products[i].double().abs() * (1 - beta2)).to(dtype)
        root = _raise((new_hessian.double() * correction).to(dtype), hessian_power)
        denominator = root + eps
        direction = (new_average / denominator).double()
        new = (old.double() * decay - step_size * direction).to(dtype)

        w.copy_(torch.where(finite, new.to(w.dtype), old))
        average.copy_(torch.where(finite, new_average, average))
        hessian.copy_(torch.where(finite, new_hessian, hessian))
        counts.copy_(torch.where(finite, torch.stack([step, hessian_step]), counts))
