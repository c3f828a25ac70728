"""The rest of the family written a second time, in float64: what each member does otherwise than Sassha.

MSassha     w' = w - rho m / (||m|| + 1e-12), one gradient, at w'
SAMSGD      g~ + lambda w; b <- mu b + (1 - d) g~, at first b <- g~; w - eta b, or with Nesterov w - eta (g~ + mu b)
SAMAdamW    D <- beta2 D + (1 - beta2) g~^2 in every step; root of D; c1, c2 by the step
AdaHessian  no perturbation; D <- beta2 D + (1 - beta2) H^2; sqrt(D / c2)^power
SophiaH     no perturbation; D of H itself; w - eta clip(m / (gamma max(D, 0) + e), -1, 1), nothing corrected
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import ReferenceSassha, from_memory_order, memory_order

NO_RHO = {"rho": 0.0, "adaptive": False}
# What members say of themselves that Sassha has arguments for.
DEFAULTS: dict[str, dict[str, Any]] = {
    "Sassha": {},
    "MSassha": {},
    "SAMSGD": {"betas": (0.0, 0.0), "rho": 0.05, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "lr": 1e-3},
    "SAMAdamW": {"betas": (0.9, 0.999), "rho": 0.05, "lr": 1e-3, "eps": 1e-8, "weight_decay": 1e-2},
    "AdaHessian": {**NO_RHO, "hessian_interval": 1, "hessian_power": 1.0},
    "SophiaH": {**NO_RHO, "lr": 6e-4, "betas": (0.96, 0.99), "eps": 1e-15, "weight_decay": 0.2, "clip_threshold": 0.01},
}
SECONDS = {"SAMAdamW": "exp_avg_sq", "AdaHessian": "exp_hessian_sq", "SophiaH": "exp_hessian_signed"}
BY_GROUP = ("momentum", "dampening", "nesterov", "clip_threshold", "hessian_block")


class ReferenceMember(ReferenceSassha):
    """Any member of the family, by its name."""

    def __init__(self, params: Iterable[Any], member: str, *, ascent: str = "gradient", **options: Any) -> None:
        self.member = member
        self.momentum_ascent = member == "MSassha" or ascent == "momentum"
        options = {**DEFAULTS[member], **options}
        own = {name: options.pop(name) for name in BY_GROUP if name in options}
        groups = list(params)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        super().__init__([{**own, **group} for group in groups], **options)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        if not self.momentum_ascent or all(group["rho"] == 0 for group in self.param_groups):
            return super().step(closure)
        self.perturb_along_momentum()
        try:
            loss, grads = self._backward(closure, create_graph=self.hessian_due)
            products = self._hessian_products(grads)
            if bool(torch.isfinite(loss).all()):
                self.update(products)
            else:
                self._skip()
        except BaseException:
            self.restore()
            raise
        return loss

    @torch.no_grad()
    def perturb_along_momentum(self) -> None:
        """w <- w - rho m / (||m|| + 1e-12), adaptive: |w| m in the norm, w^2 m; of everything that is trained."""
        trained = [(group, p) for group, p in self._each() if p.requires_grad]
        averages = [self._average_of(p) for _, p in trained]
        scaled = [p.abs() * m if group["adaptive"] else m for (group, p), m in zip(trained, averages, strict=True)]
        self._grad_norm = math.sqrt(sum(float(m.square().sum()) for m in scaled))
        self._backups = [p.clone() if p.requires_grad else None for _, p in self._each()]
        for (group, p), m in zip(trained, averages, strict=True):
            ahead = m * p.square() if group["adaptive"] else m
            p.sub_(ahead * (group["rho"] / (self._grad_norm + 1e-12)))
        self.perturbed = True
        self.zero_grad()

    def _average_of(self, p: Tensor) -> Tensor:
        state = self.state.get(p, {})
        return next((state[name] for name in ("exp_avg", "momentum_buffer") if name in state), torch.zeros_like(p))

    def _never_had_hessian(self, p: Tensor) -> bool:
        return self.member not in ("SAMSGD", "SAMAdamW") and super()._never_had_hessian(p)

    def _is_hessian_step(self, takes_part: Sequence[bool]) -> bool:
        return self.member not in ("SAMSGD", "SAMAdamW") and super()._is_hessian_step(takes_part)

    def _update_one(self, group: dict[str, Any], p: Tensor, w: Tensor, grad: Tensor, hess: Tensor | None) -> None:
        if self.member == "SAMSGD":
            return self._sgd(group, p, grad)
        state = self.state[p]
        second = SECONDS.get(self.member, "exp_hessian")
        if len(state) == 0:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), second: torch.zeros_like(p)}
            if self.member != "SAMAdamW":
                state["hessian_step"] = 0
        state["step"] += 1
        m, D = state["exp_avg"], state[second]
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        m.copy_(beta1 * m + (1 - beta1) * grad)
        adam = self.member == "SAMAdamW"
        if adam or hess is not None:
            D.copy_(beta2 * D + (1 - beta2) * self._averaged(group, p, grad if adam else hess))
        if hess is not None:
            # Nothing is corrected where the members have no bias_correction: counted as with "none".
            by_step = group["bias_correction"] == "step" and self.member != "SophiaH"
            state["hessian_step"] = state["step"] if by_step else state["hessian_step"] + 1
        p.mul_(1 - lr * group["weight_decay"])
        if self.member == "SophiaH":
            p.sub_(lr * (m / (group["clip_threshold"] * D.clamp(min=0) + group["eps"])).clamp(-1, 1))
            return
        corrected = adam or group["bias_correction"] != "none"
        c1 = 1 - beta1 ** state["step"] if corrected else 1.0
        c2 = 1 - beta2 ** state["step" if adam else "hessian_step"] if corrected else 1.0
        power = {"SAMAdamW": 0.5, "AdaHessian": group["hessian_power"] / 2}.get(self.member, group["hessian_power"])
        p.sub_(lr / c1 * m / ((D / c2) ** power + group["eps"]))

    def _averaged(self, group: dict[str, Any], p: Tensor, hess: Tensor) -> Tensor:
        """What enters D: |H|, its mean over each block of the parameter's memory, H^2, H, or g^2."""
        if self.member == "SAMAdamW":
            return hess.square()
        if self.member == "SophiaH":
            return -hess if group["maximize"] else hess
        size = hess.abs()
        if (block := group.get("hessian_block", 1)) > 1 and p.dim() > 1:
            means = [part.mean().expand(len(part)) for part in memory_order(size).split(block)]
            size = from_memory_order(torch.cat(means), size) if means else size
        return size.square() if self.member == "AdaHessian" else size

    def _sgd(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        state = self.state[p]
        grad = grad + group["weight_decay"] * p
        if len(state) == 0:
            state |= {"step": 0, "momentum_buffer": grad.clone()}
        else:
            weight = 1 - group["dampening"]
            state["momentum_buffer"].copy_(group["momentum"] * state["momentum_buffer"] + weight * grad)
        state["step"] += 1
        b = state["momentum_buffer"]
        p.sub_(float(group["lr"]) * (grad + group["momentum"] * b if group["nesterov"] else b))


class ReferenceOfBatches(ReferenceMember):
    """Any member, whose loss is that of several micro-batches and may be scaled.

    Attributes:
        partial: the loss whose Hessian is taken, where hessian_batches are fewer than micro-batches.
        scale: what losses are multiplied by, beside which the 1e-12 in w' = w + rho g / (N + 1e-12) is smaller.
    """

    partial: Callable[[], Tensor] | None = None
    scale = 1.0

    def _global_grad_norm(self) -> float:
        return super()._global_grad_norm() + 1e-12 / self.scale - 1e-12

    def _hessian_products(self, grads: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        if self.partial is None or not any(grad is not None and grad.requires_grad for grad in grads):
            return super()._hessian_products(grads)
        params = [p for group in self.param_groups for p in group["params"]]
        kept = [p.grad for p in params]
        _, part = self._backward(self.partial, create_graph=True)
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
        part = [
            None if whole is None else torch.zeros_like(p) if some is None else some
            for p, whole, some in zip(params, grads, part, strict=True)
        ]
        return super()._hessian_products(part)
