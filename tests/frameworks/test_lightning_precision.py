"""Lightning's mixed precision takes the steps of a plain loop: 16-mixed with a loss scale, bf16-mixed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.lightning_runs import BATCHES, fit, module_of, plain_loop, snapshot
from tests.support.members import MEMBERS, OfMember
from tests.support.problems import Problem, assert_same, single_threaded, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
one_thread = pytest.fixture(autouse=True)(single_threaded)

CLIPS = {"unclipped": None, "norm": 0.05, "value": 0.02}
# The second overflows at first, in each of the passes.
SCALES = {"from the first step": 2.0**8, "after some overflows": 2.0**17}
each_count = pytest.mark.parametrize("count", [1, 3])


def scaler_of(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=20)


def half(scale: float = 2.0**8, count: int = 1, clip: str = "unclipped", **options: Any) -> dict[str, Any]:
    from sassha_fused.lightning import Accumulate, HalfPrecision

    options = {"plugins": [HalfPrecision("cpu", scaler_of(scale))], "callbacks": [Accumulate()], **options}
    if CLIPS[clip]:
        options |= {"gradient_clip_val": CLIPS[clip], "gradient_clip_algorithm": clip}
    return {"accumulate_grad_batches": count, **options}


def under(dtype: torch.dtype, loss: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype):
        return loss()


def plain_half(problem: Problem, scaler: torch.amp.GradScaler, clip: str = "unclipped", **options: Any) -> None:
    def at_the_end() -> None:
        if clip == "norm":
            scaler.unscale_(problem.opt)
            nn.utils.clip_grad_norm_(problem.params, CLIPS[clip])
        elif clip == "value":
            scaler.unscale_(problem.opt)
            nn.utils.clip_grad_value_(problem.params, CLIPS[clip])

    forward = partial(under, torch.float16)
    plain_loop(problem, forward=forward, at_the_end=at_the_end, scaler=scaler, **options)


@pytest.mark.parametrize("clip", CLIPS)
@each_count
@pytest.mark.parametrize("scale", SCALES)
def test_half_precision_is_the_plain_loop(scale: str, count: int, clip: str, tmp_path: Any) -> None:
    problem, expected, scaler = Problem(), Problem(), scaler_of(SCALES[scale])
    trainer = fit(problem, tmp_path, max_epochs=4, **half(SCALES[scale], count, clip))
    plain_half(expected, scaler, clip, count=count, epochs=4)
    assert (problem.opt.skipped_steps > 0) == (scale == "after some overflows")
    assert problem.opt.skipped_steps == expected.opt.skipped_steps
    assert trainer.precision_plugin.state_dict() == scaler.state_dict()
    assert_same(snapshot(problem), snapshot(expected))


@each_count
@pytest.mark.parametrize("member", MEMBERS)
def test_half_precision_for_every_member(member: str, count: int, tmp_path: Any) -> None:
    problem, expected = OfMember(member), OfMember(member)
    fit(problem, tmp_path, **half(2.0**17, count, "norm"))
    plain_half(expected, scaler_of(2.0**17), "norm", count=count)
    assert problem.opt.skipped_steps == expected.opt.skipped_steps
    assert_same(snapshot(problem), snapshot(expected))


@each_count
def test_bfloat16_is_the_plain_loop(count: int, tmp_path: Any) -> None:
    from sassha_fused.lightning import Accumulate

    problem, expected = Problem(), Problem()
    fit(problem, tmp_path, precision="bf16-mixed", accumulate_grad_batches=count, callbacks=[Accumulate()])
    plain_loop(expected, count, forward=partial(under, torch.bfloat16))
    assert_same(snapshot(problem), snapshot(expected))


def test_hooks_before_the_step_see_gradients_without_the_scale(tmp_path: Any) -> None:
    def norms(scale: float) -> list[Tensor]:
        problem, seen = Problem(), []

        def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
            seen.append(torch.stack([param.grad.detach().norm() for param in problem.params]))

        module = module_of(problem, on_before_optimizer_step=on_before_optimizer_step)
        fit(problem, tmp_path, module, max_epochs=1, **half(scale))
        return seen

    small, large = norms(2.0**4), norms(2.0**6)
    assert len(small) == 2 * BATCHES
    torch.testing.assert_close(small, large, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("member", ["Sassha", "AdaHessian", "MSassha", "SAMSGD"])
def test_lightnings_own_plugin_is_refused_where_it_would_take_a_gradient_for_another(
    member: str, tmp_path: Any
) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    problem = Problem() if member == "Sassha" else OfMember(member)
    before = weights(problem.params)
    with pytest.raises(ValueError, match=r"closure|hessian_pass"):
        fit(problem, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler_of(256.0))])
    assert_same(weights(problem.params), before)
