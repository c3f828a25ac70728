"""Conformance on this machine: every operator of every backend, on every device, against the formulas in float64.

The expected values come from the eager operators run in float64 on the CPU; the tests of the project hold these to an
independent reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from . import eager
from .bucket import Bucket, Member
from .checks import DTYPES
from .family import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH
from .layout import view_of
from .method import Method
from .ops import Operators, available_backends, operators

# Around the vectors, tiles and blocks of the kernels, and nothing at all.
SIZES = (0, 1, 7, 16, 33, 63, 64, 65, 255, 1023, 16383, 16385, 70001)
# In units in the last place of each value or of 1, the size of the terms it is summed from, whichever is larger.
TOLERANCE_ULP = 8.0

HYPERPARAMETERS = {
    "lr": 0.15,
    "betas": (0.9, 0.999),
    "eps": 1e-4,
    "weight_decay": 0.01,
    "rho": 0.2,
    "hessian_power": 0.5,
    "adaptive": False,
    "maximize": False,
    "bias_correction": "step",
}


@dataclass(frozen=True)
class Result:
    """The outcome of one case: the largest error in ulp, or what was raised."""

    device: str
    backend: str
    dtype: str
    operator: str
    error: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return not self.failure and self.error <= TOLERANCE_ULP


@dataclass(frozen=True)
class _Member:
    """A member of the family, and what its groups say otherwise than HYPERPARAMETERS."""

    method: Method
    changes: dict[str, Any] = field(default_factory=dict)


class _Case:
    """Random parameters, gradients and state, the same numbers on any device and in any dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, exact: bool, member: _Member) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(count: int) -> Tensor:
            return torch.randn(count, dtype=torch.float64, generator=generator).to(dtype)

        def tensors() -> list[Tensor]:
            # Blocks are those of parameters of two dimensions.
            return [random(size).to(device, torch.float64 if exact else dtype).view(1, -1) for size in SIZES]

        params, self.grads, self.products = tensors(), tensors(), tensors()
        starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
        # Of two groups, as every other parameter of the optimizer may be.
        own = {**HYPERPARAMETERS, **member.changes}
        groups = (own, {**own, "lr": 0.05, "weight_decay": 0.0, "rho": 0.5})
        members = [Member(p, groups[i % 2], start) for i, (p, start) in enumerate(zip(params, starts, strict=True))]
        self.bucket = Bucket(members, [{} for _ in members], "eager", member.method)
        self.bucket.exp_avg.copy_(random(self.bucket.exp_avg.numel()).float())
        if self.bucket.exp_hessian is not None:
            self.bucket.exp_hessian.copy_(random(self.bucket.exp_hessian.numel()).float().abs())
        self.bucket.counts.fill_(3)

    def state(self) -> list[Tensor]:
        """What a step changes."""
        bucket = self.bucket
        averages = [flat for flat in (bucket.exp_avg, bucket.exp_hessian) if flat is not None]
        return [*bucket.params, *averages, bucket.counts, bucket.skipped]


def _grad_norm(case: _Case, backend: Operators) -> list[Tensor]:
    params = case.bucket.params
    return [backend.grad_norm(case.grads, params, case.bucket.layouts, adaptive) for adaptive in (False, True)]


def _perturb(measure: bool) -> Callable[[_Case, Operators], list[Tensor]]:
    def run(case: _Case, backend: Operators) -> list[Tensor]:
        bucket = case.bucket
        norm = torch.tensor(7.0, dtype=torch.float64, device=bucket.device)
        backend.perturb_(
            bucket.params,
            case.grads,
            bucket.backup,
            bucket.offsets,
            bucket.rows,
            bucket.layouts,
            norm,
            measure,
            bucket.table.values,
            bucket.settings,
        )
        backups = [view_of(bucket.backup, offset, p) for offset, p in zip(bucket.offsets, bucket.params, strict=True)]
        return [*bucket.params, *backups, norm]

    return run


def _rademacher(case: _Case, backend: Operators) -> list[Tensor]:
    bucket = case.bucket
    signs = [torch.empty_like(param) for param in bucket.params]
    backend.rademacher_(signs, bucket.indices, 2**40 + 1, bucket.evaluation.fill_(3), 1)
    return signs


def _hutchinson(case: _Case, backend: Operators) -> list[Tensor]:
    bucket = case.bucket
    estimate = torch.zeros_like(bucket.exp_avg)
    for sample in range(3):
        backend.hutchinson_(case.products, estimate, bucket.offsets, bucket.indices, 5, bucket.evaluation, sample, 3)
    return [estimate]


def _update(hessian: bool, spoilt: bool = False) -> Callable[[_Case, Operators], list[Tensor]]:
    def run(case: _Case, backend: Operators) -> list[Tensor]:
        bucket = case.bucket
        for offset, param in zip(bucket.offsets, bucket.params, strict=True):
            view_of(bucket.backup, offset, param).copy_(param)
        guards = [torch.ones((), dtype=torch.float64, device=bucket.device)]
        if spoilt:
            case.grads[-1][0, -1] = torch.nan
        backend.update_(
            bucket.params,
            case.grads,
            case.products if hessian else [],
            None,
            bucket.backup,
            None,
            bucket.exp_avg,
            bucket.exp_hessian,
            None,
            bucket.counts,
            bucket.skipped,
            bucket.offsets,
            bucket.rows,
            bucket.layouts,
            bucket.blocked,
            guards,
            True,
            bucket.table.values,
            bucket.settings,
        )
        return case.state()

    return run


def _along_average(case: _Case, backend: Operators) -> list[Tensor]:
    """To w' along exp_avg and, by a step that has the norm of the next one, from there."""
    bucket, norm = case.bucket, torch.zeros((), dtype=torch.float64, device=case.bucket.device)
    place, numbers = (bucket.offsets, bucket.rows, bucket.layouts), (bucket.table.values, bucket.settings)
    # Of narrow parameters w cannot be worked out.
    known, backup = (norm, None) if bucket.exp_avg.dtype == bucket.dtype else (None, bucket.backup)
    backend.perturb_(bucket.params, bucket.averages, backup, *place, norm, True, *numbers)
    moved = [param.clone() for param in bucket.params]
    next_norm = torch.zeros_like(norm)
    state = (bucket.exp_avg, bucket.exp_hessian, next_norm, bucket.counts, bucket.skipped)
    backend.update_(
        bucket.params, case.grads, [], None, backup, known, *state, *place, bucket.blocked, [norm], True, *numbers
    )
    return [*moved, norm, next_norm.to(bucket.exp_avg.dtype), *case.state()]


def _by_blocks(case: _Case, backend: Operators) -> list[Tensor]:
    """A Hessian step whose elements share D by blocks."""
    bucket, hessian = case.bucket, cast(Tensor, case.bucket.exp_hessian)
    averaged, guard = hessian.clone(), torch.ones((), dtype=torch.float64, device=bucket.device)
    backend.block_average_(case.products, hessian, averaged, bucket.offsets, bucket.blocked, bucket.settings)
    state = (bucket.exp_avg, hessian, None, bucket.counts, bucket.skipped)
    place, numbers = (bucket.offsets, bucket.rows, bucket.layouts), (bucket.table.values, bucket.settings)
    backend.update_(
        bucket.params, case.grads, [], averaged, None, None, *state, *place, bucket.blocked, [guard], True, *numbers
    )
    return [averaged, *case.state()]


_SASSHA = _Member(Sassha.method)
_SGD = {"momentum": 0.9, "nesterov": True}

CASES: dict[str, tuple[_Member, Callable[[_Case, Operators], list[Tensor]]]] = {
    "grad_norm": (_SASSHA, _grad_norm),
    "perturb_": (_SASSHA, _perturb(False)),
    "perturb_ (measuring)": (_SASSHA, _perturb(True)),
    "rademacher_": (_SASSHA, _rademacher),
    "hutchinson_": (_SASSHA, _hutchinson),
    "block_average_": (_Member(Sassha.method, {"hessian_block": 32}), _by_blocks),
    "update_ (lazy)": (_SASSHA, _update(False)),
    "update_ (Hessian)": (_SASSHA, _update(True)),
    "update_ (skipped)": (_SASSHA, _update(True, spoilt=True)),
    "MSassha": (_Member(MSassha.method), _along_average),
    "SAMSGD": (_Member(SAMSGD.method, _SGD), _update(False)),
    "SAMSGD along -m": (_Member(SAMSGD.method, {**_SGD, "ascent": "momentum"}), _along_average),
    "SAMAdamW": (_Member(SAMAdamW.method), _update(False)),
    "AdaHessian": (_Member(AdaHessian.method), _update(True)),
    "SophiaH": (_Member(SophiaH.method, {"clip_threshold": 0.04, "eps": 0.1}), _update(True)),
}


def _error_in_ulp(actual: Tensor, expected: Tensor) -> float:
    """The largest error of any element, in units in the last place; inf where a NaN or inf is new."""
    if actual.numel() == 0:
        return 0.0
    exact = expected.double()
    difference = (actual.cpu().double() - exact).abs()
    if not actual.is_floating_point():
        return 0.0 if not difference.any() else float("inf")
    # The expected values are themselves rounded in float64.
    epsilon = max(torch.finfo(actual.dtype).eps, 1e-12 / TOLERANCE_ULP)
    return float((difference / (exact.abs().clamp(min=1) * epsilon)).nan_to_num(nan=float("inf")).max())


def run() -> Iterator[Result]:
    """Runs every case on every device, backend and dtype that there is, one after the other."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        for backend, reason in available_backends().items():
            if reason is not None:
                continue
            try:
                chosen = operators(backend, device)
            except ValueError:
                continue
            for dtype in DTYPES:
                for name, (member, case) in CASES.items():
                    error, failure = float("inf"), ""
                    try:
                        found = case(_Case(device, dtype, False, member), chosen)
                        expected = case(_Case(torch.device("cpu"), dtype, True, member), eager)
                        error = max(_error_in_ulp(a, e) for a, e in zip(found, expected, strict=True))
                    except Exception as raised:  # a backend's failure is a row of the table, whatever it is
                        failure = f"{type(raised).__name__}: {raised}"
                    yield Result(str(device), backend, str(dtype).removeprefix("torch."), name, error, failure)


def main() -> int:
    """Prints the table as it grows; returns 1 if any case failed."""
    layout = "{:8} {:8} {:9} {:20} {:>12}  {}"
    print(layout.format("device", "backend", "dtype", "operator", "error (ulp)", "result"))
    failed = count = 0
    for result in run():
        outcome = "passed" if result.passed else f"FAILED {result.failure}"
        print(
            layout.format(result.device, result.backend, result.dtype, result.operator, f"{result.error:.2f}", outcome),
            flush=True,
        )
        count += 1
        failed += not result.passed
    print(f"{count - failed} passed, {failed} failed")
    return int(failed > 0)
