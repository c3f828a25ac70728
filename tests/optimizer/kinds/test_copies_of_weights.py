"""Copies of the weights that torch keeps from pass to pass: autocast's casts, and what parametrize.cached() holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sassha_fused import Sassha
from tests.support.kinds import all_styles
from tests.support.problems import ALL_STYLES, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)

Around = Callable[[], AbstractContextManager[Any]]


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


class Run:
    """A network of plain or parametrized weights, the losses its optimizer has seen, and the weights they belong to."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        if kind == "symmetric":
            parametrize.register_parametrization(self.model[2], "weight", Symmetric())
        elif kind == "weight_norm":
            parametrizations.weight_norm(self.model[0])
            parametrizations.weight_norm(self.model[2])
        self.opt = Sassha(self.model.parameters(), lr=0.05, rho=0.5, hessian_interval=2, backend="cpu")
        self.inputs, self.targets = torch.randn(16, 6), torch.randint(0, 2, (16,))
        self.losses: list[Tensor] = []

    def loss(self) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(self.inputs).float(), self.targets)
        self.losses.append(loss.detach())
        return loss

    def result(self) -> dict[str, Any]:
        state = copy.deepcopy(self.opt.state_dict())
        return {"losses": self.losses, "weights": weights(self.model.parameters()), **state}


def autocast(cached: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached)


def around_each_step(run: Run, around: Around, style: str) -> None:
    for _ in range(4):
        with around():
            ALL_STYLES[style](run.opt, run.loss)


def around_the_loop(run: Run, around: Around, style: str) -> None:
    with around():
        for _ in range(4):
            ALL_STYLES[style](run.opt, run.loss)


def nested(run: Run, around: Around, style: str) -> None:
    with around():
        for _ in range(4):
            with around():
                ALL_STYLES[style](run.opt, run.loss)


def around_each_loss(run: Run, around: Around, style: str) -> None:
    def loss() -> Tensor:
        with around():
            return run.loss()

    with around():
        for _ in range(4):
            ALL_STYLES[style](run.opt, loss)


def after_an_evaluation(run: Run, around: Around, style: str) -> None:
    with around():
        for _ in range(4):
            with torch.no_grad():
                run.loss()
            ALL_STYLES[style](run.opt, run.loss)
            with torch.no_grad():
                run.loss()


PLACES = [around_each_step, around_the_loop, nested, around_each_loss, after_an_evaluation]


@all_styles
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_autocast_sees_the_weights_of_its_pass(place: Callable[..., None], style: str) -> None:
    cached, plain = Run("plain"), Run("plain")
    place(cached, lambda: autocast(True), style)
    place(plain, lambda: autocast(False), style)
    assert len({float(loss) for loss in cached.losses}) > len(cached.losses) // 2
    assert_same(cached.result(), plain.result())


# after_an_evaluation is left out: what torch caches under no_grad has no graph, with any optimizer.
@all_styles
@pytest.mark.parametrize("kind", ["symmetric", "weight_norm"])
@pytest.mark.parametrize("place", PLACES[:3], ids=lambda place: place.__name__)
def test_parametrized_weights_are_those_of_their_pass(place: Callable[..., None], kind: str, style: str) -> None:
    cached, plain = Run(kind), Run(kind)
    place(cached, parametrize.cached, style)
    place(plain, nullcontext, style)
    assert_same(cached.result(), plain.result())


def restored(run: Run) -> None:
    run.loss().backward()
    run.opt.perturb()
    run.loss()
    run.opt.restore()


def given_up_by_state_dict(run: Run) -> None:
    run.loss().backward()
    run.opt.perturb()
    run.loss()
    run.opt.state_dict()


def an_error_in_the_second_pass(run: Run) -> None:
    def loss() -> Tensor:
        if run.opt.perturbed:
            run.loss()
            raise KeyError("as a loader does")
        return run.loss()

    with pytest.raises(KeyError):
        run.opt.step(loss)


def a_skipped_step(run: Run) -> None:
    run.opt.step(lambda: run.loss() * (float("nan") if run.opt.perturbed else 1))


def products_checked(run: Run) -> None:
    run.opt.check_products(run.loss, tolerance=float("inf"))


@pytest.mark.parametrize("kind", ["plain", "symmetric"])
@pytest.mark.parametrize(
    "way",
    [restored, given_up_by_state_dict, an_error_in_the_second_pass, a_skipped_step, products_checked],
    ids=lambda way: way.__name__,
)
def test_every_way_back_brings_the_weights_that_are_there(way: Callable[[Run], None], kind: str) -> None:
    run = Run(kind)
    around: Around = (lambda: autocast(True)) if kind == "plain" else parametrize.cached
    fresh: Around = (lambda: autocast(False)) if kind == "plain" else nullcontext
    run.opt.step(run.loss)
    run.opt.zero_grad()
    with around():
        way(run)
        seen = run.loss().detach()
    with fresh():
        assert_same(seen, run.loss().detach())


def test_a_step_without_a_radius_forgets_them_too() -> None:
    results = []
    for cached in (True, False):
        run = Run("plain")
        for group in run.opt.param_groups:
            group["rho"] = 0.0
        with autocast(cached):
            for _ in range(4):
                run.opt.zero_grad()
                run.loss().backward(create_graph=run.opt.hessian_due)
                run.opt.step()
        results.append(run.result())
    assert_same(*results)
