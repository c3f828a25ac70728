"""Sassha written a second time: one parameter at a time, in plain torch, sharing no code with the package.

It is the ground truth of the conformance tests (on float64 copies) and, in float32, the per-tensor loop that the demo
and the benchmarks compare with: the same operations and temporaries as the published optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Random signs: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)

MASK = 0xFFFFFFFF
SIGNS_PER_BLOCK = 128


def philox4x32(counter: Any, key: tuple[int, int]) -> Any:
    """Four 32-bit words from four counter words and two key words, after 10 rounds.

    Words are Python ints; the counter's may also be uint64 arrays, since no product of two words exceeds 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd & MASK, (even >> 32) ^ c3 ^ k1, even & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def signs(start: int, count: int, seed: int, evaluation: int, sample: int) -> Tensor:
    """The +-1 (float64) of elements start, ..., start + count - 1 in one sample of one Hessian evaluation."""
    first, last = start // SIGNS_PER_BLOCK, (start + count + SIGNS_PER_BLOCK - 1) // SIGNS_PER_BLOCK
    block = np.arange(first, last, dtype=np.uint64)
    counter = (block & MASK, block >> 32, np.full_like(block, evaluation), np.full_like(block, sample))
    words = np.stack(philox4x32(counter, (seed & MASK, seed >> 32 & MASK)), axis=-1).astype("<u4")
    bits = np.unpackbits(words.view(np.uint8).reshape(-1), bitorder="little")
    bits = bits[start - first * SIGNS_PER_BLOCK :][:count]
    return torch.from_numpy(bits.astype(np.float64)).mul_(2).sub_(1)


# ---------------------------------------------------------------------------------------------------------------------
# The order that numbers a tensor's elements


def _dimension_order(t: Tensor) -> list[int]:
    """Dimensions from slowest to fastest in memory where t is dense and does not overlap, else as they are."""
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    return order if t.permute(order).is_contiguous() else list(range(t.dim()))


def memory_order(t: Tensor) -> Tensor:
    """The elements of t as a vector, in the order of memory where t is dense (then a view), else row-major."""
    return t.permute(_dimension_order(t)).reshape(-1)


def from_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse: a view of flat with the shape of like, such that memory_order(like) and flat correspond."""
    order = _dimension_order(like)
    return flat.view([like.size(d) for d in order]).permute(sorted(range(like.dim()), key=order.__getitem__))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def _wide(t: Tensor) -> Tensor:
    """t itself where it can be computed in; 16-bit tensors are computed in float32."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _norm(t: Tensor) -> float:
    """||t||_2 summed in float64; in pieces, because the whole of a large t in float64 would not fit the cache."""
    pieces = [t] if t.numel() <= 65536 else t.reshape(-1).split(65536)
    return math.sqrt(sum(torch.linalg.vector_norm(piece, dtype=torch.float64).item() ** 2 for piece in pieces))


def _is_finite(t: Tensor) -> bool:
    """No inf and no NaN in t; the norm is the cheaper test, but may overflow."""
    return math.isfinite(torch.linalg.vector_norm(t).item()) or bool(torch.isfinite(t).all())


class ReferenceSassha(torch.optim.Optimizer):
    """Sassha as a per-tensor loop.

    State per parameter: "step" (int, t), "hessian_step" (int, the exponent in c2), "exp_avg" and "exp_hessian" (float64
    for float64 parameters, else float32). What decides when Hessians are taken, and with which signs, is the
    optimizer's: hessian_interval, hessian_warmup, hessian_samples, seed, and steps_taken (T), which skipped steps leave
    alone. Every other hyperparameter may differ between groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        rho: float = 0.2,
        adaptive: bool = False,
        hessian_interval: int = 10,
        hessian_warmup: int = 0,
        hessian_samples: int = 1,
        hessian_power: float = 0.5,
        bias_correction: str = "step",
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "adaptive": adaptive,
            "hessian_power": hessian_power,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        self.hessian_interval = hessian_interval
        self.hessian_warmup = hessian_warmup
        self.hessian_samples = hessian_samples
        self.seed = seed
        self.steps_taken = 0
        self.hessian_evaluations = 0
        self.skipped_steps = 0
        self.perturbed = False
        self._backups: list[Tensor | None] = []
        self._grad_norm = 0.0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if shared := {"hessian_interval", "hessian_warmup", "hessian_samples", "seed"} & set(param_group):
            raise ValueError(f"one value for the whole optimizer, not for a group: {', '.join(sorted(shared))}")
        super().add_param_group(param_group)
        # A parameter listed twice is one parameter.
        param_group["params"] = list(dict.fromkeys(param_group["params"]))

    @property
    def hessian_due(self) -> bool:
        """Whether the coming update may be a Hessian step: whether its gradients need a graph.

        Due by the schedule, or because of a parameter that never had a Hessian: which ones will have a gradient in both
        passes is known in the end only, so that any that can (once perturbed: any that moved) counts.
        """
        first = self._in_first_pass() if self.perturbed else [p.requires_grad for _, p in self._each()]
        return self._is_hessian_step(first)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One step; the closure computes and returns the loss, backward is run here. Returns the first pass's loss.

        The closure is called twice, or once where rho is 0 in every group.
        """
        one_pass = all(group["rho"] == 0 for group in self.param_groups)
        loss, grads = self._backward(closure, create_graph=one_pass and self.hessian_due)
        losses = [loss]
        try:
            if not one_pass:
                self.perturb()
                second_loss, grads = self._backward(closure, create_graph=self.hessian_due)
                losses.append(second_loss)
            products = self._hessian_products(grads)
            if all(map(_is_finite, losses)):
                self.update(products)
            else:
                self._skip()
        except BaseException:
            self.restore()
            raise
        return loss

    @torch.no_grad()
    def perturb(self) -> None:
        """w <- w + rho g / (N + 1e-12) from p.grad, adaptive: times w^2; keeps backups of w and clears p.grad.

        Where N is not finite w stays as it is: the step will be skipped.
        """
        if self.perturbed:
            raise ValueError("perturb called twice")
        self._grad_norm = self._global_grad_norm()
        for group in self.param_groups:
            scale = group["rho"] / (self._grad_norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    self._backups.append(None)
                    continue
                self._backups.append(p.clone())
                if not math.isfinite(self._grad_norm):
                    continue
                w = _wide(p)
                grad = _wide(p.grad)
                e_w = (-grad if group["maximize"] else grad) * scale
                if group["adaptive"]:
                    e_w *= torch.pow(w, 2)
                w.add_(e_w)
                if w is not p:
                    p.copy_(w)
        self.perturbed = True
        self.zero_grad()

    @torch.no_grad()
    def update(self, products: Sequence[Tensor | None] | None = None) -> None:
        """The rest of the step from p.grad, after w is restored.

        products holds one entry per parameter in group order, on a Hessian step the estimate H (mean of z . Hz over
        samples, signed) of every parameter that takes part; it is None on a lazy step. Without perturb() before it, the
        step is an unperturbed one.
        """
        every = self._each()
        active = [
            (group, p, hess)
            for (group, p), hess, yes in zip(every, products or [None] * len(every), self._in_first_pass(), strict=True)
            if p.grad is not None and yes
        ]
        lazy = [p for _, p, hess in active if hess is None]
        if any(self._never_had_hessian(p) for p in lazy):
            raise ValueError("the first step of a parameter needs its Hessian product")
        if 0 < len(lazy) < len(active):
            raise ValueError("on a Hessian step every parameter that takes part needs its Hessian product")

        guards = [p.grad for _, p in every if p.grad is not None]
        guards += [hess for _, _, hess in active if hess is not None]
        if not (math.isfinite(self._grad_norm) and all(map(_is_finite, guards))):
            return self._skip()

        self.restore()
        self.steps_taken += len(active) > 0
        self.hessian_evaluations += len(active) > len(lazy)
        for group, p, hess in active:
            w = _wide(p)
            grad = _wide(p.grad)  # type: ignore[arg-type]
            self._update_one(group, p, w, -grad if group["maximize"] else grad, hess)
            if w is not p:
                p.copy_(w)

    def _update_one(self, group: dict[str, Any], p: Tensor, w: Tensor, grad: Tensor, hess: Tensor | None) -> None:
        """w is p, or its weights in the dtype that is computed in."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        state = self.state[p]
        if len(state) == 0:
            state["step"] = 0
            state["hessian_step"] = 0
            state["exp_avg"] = torch.zeros_like(w)
            state["exp_hessian"] = torch.zeros_like(w)
        exp_avg, exp_hessian = state["exp_avg"], state["exp_hessian"]
        state["step"] += 1

        w.mul_(1 - lr * group["weight_decay"])
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        if hess is not None:
            exp_hessian.mul_(beta2).add_(_wide(hess).abs(), alpha=1 - beta2)
            by_step = group["bias_correction"] == "step"
            state["hessian_step"] = state["step"] if by_step else state["hessian_step"] + 1
        corrected = group["bias_correction"] != "none"
        bias_correction1 = 1 - beta1 ** state["step"] if corrected else 1
        bias_correction2 = 1 - beta2 ** state["hessian_step"] if corrected else 1

        denom = ((exp_hessian / bias_correction2) ** group["hessian_power"]).add_(group["eps"])
        w.addcdiv_(exp_avg, denom, value=-lr / bias_correction1)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the weights that perturb moved, bit for bit."""
        for (_, p), backup in zip(self._each(), self._backups, strict=False):
            if backup is not None:
                p.copy_(backup)
        self._backups = []
        self._grad_norm = 0.0
        self.perturbed = False

    def _skip(self) -> None:
        self.restore()
        self.skipped_steps += 1

    def _each(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Every parameter with its group, in the order of products."""
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def _in_first_pass(self) -> list[bool]:
        """Which parameters had a gradient when perturb looked; without it the second pass is the first one, too."""
        return [b is not None for b in self._backups] if self.perturbed else [True] * len(self._each())

    def _never_had_hessian(self, p: Tensor) -> bool:
        return p not in self.state or self.state[p]["hessian_step"] == 0

    def _is_hessian_step(self, takes_part: Sequence[bool]) -> bool:
        """T mod k == 0, or T < warm-up, or a parameter that takes part has never had a Hessian."""
        scheduled = self.steps_taken % self.hessian_interval == 0 or self.steps_taken < self.hessian_warmup
        new = any(self._never_had_hessian(p) for (_, p), yes in zip(self._each(), takes_part, strict=True) if yes)
        return scheduled or new

    def _global_grad_norm(self) -> float:
        norms = []
        for group, p in self._each():
            if p.grad is None:
                continue
            grad = p.grad
            if group["adaptive"]:
                grad = torch.abs(_wide(p)) * _wide(grad)
            norms.append(_norm(grad))
        return math.sqrt(sum(norm**2 for norm in norms))

    def _backward(
        self, closure: Callable[[], Tensor], create_graph: bool = False
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, detached, and the gradient of every parameter; p.grad gets it without its graph."""
        with torch.enable_grad():
            loss = closure()
        params = [p for _, p in self._each()]
        wanted = [p for p in params if p.requires_grad] if loss.requires_grad else []
        found = iter(torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True) if wanted else ())
        grads = [next(found) if loss.requires_grad and p.requires_grad else None for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.detach()
        return loss.detach(), grads

    def _hessian_products(self, grads: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """H = 1/S sum_s z_s . (d/dw' <g~, z_s>) where the weights now are, of every parameter that takes part.

        None on a lazy step.
        """
        takes_part = [grad is not None and yes for grad, yes in zip(grads, self._in_first_pass(), strict=True)]
        if not self._is_hessian_step(takes_part):
            return None
        products: list[Tensor | None] = []
        due, start = [], 0
        for (_, p), grad, yes in zip(self._each(), grads, takes_part, strict=True):
            hess = None
            if yes:
                hess = torch.zeros_like(_wide(p))
                due.append((p, start, grad, hess))
            products.append(hess)
            start += p.numel()

        if not any(grad.requires_grad for _, _, grad, _ in due):
            return products  # all of them enter the loss linearly
        for sample in range(self.hessian_samples):
            zs = []
            for p, start, _, _ in due:
                flat = signs(start, p.numel(), self.seed, self.hessian_evaluations, sample)
                zs.append(from_memory_order(flat.to(p), p))
            h_zs = torch.autograd.grad(
                [grad for _, _, grad, _ in due if grad.requires_grad],
                [p for p, _, _, _ in due],
                grad_outputs=[z for z, (_, _, grad, _) in zip(zs, due, strict=True) if grad.requires_grad],
                retain_graph=sample < self.hessian_samples - 1,
                materialize_grads=True,
            )
            for (_, _, _, hess), z, h_z in zip(due, zs, h_zs, strict=True):
                hess += z * h_z / self.hessian_samples
        return products
