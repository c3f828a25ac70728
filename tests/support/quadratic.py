"""What the tests of the reference share: copies of all that a step may change, signs one by one, a quadratic loss."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import ReferenceSassha, philox4x32


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
    return [weights, states, opt.hessian_evaluations, opt.perturbed]


def assert_bitwise(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@functools.cache
def words_of_block(b: int, seed: int, h: int, s: int) -> tuple[int, int, int, int]:
    return philox4x32((b % 2**32, b // 2**32, h, s), (seed % 2**32, seed // 2**32))


def sign_by_definition(i: int, seed: int, h: int, s: int) -> int:
    words = words_of_block(i // 128, seed, h, s)
    return 1 if words[(i % 128) // 32] >> (i % 32) & 1 else -1


SHAPES = [(3,), (4, 2), (), (130,)]
SIZE = 142


def quadratic(seed: int = 0) -> tuple[Tensor, Tensor, list[torch.nn.Parameter], Callable[[], Tensor]]:
    """A, b, the parameters (the second one transposed in memory) and the loss w A w / 2 + b w."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, b = randn(SIZE, SIZE), randn(SIZE)
    A = (A + A.T) / 4 + 3 * torch.diag(randn(SIZE).abs() + 1)
    params = [torch.nn.Parameter(randn(4, 2).t() if shape == (4, 2) else randn(*shape)) for shape in SHAPES]

    def loss() -> Tensor:
        w = torch.cat([p.t().reshape(-1) if p.dim() == 2 else p.reshape(-1) for p in params])
        return 0.5 * w @ A @ w + b @ w

    return A, b, params, loss
