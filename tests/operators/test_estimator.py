"""Hutchinson's estimate of the Hessian's diagonal: its mean and variance, on quadratics with a known Hessian."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, SophiaH
from sassha_fused.curvature import exact
from tests.support.backends import BACKENDS, each_quick_backend
from tests.support.cases import Recorder

SHAPES = ((3,), (), (2, 3))
SIZE = 10
# Means and variances are tested at this many standard deviations.
SIGMAS = 5


@functools.cache
def hessian(positive: bool) -> Tensor:
    """A symmetric matrix; if positive, so dominated by its diagonal that no estimate of that is ever negative."""
    A = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = A + A.T
    if positive:
        A.diagonal().copy_(A.abs().sum(1) + torch.arange(SIZE))
    return A


def parameters(backend: str) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=torch.float64, device=BACKENDS[backend])) for shape in SHAPES]


def loss(params: list[nn.Parameter], A: Tensor) -> Tensor:
    w = torch.cat([p.flatten() for p in params])
    return w @ A.to(w.device) @ w / 2


def assert_unbiased_with_the_variance_of_the_formula(estimates: Tensor, A: Tensor, samples: int) -> None:
    """The mean is the diagonal; of one sample the variance is the sum of the squares of the row's other elements."""
    count = len(estimates)
    others = A - A.diag().diag()
    variance, fourth = others.square().sum(1), others.pow(4).sum(1)
    # The fourth central moment of a sum of independent +-a_j, and then of the mean of samples.
    fourth = 3 * variance.square() - 2 * fourth
    fourth = (fourth + 3 * (samples - 1) * variance.square()) / samples**3
    variance = variance / samples

    error = (estimates.mean(0) - A.diag()).abs()
    assert (error <= SIGMAS * (variance / count).sqrt()).all()
    found = (estimates - A.diag()).square().mean(0)
    assert ((found - variance).abs() <= SIGMAS * ((fourth - variance.square()) / count).sqrt()).all()


@pytest.mark.slow
@each_quick_backend
@pytest.mark.parametrize("hessian_samples", [1, 3])
def test_mean_of_the_estimate_over_seeds_and_evaluations_is_the_diagonal(backend: str, hessian_samples: int) -> None:
    # With beta2 = 0 the state is the estimate itself, with lr = 0 the weights stay, and each step is an evaluation.
    A, estimates = hessian(positive=True), []
    for seed in range(80 if backend == "cpu" else 40):
        params = parameters(backend)
        options = {"lr": 0.0, "hessian_interval": 1, "hessian_samples": hessian_samples, "backend": backend}
        optimizer = Sassha(params, betas=(0.9, 0.0), seed=seed, **options)
        for _ in range(4):
            optimizer.step(lambda: loss(params, A))
            estimates.append(torch.cat([optimizer.state[p]["exp_hessian"].flatten() for p in params]).cpu())
    assert_unbiased_with_the_variance_of_the_formula(torch.stack(estimates), A, hessian_samples)


@pytest.mark.slow
@each_quick_backend
@pytest.mark.parametrize("hessian_samples", [2, 3])
def test_mean_of_the_signed_estimate_is_the_diagonal_of_an_indefinite_hessian(
    backend: str, hessian_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, estimates, recorder = hessian(positive=False), [], Recorder(monkeypatch)
    assert A.diag().min() < 0 < A.diag().max()
    for seed in range(250 if backend == "cpu" else 100):
        params = parameters(backend)
        Sassha(params, seed=seed, hessian_samples=hessian_samples, backend=backend).step(lambda: loss(params, A))
        estimates.append(torch.cat([recorder.products[p].flatten() for p in params]).cpu())
    assert_unbiased_with_the_variance_of_the_formula(torch.stack(estimates), A, hessian_samples)


@each_quick_backend
def test_the_estimate_of_a_diagonal_hessian_is_exact(backend: str) -> None:
    A = hessian(positive=True).diag().diag()
    params = parameters(backend)
    optimizer = Sassha(params, lr=0.0, betas=(0.9, 0.0), hessian_interval=1, hessian_samples=2, backend=backend)
    optimizer.step(lambda: loss(params, A))
    found = torch.cat([optimizer.state[p]["exp_hessian"].flatten() for p in params]).cpu()
    torch.testing.assert_close(found, A.diag(), rtol=1e-15, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# z Hz of one sample


class OtherFactor(torch.autograd.Function):
    """The sum of ab as a loss: its gradients are a and b themselves, and so its products are the probes of these."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a * b).sum()

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return b.clone(), a.clone()


# From parameters of shapes (3, 2), (2, 3) and (12,), by what autograd gives for a product.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a new tensor": lambda a, b, c: a.square().square().sum() + (b @ a).sum() + c.sin().sum(),
    "another's probe": lambda a, b, c: OtherFactor.apply(a.flatten(), b.flatten()) + c.square().sum(),
    "another's probe, transposed": lambda a, b, c: OtherFactor.apply(a.mT, b) + c.square().sum(),
    "parts of another's probe": lambda a, b, c: OtherFactor.apply(torch.cat([a.flatten(), b.flatten()]), c),
    "one tensor twice": lambda a, b, c: (a + b.mT).sin().sum() + c.sin().sum(),
    "one tensor twice, and none": lambda a, b, c: (a + b.mT).sin().sum() + c.sum(),
}


def memory_of(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@each_quick_backend
@pytest.mark.parametrize("given", LOSSES)
def test_signed_estimates_are_the_probe_times_the_products_whatever_autograd_gives_for_these(
    backend: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, recorder = BACKENDS[backend], Recorder(monkeypatch)
    params = [nn.Parameter(torch.randn(shape).to(device)) for shape in ((3, 2), (2, 3), (12,))]
    expected: list[Tensor] = []

    def products(*arguments: Any) -> Sequence[Tensor]:
        found, signs = exact.autograd_products(*arguments), arguments[2]
        assert memory_of(found).isdisjoint(memory_of(signs)) == ("probe" not in given)
        assert (len(memory_of(found)) < len(found)) == ("twice" in given or "parts" in given)
        expected[:] = [z * product for z, product in zip(signs, found, strict=True)]
        return found

    monkeypatch.setitem(exact.SOURCES, "autograd", exact.HessianSource(products, needs_graph=True))
    optimizer = SophiaH(params, hessian_interval=1, backend=backend)
    for _ in range(3):
        optimizer.step(lambda: LOSSES[given](*params))
        for param, estimate in zip(params, expected, strict=True):
            assert recorder.products[param].stride() == param.stride()
            assert torch.equal(recorder.products[param], estimate)
