"""Sophia with Hutchinson's estimate (Liu, Li, Hall, Liang, Ma, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..method import Method
from ..optimizer import FusedOptimizer


class SophiaH(FusedOptimizer):
    r"""Clipped steps along the momentum over the Hessian's diagonal, which keeps its sign.

    With :math:`H` estimated as in :class:`Sassha`, at :math:`w`, and the sign of the product kept:

    .. math::
        D &\leftarrow \beta_2 D + (1 - \beta_2) H \quad \text{every } k \text{ steps}, \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) g \\
        w &\leftarrow w (1 - \eta \lambda)
        - \eta \operatorname{clip}\left(\frac{m}{\gamma \max(D, 0) + \epsilon}, -1, 1\right)

    Where the curvature is negative or unknown a weight moves by :math:`\eta`, against the sign of m. A step has one
    pass, and no copy of the weights is kept. Closures, ``hessian_pass()``, skipped steps and groups are those of
    :class:`Sassha` with ``rho`` 0.

    Args:
        params, lr, betas, weight_decay, hessian_interval, hessian_warmup, hessian_samples, hessian_batches, hvp,
            maximize, seed, backend: as in :class:`Sassha`. The paper draws its probes from a Gaussian; these are random
            signs.
        eps: :math:`\epsilon`. With 0, a weight whose m and D are 0 is divided by 0.
        clip_threshold: :math:`\gamma`, the paper's .01 to .05.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Liu, Li, Hall, Liang, Ma: Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training.
        ICLR 2024, arXiv 2305.14342.
    """

    method = Method(
        ascent=None,
        second_average="signed",
        direction="clipped",
        bias_correction="none",
        averages=("exp_avg", "exp_hessian_signed"),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 6e-4,
        betas: Sequence[float] = (0.96, 0.99),
        eps: float = 1e-15,
        weight_decay: float = 0.2,
        *,
        clip_threshold: float = 0.01,
        hessian_interval: int = 10,
        hessian_warmup: int = 0,
        hessian_samples: int = 1,
        hessian_batches: int | None = None,
        hvp: str = "autograd",
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "hessian_interval": hessian_interval,
            "hessian_warmup": hessian_warmup,
            "hessian_samples": hessian_samples,
            "hessian_batches": hessian_batches,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, backend, hvp)
