"""What the operators work on, and a call of each: the one place of the benchmarks that spells their arguments out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from bench.shapes import Shape
from sassha_fused.bucket import Bucket, Member
from sassha_fused.method import Method
from sassha_fused.selftest import HYPERPARAMETERS

GROUP = {**HYPERPARAMETERS, "lr": 1e-4, "weight_decay": 1e-4, "rho": 1e-3}


class Operands:
    """Parameters of given shapes with their state, gradients and products."""

    def __init__(
        self, shapes: Sequence[Shape], backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.shapes, self.device, self.dtype = shapes, device, dtype
        self.params, self.grads = self.normal(), self.normal()
        members, index = [], 0
        for param in self.params:
            members.append(Member(param, GROUP, index))
            index += param.numel()
        self.count, self.times = index, 1
        self.bucket = Bucket(members, [{} for _ in members], backend, Method())
        # As after a Hessian step: without one D and its bias correction are 0, and the weights would be NaN.
        self.bucket.counts.fill_(1)
        self.exp_hessian = cast(Tensor, self.bucket.exp_hessian)
        self.exp_hessian.uniform_()
        self.operators = self.bucket.operators
        self.norm = torch.ones((), dtype=torch.float64, device=device)

    def go_over_each(self, times: int) -> None:
        """From now on a call goes over the memory of each tensor several times in a row."""
        b = self.bucket
        often = [i for i in range(len(self.params)) for _ in range(times)]
        self.params, self.grads, b.offsets, b.rows = (
            [values[i] for i in often] for values in (self.params, self.grads, b.offsets, b.rows)
        )
        b.layouts = b.layouts[often]
        self.count, self.times = self.count * times, self.times * times

    def normal(self) -> list[Tensor]:
        return [torch.randn(shape, dtype=self.dtype, device=self.device) for shape in self.shapes]

    @cached_property
    def products(self) -> list[Tensor]:
        return self.normal()

    @cached_property
    def signs(self) -> list[Tensor]:
        return self.normal()

    @cached_property
    def estimate(self) -> Tensor:
        return torch.zeros_like(self.bucket.exp_avg)

    def grad_norm(self, adaptive: bool = False) -> Tensor:
        return self.operators.grad_norm(self.grads, self.params if adaptive else [], None, adaptive)

    def perturb(self, measure: bool = False) -> None:
        b = self.bucket
        place = (b.backup, b.offsets, b.rows, b.layouts)
        self.operators.perturb_(self.params, self.grads, *place, self.norm, measure, b.table.values, b.settings)

    def rademacher(self) -> None:
        self.operators.rademacher_(self.signs, self.bucket.indices, 0, self.bucket.evaluation, 0)

    def hutchinson(self) -> None:
        """Behind the first sample."""
        place = (self.estimate, self.bucket.offsets, self.bucket.indices)
        self.operators.hutchinson_(self.products, *place, 0, self.bucket.evaluation, 1, 3)

    def update(
        self,
        hessian: bool = False,
        check: bool = False,
        grads: Sequence[Tensor] | None = None,
        guard: Tensor | None = None,
    ) -> None:
        """By the gradients, or by others; guard: what must be finite besides, the norm unless it is given."""
        b = self.bucket
        products = self.products if hessian else []
        state = (b.exp_avg, b.exp_hessian, None, b.counts, b.skipped, b.offsets, b.rows, b.layouts, b.blocked)
        state = (None, b.backup, None, *state)
        guards, numbers = [self.norm if guard is None else guard], (b.table.values, b.settings)
        self.operators.update_(self.params, grads or self.grads, products, *state, guards, check, *numbers)
