"""SGD with momentum at sharpness-aware gradients (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..method import Method, check_exact_restore
from ..optimizer import FusedOptimizer


def _check(group: dict[str, Any]) -> None:
    check_exact_restore(group)
    momentum, dampening = group["momentum"], group["dampening"]
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov needs momentum > 0 and dampening 0, got momentum {momentum}, dampening {dampening}")
    if group["ascent"] == "momentum" and momentum == 0:
        raise ValueError("ascent 'momentum' needs momentum > 0, got momentum 0")


class SAMSGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum, its gradients taken where the loss is about to rise most.

    With one norm :math:`N` over all parameters, :math:`\mu` the momentum and :math:`d` the dampening:

    .. math::
        w' &= w + \rho g / (N + 10^{-12}), \quad N = \|g\|_2, \qquad \text{or} \quad
        w' = w - \rho b / (N + 10^{-12}), \quad N = \|b\|_2 \\
        \tilde g &= \nabla f(w') + \lambda w \\
        b &\leftarrow \mu b + (1 - d) \tilde g \quad (b \leftarrow \tilde g \text{ at first}) \\
        w &\leftarrow w - \eta b, \qquad \text{or with nesterov} \quad w \leftarrow w - \eta (\tilde g + \mu b)

    With ``rho`` 0 it is :class:`torch.optim.SGD` to rounding. It keeps 8 bytes per float32 parameter: b, and a copy of
    :math:`w` while the weights are at :math:`w'`.

    Closures, phase style, skipped steps and groups are those of :class:`Sassha`, or with ``ascent="momentum"`` of
    :class:`MSassha`.

    Args:
        params: parameters or dicts of parameter groups; float64, float32, bfloat16 or float16, dense, real.
        lr: learning rate :math:`\eta`, a float or a tensor of one element.
        momentum: :math:`\mu` in [0, 1).
        dampening: :math:`d` in [0, 1).
        weight_decay: :math:`\lambda`, added to the gradient as :class:`torch.optim.SGD` does.
        nesterov: look one step of b ahead.
        rho: radius of the perturbation.
        adaptive: scale the perturbation by the weights (ASAM).
        ascent: ``"gradient"``, two gradients a step; or ``"momentum"``, one (Momentum-SAM, at SGD's price). One value
            for all groups.
        exact_restore: as in :class:`MSassha`.
        maximize: maximise the objective.
        backend: ``"auto"`` or a name from :func:`sassha_fused.available_backends`.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR
        2021, arXiv 2010.01412. Becker, Altrock, Risse: Momentum-SAM. arXiv 2401.12033. Kwon et al.: ASAM. ICML 2021.
    """

    method = Method(second_average=None, direction="plain", averages=("momentum_buffer",), check=_check)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "rho": rho,
            "adaptive": adaptive,
            "ascent": ascent,
            "exact_restore": exact_restore,
            "maximize": maximize,
        }
        super().__init__(params, defaults, backend)
