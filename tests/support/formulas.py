"""One step as formulas in float64, for comparisons from the same state within a few ulp of the largest term summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Perturbed(NamedTuple):
    w: Tensor
    w_largest: Tensor


class Updated(NamedTuple):
    w: Tensor
    m: Tensor
    D: Tensor
    t: int
    e: int
    w_largest: Tensor
    m_largest: Tensor
    D_largest: Tensor


def formula_norm(gradients: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> float:
    """N = ||g||, or || |w| . g || where weights are given, over all tensors."""
    products = [g.double() for g in gradients]
    if weights is not None:
        products = [w.double().abs() * g for w, g in zip(weights, products, strict=True)]
    return math.sqrt(math.fsum(float(p.square().sum()) for p in products))


def formula_perturb(
    w: Tensor, g: Tensor, norm: float, rho: float, adaptive: bool = False, maximize: bool = False
) -> Perturbed:
    """w' = w + rho g / (N + 1e-12), adaptive: w + rho w^2 g / (N + 1e-12); w' = w where the norm N is not finite."""
    w, g = w.double(), g.double()
    if not math.isfinite(norm):
        return Perturbed(w, w.abs())
    e_w = (-g if maximize else g) * (rho / (norm + 1e-12))
    if adaptive:
        e_w = e_w * w.square()
    return Perturbed(w + e_w, _largest(w, e_w))


def formula_update(
    w: Tensor,
    g: Tensor,
    H: Tensor | None,
    m: Tensor,
    D: Tensor,
    t: int,
    e: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    hessian_power: float,
    bias_correction: str = "step",
    maximize: bool = False,
    second: str = "absolute",
    clip_threshold: float | None = None,
) -> Updated:
    """The state after one step from the restored w, the second gradient g and, on a Hessian step, the estimate H.

    t and e are the counters before the step. With c the step size over the denominator, the terms of the new w are
    w (1 - eta lambda), c m and, since m is a sum itself, c beta1 m and c (1 - beta1) g. The sum counts as well: where
    it passes into the next binade, the nearest float alone is a whole ulp of its terms away. With bias_correction
    "none", c1 = c2 = 1; the counters go on as with "update".

    second: what D averages of H: "absolute", "square", "signed"; or "gradient", the square of g, in every step. With a
    clip_threshold gamma the step is eta clip(m / (gamma max(D, 0) + e), -1, 1).
    """
    w, g, m, D = w.double(), g.double(), m.double(), D.double()
    beta1, beta2 = betas
    t += 1
    D_terms = [D]
    if second == "gradient":
        H = g
    if H is not None:
        H = H.double()
        averaged = {"absolute": H.abs(), "signed": -H if maximize else H}.get(second, H.square())
        D_terms = [beta2 * D, (1 - beta2) * averaged]
        e = t if bias_correction == "step" else e + 1
    new_D = torch.stack(D_terms).sum(0)
    m_terms = [beta1 * m, (1 - beta1) * (-g if maximize else g)]
    new_m = m_terms[0] + m_terms[1]
    c1, c2 = (1.0, 1.0) if bias_correction == "none" else (1 - beta1**t, 1 - beta2**e)
    if clip_threshold is None:
        denominator = (new_D / c2).pow(hessian_power) + eps
    else:  # at least |m|: the quotient is clipped
        denominator = torch.maximum(clip_threshold * new_D.clamp(min=0) + eps, new_m.abs())
    c = lr / c1 / denominator
    decayed = w * (1 - lr * weight_decay)
    new_w = decayed - c * new_m
    return Updated(
        new_w,
        new_m,
        new_D,
        t,
        e,
        _largest(new_w, decayed, c * new_m, *(c * term for term in m_terms)),
        _largest(*m_terms),
        _largest(*D_terms),
    )


def formula_plain(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    t: int,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
) -> Updated:
    """The state after one step of torch.optim.SGD with a momentum buffer, which is 0 before its first step."""
    w, g, m = w.double(), g.double(), m.double()
    terms = [-g if maximize else g, weight_decay * w]
    g = terms[0] + terms[1]
    weight = torch.where(torch.as_tensor(t) == 0, 1.0, 1.0 - dampening)
    m_terms = [momentum * m, *(weight * term for term in terms)]
    new_m = torch.stack(m_terms).sum(0)
    step = lr * (g + momentum * new_m if nesterov else new_m)
    w_terms = [w, step, *(lr * term for term in (*m_terms, *terms))]
    D = torch.zeros_like(w)
    return Updated(w - step, new_m, D, t + 1, 0, _largest(w - step, *w_terms), _largest(*m_terms, *terms), D)


def formula_blocks(H: Tensor, block: int) -> Tensor:
    """The mean of |H| over each block of consecutive elements, the last block as long as it is; in float64."""
    number = torch.arange(H.numel()) // block
    count = number.bincount()
    return torch.zeros(len(count), dtype=torch.float64).index_add_(0, number, H.flatten().double().abs()) / count


def _largest(*terms: Tensor) -> Tensor:
    return torch.stack([term.abs() for term in terms]).amax(0)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance, in float64, between neighbouring numbers of dtype at |x|."""
    info = torch.finfo(dtype)
    normal = np.maximum(x.detach().double().abs().cpu().numpy(), info.smallest_normal)
    return torch.from_numpy(np.ldexp(info.eps, np.frexp(normal)[1] - 1)).to(x.device)
