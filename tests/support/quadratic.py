"""Sassha on a quadratic, in closed form: what the tests of the reference compare with, and what else they share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.support.reference import ReferenceSassha, memory_order, philox4x32


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def snapshot(opt: ReferenceSassha) -> list[Any]:
    """Everything a step may change, copied."""
    weights = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    states = [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in opt.state[p].items()}
        for group in opt.param_groups
        for p in group["params"]
        if p in opt.state
    ]
    return [weights, states, opt.steps_taken, opt.hessian_evaluations, opt.perturbed]


def assert_bitwise(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@functools.cache
def words_of_block(b: int, seed: int, h: int, s: int) -> tuple[int, int, int, int]:
    return philox4x32((b % 2**32, b // 2**32, h, s), (seed % 2**32, seed // 2**32))


def sign_by_definition(i: int, seed: int, h: int, s: int) -> int:
    words = words_of_block(i // 128, seed, h, s)
    return 1 if words[(i % 128) // 32] >> (i % 32) & 1 else -1


# ---------------------------------------------------------------------------------------------------------------------
# The quadratic

SHAPES = [(3,), (4, 2), (), (130,)]
SIZE = 142
EVERY = (True,) * len(SHAPES)


def quadratic(seed: int = 0) -> tuple[Tensor, Tensor, list[torch.nn.Parameter], Callable[..., Tensor]]:
    """A, b, the parameters (the second one transposed in memory) and the loss w A w / 2 + b w.

    The loss takes the parameters that are present, by default all; the others enter it as constants.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, b = randn(SIZE, SIZE), randn(SIZE)
    A = (A + A.T) / 4 + 3 * torch.diag(randn(SIZE).abs() + 1)
    params = [torch.nn.Parameter(randn(4, 2).t() if shape == (4, 2) else randn(*shape)) for shape in SHAPES]

    def loss(present: Sequence[bool] = EVERY) -> Tensor:
        parts = [p if yes else p.detach() for p, yes in zip(params, present, strict=True)]
        w = torch.cat([p.t().reshape(-1) if p.dim() == 2 else p.reshape(-1) for p in parts])
        return 0.5 * w @ A @ w + b @ w

    return A, b, params, loss


def per_element(values: Sequence[Any]) -> np.ndarray:
    """One value per parameter, repeated for each of its elements."""
    return np.repeat(np.array(values), [math.prod(shape) for shape in SHAPES])


def in_one(tensors: Iterable[Tensor]) -> np.ndarray:
    """The elements of one tensor per parameter, each in the order of memory."""
    return torch.cat([memory_order(t.detach()) for t in tensors]).numpy().copy()


class Attempt(NamedTuple):
    """A step to be: which parameters have a gradient in its first and in its second pass, and whether it is finite."""

    first: Sequence[bool] = EVERY
    second: Sequence[bool] = EVERY
    finite: bool = True


class Outcome(NamedTuple):
    """What there is after it, element by element: w, m, D, t and the exponent of c2; and the Hessian steps so far."""

    w: np.ndarray
    m: np.ndarray
    D: np.ndarray
    t: np.ndarray
    exponent: np.ndarray
    hessian_steps: int


BASE = {
    "lr": 0.05,
    "betas": (0.9, 0.99),
    "eps": 1e-3,
    "weight_decay": 0.01,
    "rho": 0.2,
    "adaptive": False,
    "hessian_power": 0.5,
    "bias_correction": "step",
    "maximize": False,
}
SCHEDULE = {"hessian_interval": 3, "hessian_warmup": 0, "hessian_samples": 1, "seed": 0}


def closed_form(
    A: np.ndarray,
    b: np.ndarray,
    w: np.ndarray,
    hyper: Sequence[dict[str, Any]],
    schedule: dict[str, int],
    attempts: Iterable[Attempt],
) -> Iterator[Outcome]:
    """Sassha on w A w / 2 + b w, all elements at once; hyper holds BASE or the like for each parameter."""

    def column(name: str) -> np.ndarray:
        return per_element([h[name] for h in hyper])

    beta1, beta2 = (per_element([h["betas"][i] for h in hyper]) for i in (0, 1))
    lr, eps, decay, rho, power = map(column, ["lr", "eps", "weight_decay", "rho", "hessian_power"])
    adaptive, sign, correction = column("adaptive"), np.where(column("maximize"), -1, 1), column("bias_correction")
    k, warmup, samples, seed = (schedule[name] for name in SCHEDULE)
    T = h = 0
    m, D, t, n, exponent = (np.zeros(w.size) for _ in range(5))
    for attempt in attempts:
        first, second = per_element(attempt.first), per_element(attempt.second)
        both = first & second
        if attempt.finite and both.any():
            g = first * sign * (A @ w + b)
            norm = np.sqrt(np.sum((np.where(adaptive, np.abs(w), 1) * g) ** 2))
            moved = w + rho * np.where(adaptive, w**2, 1) * g / (norm + 1e-12)
            g = sign * (A @ moved + b)
            t = t + both
            if T % k == 0 or warmup > T or (both & (n == 0)).any():
                z = np.array([[sign_by_definition(i, seed, h, s) for i in range(w.size)] for s in range(samples)])
                H = np.mean([z[s] * (A @ (z[s] * both)) for s in range(samples)], axis=0)
                D = np.where(both, beta2 * D + (1 - beta2) * np.abs(H), D)
                n = n + both
                exponent = np.where(both, np.where(correction == "step", t, n), exponent)
                h += 1
            m = np.where(both, beta1 * m + (1 - beta1) * g, m)
            with np.errstate(divide="ignore", invalid="ignore"):  # of elements that have not taken part yet
                c1, c2 = (np.where(correction == "none", 1, 1 - beta**i) for beta, i in [(beta1, t), (beta2, exponent)])
                new_w = w * (1 - lr * decay) - lr / c1 * m / ((D / c2) ** power + eps)
            w = np.where(both, new_w, w)
            T += 1
        yield Outcome(w, m, D, t, exponent, h)


def check_against_closed_form(
    groups: Sequence[dict[str, Any]], schedule: dict[str, int], attempts: Sequence[Attempt], problem: int = 0
) -> ReferenceSassha:
    """Takes the steps with the reference and compares all that there is after each; returns the optimizer.

    groups: what a group has in place of BASE's values; of several, the first two have a parameter each.
    """
    A, b, params, loss = quadratic(problem)
    schedule = {**SCHEDULE, **schedule}
    parts = [params] if len(groups) == 1 else [params[:1], params[1:2], params[2:]]
    opt = ReferenceSassha(
        [{"params": part, **group} for part, group in zip(parts, groups, strict=True)], **{**BASE, **schedule}
    )
    hyper = [{**BASE, **group} for part, group in zip(parts, groups, strict=True) for _ in part]
    passes = 1 if all(h["rho"] == 0 for h in hyper) else 2
    outcomes = closed_form(A.numpy(), b.numpy(), in_one(params), hyper, schedule, attempts)
    for step, (attempt, outcome) in enumerate(zip(attempts, outcomes, strict=True), start=1):
        present = iter([attempt.first, attempt.second][:passes])
        value = loss().item()
        scale = 1 if attempt.finite else math.inf
        assert opt.step(lambda: scale * loss(next(present))).item() == scale * value
        assert next(present, None) is None, "a pass is missing"
        states = [opt.state.get(p, {}) for p in params]
        for name, tensors, expected in [
            ("w", params, outcome.w),
            ("m", [s.get("exp_avg", torch.zeros_like(p)) for s, p in zip(states, params)], outcome.m),
            ("D", [s.get("exp_hessian", torch.zeros_like(p)) for s, p in zip(states, params)], outcome.D),
        ]:
            atol = 1e-12 * np.abs(expected).max()
            np.testing.assert_allclose(in_one(tensors), expected, rtol=1e-11, atol=atol, err_msg=f"{name}, step {step}")
        assert per_element([s.get("step", 0) for s in states]).tolist() == outcome.t.tolist(), f"step {step}"
        counts = per_element([s.get("hessian_step", 0) for s in states])
        assert counts.tolist() == outcome.exponent.tolist(), f"step {step}"
        assert opt.hessian_evaluations == outcome.hessian_steps, f"step {step}"
    return opt
