"""AdaHessian (Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, AAAI 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..method import Method
from ..optimizer import FusedOptimizer


class AdaHessian(FusedOptimizer):
    r"""Adam with the squares of the Hessian's diagonal in the place of those of the gradient.

    At step :math:`t = 1, 2, \dots`, with :math:`H` estimated as in :class:`Sassha`, at :math:`w`:

    .. math::
        D &\leftarrow \beta_2 D + (1 - \beta_2) H^2 \quad \text{every } k \text{ steps}, \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) g \\
        w &\leftarrow w (1 - \eta \lambda) - \frac{\eta}{1 - \beta_1^t}
        \frac{m}{(D / c_2)^{\alpha / 2} + \epsilon}, \qquad c_2 = 1 - \beta_2^t

    A step has one pass, and no copy of the weights is kept. Closures, ``hessian_pass()``, skipped steps and groups are
    those of :class:`Sassha` with ``rho`` 0.

    Args:
        params, lr, betas, weight_decay, hessian_interval, hessian_warmup, hessian_samples, hessian_batches, hvp,
            bias_correction, maximize, seed, backend: as in :class:`Sassha`.
        eps: :math:`\epsilon`, beside the root.
        hessian_power: :math:`\alpha` in (0, 1], of the root of D.
        hessian_block: as in :class:`Sassha`; the mean of :math:`|H|` over a block is squared. The paper's averaging
            over convolution kernels and rows of attention is of this kind.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney: AdaHessian: An Adaptive Second Order Optimizer for Machine
        Learning. AAAI 2021, arXiv 2006.00719.
    """

    method = Method(ascent=None, second_average="square", averages=("exp_avg", "exp_hessian_sq"))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.15,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_interval: int = 1,
        hessian_warmup: int = 0,
        hessian_samples: int = 1,
        hessian_batches: int | None = None,
        hessian_power: float = 1.0,
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
