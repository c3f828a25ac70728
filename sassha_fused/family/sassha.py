"""Sassha (Shin, Lee, Chung, Lee, ICML 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..method import Method
from ..optimizer import FusedOptimizer


class Sassha(FusedOptimizer):
    r"""Sharpness-aware adaptive second-order optimizer with a stable, lazily refreshed Hessian diagonal.

    At step :math:`t = 1, 2, \dots` with :math:`g = \nabla f(w)` and one norm :math:`N = \|g\|_2` over all parameters:

    .. math::
        w' &= w + \rho g / (N + 10^{-12}), \qquad \tilde g = \nabla f(w') \\
        H &= \tfrac1S \textstyle\sum_s z_s \cdot \nabla \langle \tilde g, z_s \rangle (w'), \quad
        D \leftarrow \beta_2 D + (1 - \beta_2) |H|, \quad c_2 = 1 - \beta_2^t
        \qquad \text{every } k \text{ steps} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \qquad c_1 = 1 - \beta_1^t \\
        w &\leftarrow w (1 - \eta \lambda) - \frac{\eta}{c_1} \frac{m}{(D / c_2)^\alpha + \epsilon}

    Closure style, where the closure returns the loss and the optimizer runs every backward. A closure that calls
    ``loss.backward()`` itself works as well, and needs no ``create_graph``::

        loss = opt.step(lambda: criterion(model(x), y))

    Phase style::

        criterion(model(x), y).backward()
        opt.perturb()
        with opt.hessian_pass():
            criterion(model(x), y).backward()
        opt.step(); opt.zero_grad()

    With ``rho`` 0 in every group :math:`w' = w`, and one pass is enough: the closure is called once, and a hand-written
    loop leaves ``perturb()`` out.

    A step whose loss, gradients or Hessian products are not finite leaves no trace but in :attr:`skipped_steps`. A
    parameter without a gradient in either pass is not touched, and its counts stand still.

    ``hessian_interval``, ``hessian_warmup``, ``hessian_samples``, ``hessian_batches`` and ``seed`` have one value for
    all groups; other entries of a group may differ.

    Args:
        params: parameters or dicts of parameter groups; float64, float32, bfloat16 or float16, dense, real. State is
            float64 for float64 parameters, else float32.
        lr: learning rate :math:`\eta`, a float or a tensor of one element. A step that finds a negative or
            non-finite one in a tensor is skipped.
        betas: :math:`\beta_1, \beta_2` of the gradient's and the Hessian's running averages.
        eps: :math:`\epsilon`, added outside the power. With 0, weights whose Hessian is 0 are divided by 0.
        weight_decay: decoupled weight decay :math:`\lambda`.
        rho: radius of the perturbation.
        adaptive: scale the perturbation by the weights (ASAM): :math:`N = \| |w| g \|_2`,
            :math:`w' = w + \rho w^2 g / N`.
        hessian_interval: k, steps from one Hessian evaluation to the next.
        hessian_warmup: so many steps at the start are all Hessian steps.
        hessian_samples: S, probes per evaluation.
        hessian_batches: of a step in M micro-batches, products come from the first so many alone, times M over their
            number: a cheaper and noisier Hessian step. None: from all. A step in one batch ignores it.
        hessian_power: :math:`\alpha` in (0, 1].
        hessian_block: of parameters of two or more dimensions so many elements in a row, in the order of memory, share
            one number of D: :math:`|H|` is averaged over them first. A power of 2 up to 128; fixed once there is state.
        hvp: source of the Hessian products: ``"autograd"``, exact, by double backward.
        bias_correction: ``"step"`` as above, as published; ``"update"``: :math:`c_2 = 1 - \beta_2^n`, n counting the
            Hessian updates; ``"none"``: :math:`c_1 = c_2 = 1`, as the authors' code for GPT-2.
        maximize: maximise the objective.
        seed: of the random signs, which depend on nothing else: not on device, backend or the global generators.
        backend: ``"auto"`` or a name from :func:`sassha_fused.available_backends`.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Shin, Lee, Chung, Lee: Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian
        Approximation. ICML 2025, arXiv 2502.18153.
    """

    method = Method()

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
