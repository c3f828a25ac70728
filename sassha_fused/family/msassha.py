"""M-Sassha: Sassha with one gradient a step, taken ahead along the momentum (Shin, Lee, Chung, Lee, ICML 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..method import Method, check_exact_restore
from ..optimizer import FusedOptimizer


class MSassha(FusedOptimizer):
    r"""Sassha whose perturbation points along the running average of the gradients, so that a step needs one alone.

    At step :math:`t = 1, 2, \dots`, with :math:`m` of the step before and one norm :math:`N = \|m\|_2` over all
    trained parameters (at :math:`t = 1`, :math:`w' = w`):

    .. math::
        w' &= w - \rho m / (N + 10^{-12}), \qquad \tilde g = \nabla f(w')

    Everything else is as in :class:`Sassha`. The perturbation leads where the step is about to go: it speeds training
    up, like a look-ahead, and does not look for flat minima as Sassha does.

    Closure style; the closure is called once, at :math:`w'`::

        loss = opt.step(lambda: criterion(model(x), y))

    Phase style, which has no first pass::

        opt.perturb()
        with opt.hessian_pass():
            criterion(model(x), y).backward()
        opt.step(); opt.zero_grad()

    A parameter has state from the first step on that finds it trained, whether or not it gets a gradient.

    Args:
        params, lr, betas, eps, weight_decay, rho, hessian_interval, hessian_warmup, hessian_samples, hessian_batches,
            hessian_power, hessian_block, hvp, bias_correction, maximize, seed, backend: as in :class:`Sassha`.
        adaptive: scale the perturbation by the weights (ASAM): :math:`N = \| |w| m \|_2`,
            :math:`w' = w - \rho w^2 m / N`; of float64 and float32 parameters.
        exact_restore: keep a copy of :math:`w` while the weights are at :math:`w'`, 4 bytes per float32 parameter.
            Without it :math:`w` is worked out from :math:`w'` and m, to rounding; float64 and float32 parameters alone,
            and not where ``adaptive``. One value for all groups.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Shin, Lee, Chung, Lee: Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian
        Approximation. ICML 2025, arXiv 2502.18153. The perturbation is that of Becker, Altrock, Risse: Momentum-SAM:
        Sharpness Aware Minimization without Computational Overhead. arXiv 2401.12033.
    """

    method = Method(ascent="momentum", check=check_exact_restore)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.15,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        rho: float = 0.2,
        adaptive: bool = False,
        exact_restore: bool = True,
        hessian_interval: int = 10,
        hessian_warmup: int = 0,
        hessian_samples: int = 1,
        hessian_batches: int | None = None,
        hessian_power: float = 0.5,
        hessian_block: int = 1,
        hvp: str = "autograd",
        bias_correction: str = "step",
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "adaptive": adaptive,
            "exact_restore": exact_restore,
            "hessian_interval": hessian_interval,
            "hessian_warmup": hessian_warmup,
            "hessian_samples": hessian_samples,
            "hessian_batches": hessian_batches,
            "hessian_power": hessian_power,
            "hessian_block": hessian_block,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, backend, hvp)
