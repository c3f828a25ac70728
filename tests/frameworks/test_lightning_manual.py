"""Lightning's manual optimization: its optimizers, wrapped in a dynamic subclass, take the steps of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import MSassha, Sassha
from sassha_fused.optimizer import FusedOptimizer
from tests.support.lightning_runs import (
    BATCHES,
    fit,
    import_lightning,
    loss_of,
    module_of,
    plain_loop,
    snapshot,
)
from tests.support.members import MEMBERS, OfMember
from tests.support.problems import Problem, assert_same, single_threaded, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
one_thread = pytest.fixture(autouse=True)(single_threaded)


def phases(module: Any, problem: Problem, batch: int) -> None:
    opt = module.optimizers()
    if isinstance(problem, OfMember) and problem.along_momentum:
        opt.perturb()
    elif "rho" in opt.defaults:
        module.manual_backward(loss_of(problem, batch))
        opt.perturb()
    with opt.hessian_pass():
        module.manual_backward(loss_of(problem, batch))
    opt.step()
    opt.zero_grad()


def closures(module: Any, problem: Problem, batch: int) -> None:
    opt = module.optimizers()

    def closure() -> Tensor:
        loss = loss_of(problem, batch)
        opt.zero_grad()
        module.manual_backward(loss)
        return loss

    opt.step(closure)


def losses(module: Any, problem: Problem, batch: int) -> None:
    module.optimizers().step(lambda: loss_of(problem, batch))


def accumulated(module: Any, problem: Problem, batch: int) -> None:
    opt = module.optimizers()

    def closure() -> Tensor:
        loss = loss_of(problem, batch) / 3
        module.manual_backward(loss)
        return loss

    if batch % 3 == 2 or batch == BATCHES - 1:
        opt.step(closure)
    else:
        opt.accumulate(closure)


def in_style(problem: Problem, style: Callable[[Any, Problem, int], None], tmp_path: Any, **options: Any) -> Any:
    def training_step(self: Any, batch: int, index: int) -> None:
        style(self, problem, batch)

    return fit(problem, tmp_path, module_of(problem, training_step=training_step), **options)


@pytest.mark.parametrize("style", [phases, closures, losses, accumulated])
@pytest.mark.parametrize("member", ["Sassha", *MEMBERS])
def test_each_style_is_the_plain_loop(member: str, style: Callable[..., None], tmp_path: Any) -> None:
    problem, expected = (Problem() if member == "Sassha" else OfMember(member) for _ in range(2))
    trainer = in_style(problem, style, tmp_path)
    plain_loop(expected, 3 if style is accumulated else 1)
    assert_same(snapshot(problem), snapshot(expected))
    assert not problem.opt.perturbed
    assert style is accumulated or trainer.global_step == 2 * BATCHES


# ---------------------------------------------------------------------------------------------------------------------
# 16-mixed


def scaled_phases(module: Any, problem: Problem, batch: int) -> None:
    opt = module.optimizers()
    module.manual_backward(loss_of(problem, batch))
    opt.perturb(scaler=module.trainer.precision_plugin.scaler)
    with opt.hessian_pass():
        module.manual_backward(loss_of(problem, batch))
    opt.step()
    opt.zero_grad()


def clipped_phases(module: Any, problem: Problem, batch: int) -> None:
    opt = module.optimizers()
    module.manual_backward(loss_of(problem, batch))
    opt.perturb(scaler=module.trainer.precision_plugin.scaler)
    with opt.hessian_pass():
        module.manual_backward(loss_of(problem, batch))
    module.clip_gradients(opt, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
    opt.step()
    opt.zero_grad()


def clipped_closures(module: Any, problem: Problem, batch: int) -> None:
    opt = module.optimizers()

    def closure() -> Tensor:
        loss = loss_of(problem, batch)
        opt.zero_grad()
        module.manual_backward(loss)
        module.clip_gradients(opt, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        return loss

    opt.step(closure)


def scaler_of() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=20)


@pytest.mark.parametrize(
    "plugin, style",
    [
        ("MixedPrecision", scaled_phases),
        *(("HalfPrecision", style) for style in (scaled_phases, closures, clipped_phases, clipped_closures)),
    ],
)
def test_half_precision_is_the_plain_loop(plugin: str, style: Callable[..., None], tmp_path: Any) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    from sassha_fused.lightning import HalfPrecision

    kinds = {"MixedPrecision": partial(MixedPrecision, "16-mixed"), "HalfPrecision": HalfPrecision}
    own = kinds[plugin]("cpu", scaler_of())
    problem, expected, scaler = Problem(), Problem(), scaler_of()
    in_style(problem, style, tmp_path, plugins=[own], max_epochs=4)

    def clip() -> None:
        if style in (clipped_phases, clipped_closures) and (style is clipped_closures or expected.opt.second_pass):
            scaler.unscale_(expected.opt)
            nn.utils.clip_grad_norm_(expected.params, 0.05)

    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        plain_loop(expected, at_the_end=clip, scaler=scaler, epochs=4)
    assert problem.opt.skipped_steps == expected.opt.skipped_steps > 0
    assert own.state_dict() == scaler.state_dict()
    assert_same(snapshot(problem), snapshot(expected))


def test_gradients_that_are_unscaled_before_perturb_are_refused_through_the_wrapper(tmp_path: Any) -> None:
    from sassha_fused.lightning import HalfPrecision

    def unscaled_too_soon(module: Any, problem: Problem, batch: int) -> None:
        opt = module.optimizers()
        module.manual_backward(loss_of(problem, batch))
        module.clip_gradients(opt, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        opt.perturb(scaler=module.trainer.precision_plugin.scaler)

    with pytest.raises(ValueError, match=r"perturb\(\) after scaler.unscale_\(\)"):
        in_style(Problem(), unscaled_too_soon, tmp_path, plugins=[HalfPrecision("cpu", scaler_of())])


# ---------------------------------------------------------------------------------------------------------------------
# Two optimizers


class Game:
    """Two networks, the second judging what the first makes, and an optimizer for each."""

    def __init__(self, kind: type[FusedOptimizer]) -> None:
        torch.manual_seed(0)
        self.maker, self.judge = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.noise, self.real = torch.randn(BATCHES, 8, 3), torch.randn(BATCHES, 8, 4)
        self.opts = [kind(net.parameters(), lr=0.01, hessian_interval=2) for net in (self.maker, self.judge)]

    def loss_of_maker(self, batch: int) -> Tensor:
        return nn.functional.softplus(-self.judge(self.maker(self.noise[batch]))).mean()

    def loss_of_judge(self, batch: int) -> Tensor:
        made = self.judge(self.maker(self.noise[batch]).detach())
        return (nn.functional.softplus(made) + nn.functional.softplus(-self.judge(self.real[batch]))).mean()

    def together(self, batch: int) -> Tensor:
        return self.loss_of_maker(batch) + self.loss_of_judge(batch)

    def snapshot(self) -> list[Any]:
        nets = [weights(net.parameters()) for net in (self.maker, self.judge)]
        return [*nets, *(opt.state_dict() for opt in self.opts)]

    def fit(self, training_step: Callable[..., None], tmp_path: Any) -> None:
        game = self

        class Module(import_lightning().LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.maker, self.judge = game.maker, game.judge
                self.automatic_optimization = False

            def configure_optimizers(self) -> Any:
                return game.opts

        Module.training_step = training_step
        fit(game, tmp_path, Module())  # type: ignore[arg-type]


def taken_in_turn(game: Game, opts: list[Any], batch: int, backward: Callable[[Tensor], Any]) -> None:
    for opt, loss in zip(opts, (game.loss_of_maker, game.loss_of_judge)):

        def closure() -> Tensor:
            value = loss(batch)
            opt.zero_grad()
            backward(value)
            return value

        opt.step(closure)
        for other in opts:
            other.zero_grad()


def taken_in_phases(game: Game, opts: list[Any], batch: int, backward: Callable[[Tensor], Any]) -> None:
    for opt, loss in zip(opts, (game.loss_of_maker, game.loss_of_judge)):
        for each in opts:
            each.zero_grad()
        backward(loss(batch))
        opt.perturb()
        with opt.hessian_pass():
            backward(loss(batch))
        opt.step()


def taken_at_once(game: Game, opts: list[Any], batch: int, backward: Callable[[Tensor], Any]) -> None:
    for opt in opts:
        opt.zero_grad()
    backward(game.together(batch))
    for opt in opts:
        opt.perturb()
    with opts[0].hessian_pass(), opts[1].hessian_pass():
        backward(game.together(batch))
    for opt in opts:
        opt.step()


@pytest.mark.parametrize("take", [taken_in_turn, taken_in_phases, taken_at_once])
def test_two_optimizers_are_the_plain_loop(take: Callable[..., None], tmp_path: Any) -> None:
    game, expected = Game(Sassha), Game(Sassha)
    game.fit(lambda self, batch, index: take(game, self.optimizers(), batch, self.manual_backward), tmp_path)
    for batch in [*range(BATCHES)] * 2:
        take(expected, expected.opts, batch, torch.Tensor.backward)
    assert_same(game.snapshot(), expected.snapshot())


def test_two_optimizers_one_of_which_is_toggled(tmp_path: Any) -> None:
    game, expected = Game(MSassha), Game(MSassha)

    def training_step(self: Any, batch: int, index: int) -> None:
        for opt, loss in zip(self.optimizers(), (game.loss_of_maker, game.loss_of_judge)):
            with opt.toggle_model():
                opt.step(partial(loss, batch))

    game.fit(training_step, tmp_path)
    for batch in [*range(BATCHES)] * 2:
        for opt, net, loss in zip(
            expected.opts, (expected.judge, expected.maker), (expected.loss_of_maker, expected.loss_of_judge)
        ):
            net.requires_grad_(False)
            opt.step(partial(loss, batch))
            net.requires_grad_(True)
    assert_same(game.snapshot(), expected.snapshot())
