"""Members of the family beside other people's implementations, where these are right; and where they are not, how."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sassha_fused
from sassha_fused import SAMSGD, AdaHessian, SAMAdamW, SophiaH
from tests.support.reference import signs


def both(member: Any, peer: Any, options: dict[str, Any], of_peer: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double() for _ in "ab"
    )
    theirs.load_state_dict(ours.state_dict())
    opts = member(ours.parameters(), **options), peer(theirs.parameters(), **of_peer)
    for _ in range(20):
        x, y = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
        for opt, model in zip(opts, (ours, theirs), strict=True):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_without_a_radius_samsgd_is_sgd(options: dict[str, Any], maximize: bool) -> None:
    options = {"lr": 1e-3 if maximize else 0.1, "maximize": maximize, **options}
    both(sassha_fused.SAMSGD, torch.optim.SGD, {**options, "rho": 0.0}, options)


@pytest.mark.parametrize("options", [{}, {"lr": 0.01, "betas": (0.5, 0.7), "eps": 1e-3}, {"maximize": True}], ids=str)
def test_without_a_radius_samadamw_is_adamw(options: dict[str, Any]) -> None:
    both(sassha_fused.SAMAdamW, torch.optim.AdamW, {**options, "rho": 0.0}, options)


# ---------------------------------------------------------------------------------------------------------------------
# pytorch_optimizer


@pytest.fixture(scope="module")
def peers() -> Any:
    return pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")


class Pair:
    """Two copies of a model, and batches for every step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.ours = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
        self.theirs = copy.deepcopy(self.ours)
        self.inputs, self.targets = torch.randn(20, 16, 5).double(), torch.randn(20, 16, 2).double()

    def loss(self, model: nn.Module, step: int) -> Tensor:
        return (model(self.inputs[step]) - self.targets[step]).square().mean()

    def assert_close(self, rtol: float) -> None:
        for a, b in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 100)

    def apart(self) -> float:
        pairs = zip(self.ours.parameters(), self.theirs.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("member", "base", "options"),
    [
        (SAMSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (SAMAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ],
    ids=["SGD", "AdamW"],
)
def test_sam_is_that_of_pytorch_optimizer_along_one_norm(
    peers: Any, member: Any, base: Any, options: dict[str, Any], adaptive: bool
) -> None:
    pair = Pair()
    mine = member(pair.ours.parameters(), rho=0.1, adaptive=adaptive, **options)
    other = peers.SAM(pair.theirs.parameters(), base, rho=0.1, adaptive=adaptive, **options)
    for step in range(20):
        mine.step(lambda: pair.loss(pair.ours, step))

        def closure() -> Tensor:
            other.zero_grad()
            loss = pair.loss(pair.theirs, step)
            loss.backward()
            return loss

        closure()
        other.step(closure)
    pair.assert_close(1e-6)  # there the norm is one of float32


def with_same_hessian(pair: Pair, mine: Any, other: Any, interval: int, count: int = 20) -> None:
    """Steps of both; the other gets the product of the signs that ours draws."""
    evaluation = 0
    for step in range(count):
        mine.step(lambda: pair.loss(pair.ours, step))
        other.zero_grad()
        due = step % interval == 0
        params = list(pair.theirs.parameters())
        grads = torch.autograd.grad(pair.loss(pair.theirs, step), params, create_graph=due)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.detach()
        if due:
            starts = [sum(p.numel() for p in params[:i]) for i in range(len(params))]
            zs = [signs(s, p.numel(), 0, evaluation, 0).view_as(p) for s, p in zip(starts, params, strict=True)]
            products = torch.autograd.grad(grads, params, zs)
            other.step(hessian=[z * product for z, product in zip(zs, products, strict=True)])
            evaluation += 1
        else:
            other.step()


ADAHESSIAN = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.01}


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_adahessian_is_that_of_pytorch_optimizer(peers: Any, power: float) -> None:
    pair = Pair()
    mine = AdaHessian(pair.ours.parameters(), hessian_power=power, **ADAHESSIAN)
    other = peers.AdaHessian(pair.theirs.parameters(), hessian_power=power, foreach=False, **ADAHESSIAN)
    with_same_hessian(pair, mine, other, 1)
    pair.assert_close(1e-9)


def test_lazy_adahessian_there_corrects_an_average_by_steps_that_did_not_enter_it(peers: Any) -> None:
    # c2 = 1 - beta2^t goes on with t on lazy steps, though D stands still; here it stays that of the last Hessian step.
    pair = Pair()
    mine = AdaHessian(pair.ours.parameters(), hessian_interval=3, **ADAHESSIAN)
    other = peers.AdaHessian(pair.theirs.parameters(), update_period=3, foreach=False, **ADAHESSIAN)
    with_same_hessian(pair, mine, other, 3, count=1)
    pair.assert_close(1e-9)
    pair = Pair()
    mine = AdaHessian(pair.ours.parameters(), hessian_interval=3, **ADAHESSIAN)
    other = peers.AdaHessian(pair.theirs.parameters(), update_period=3, foreach=False, **ADAHESSIAN)
    with_same_hessian(pair, mine, other, 3, count=3)
    assert pair.apart() > 1e-3


@pytest.mark.parametrize("interval", [1, 3])
def test_sophia_is_that_of_pytorch_optimizer_with_its_learning_rate_over_gamma(peers: Any, interval: int) -> None:
    # There the step is lr clip(m / max(D, eps), -p, p): p is gamma, and lr is ours over gamma.
    gamma, lr = 0.05, 0.01
    pair = Pair()
    mine = SophiaH(
        pair.ours.parameters(), lr=lr, clip_threshold=gamma, hessian_interval=interval, weight_decay=0.0, eps=1e-15
    )
    other = peers.SophiaH(pair.theirs.parameters(), lr=lr / gamma, p=gamma, update_period=interval, eps=1e-15)
    with_same_hessian(pair, mine, other, interval)
    pair.assert_close(1e-6)


def test_sophia_there_decays_by_the_learning_rate_over_gamma(peers: Any) -> None:
    # Its decay has the learning rate that is larger by 1 / gamma.
    gamma, lr, decay = 0.05, 0.01, 0.1
    pair = Pair()
    options: dict[str, Any] = {"hessian_interval": 1, "eps": 1e-15, "clip_threshold": gamma}
    mine = SophiaH(pair.ours.parameters(), lr=lr, weight_decay=decay, **options)
    other = peers.SophiaH(
        pair.theirs.parameters(), lr=lr / gamma, p=gamma, update_period=1, eps=1e-15, weight_decay=gamma * decay
    )
    with_same_hessian(pair, mine, other, 1)
    pair.assert_close(1e-6)
