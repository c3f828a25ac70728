"""AdamW at sharpness-aware gradients (Foret et al., ICLR 2021; Loshchilov and Hutter, ICLR 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..method import Method, check_exact_restore
from ..optimizer import FusedOptimizer


class SAMAdamW(FusedOptimizer):
    r"""AdamW, its gradients taken where the loss is about to rise most, or ahead along the momentum.

    At step :math:`t = 1, 2, \dots`, with one norm :math:`N` over all parameters:

    .. math::
        w' &= w + \rho g / (N + 10^{-12}), \quad N = \|g\|_2, \qquad \text{or} \quad
        w' = w - \rho m / (N + 10^{-12}), \quad N = \|m\|_2; \qquad \tilde g = \nabla f(w') \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) \tilde g^2 \\
        w &\leftarrow w (1 - \eta \lambda) - \frac{\eta}{1 - \beta_1^t}
        \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    With ``rho`` 0 it is :class:`torch.optim.AdamW` to rounding. Closures, phase style, skipped steps and groups are
    those of :class:`Sassha`, or with ``ascent="momentum"`` of :class:`MSassha`.

    Args:
        params: parameters or dicts of parameter groups; float64, float32, bfloat16 or float16, dense, real.
        lr: learning rate :math:`\eta`, a float or a tensor of one element.
        betas: :math:`\beta_1, \beta_2` of the running averages of the gradient and of its square.
        eps: :math:`\epsilon`, beside the root.
        weight_decay: decoupled weight decay :math:`\lambda`.
        rho: radius of the perturbation.
        adaptive: scale the perturbation by the weights (ASAM).
        ascent: ``"gradient"``, two gradients a step; or ``"momentum"``, one (Momentum-SAM, at AdamW's price). One value
            for all groups.
        exact_restore: as in :class:`MSassha`.
        maximize: maximise the objective.
        backend: ``"auto"`` or a name from :func:`sassha_fused.available_backends`.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR
        2021, arXiv 2010.01412. Loshchilov, Hutter: Decoupled Weight Decay Regularization. ICLR 2019. Becker, Altrock,
        Risse: Momentum-SAM. arXiv 2401.12033.
    """

    method = Method(second_average="gradient", averages=("exp_avg", "exp_avg_sq"), check=check_exact_restore)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        ascent: str = "gradient",
        exact_restore: bool = True,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "adaptive": adaptive,
            "ascent": ascent,
            "exact_restore": exact_restore,
            "maximize": maximize,
        }
        super().__init__(params, defaults, backend)
