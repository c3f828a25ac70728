"""A loss scale leaves no trace: a power of two that nothing overflows by gives, bit for bit, the steps without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from sassha_fused import Sassha, SophiaH
from tests.support.kinds import assert_close, by_reference
from tests.support.members import OfMember
from tests.support.problems import Problem, assert_differ, assert_same, backward, single_threaded, weights
from tests.support.scaling import (
    LOOPS,
    VARIANTS,
    each_loop,
    each_variant,
    pairs,
    passes,
    scaler_of,
    step,
    train,
    variant_of,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)


# 2^100 is beyond the scales of float16; what is multiplied by it is still finite in float32.
@pairs(power=[10, 100], loop=list(LOOPS), variant=list(VARIANTS))
def test_a_scaled_run_is_the_unscaled_one_bit_for_bit(power: int, loop: str, variant: str) -> None:
    scaled = train(variant_of(variant), scaler_of(2.0**power), loop, 5)
    unscaled = train(variant_of(variant), scaler_of(1.0), loop, 5)
    assert_differ(weights(scaled.params), weights(variant_of(variant).params))
    assert_same(scaled.snapshot(), unscaled.snapshot())


@each_loop
@pytest.mark.parametrize("variant", ["Sassha", "AdaHessian by blocks", "SAMAdamW along momentum"])
def test_on_eager_too(variant: str, loop: str) -> None:
    scaled, unscaled = (
        train(variant_of(variant, backend="eager"), scaler_of(scale), loop, 4) for scale in (2.0**40, 1.0)
    )
    assert_same(scaled.snapshot(), unscaled.snapshot())


# In float64 the 1e-12 that is added to N is seen: N of the first gradients has the scale, and it has not.
@pytest.mark.parametrize("variant", ["Sassha by blocks", "MSassha", "SAMSGD", "SAMAdamW", "AdaHessian", "SophiaH"])
@pytest.mark.parametrize("loop", ["closure", "standard, clipped", "phases", "told, clipped"])
def test_in_float64_to_what_is_added_to_the_norm(loop: str, variant: str) -> None:
    scaled, unscaled = (
        train(variant_of(variant, dtype=torch.float64), scaler_of(scale), loop, 4).snapshot()
        for scale in (2.0**20, 1.0)
    )
    for name in ("weights", "state"):
        torch.testing.assert_close(scaled[name], unscaled[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loop", [name for name in LOOPS if "clipped" not in name])
@pytest.mark.parametrize("scale", [2.0**20, 1000.0])
def test_a_scaled_run_is_that_of_the_reference(scale: float, loop: str) -> None:
    problem = OfMember("Sassha by blocks", dtype=torch.float64, hessian_block=1)
    train(problem, scaler_of(scale), loop, 7)
    # The scaler multiplies by 1 / scale as float32 has it.
    assert_close(problem, by_reference(Problem, 7), rtol=1e-8 if scale == 2.0**20 else 1e-5)


@each_loop
def test_a_scale_that_grows_in_the_run_leaves_no_trace(loop: str) -> None:
    problem, scaler = variant_of("Sassha"), scaler_of(2.0**10, growth_interval=2)
    train(problem, scaler, loop, 6)
    assert scaler.get_scale() == 2.0**13
    assert_same(problem.snapshot(), train(variant_of("Sassha"), scaler_of(1.0), loop, 6).snapshot())


# ---------------------------------------------------------------------------------------------------------------------
# dtypes


class Mixed:
    """Parameters of four dtypes, in as many buckets, and a loss in which all of them meet."""

    def __init__(self, kind: type[Any], **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        self.params = [nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype)) for dtype in dtypes]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.02}]
        self.opt = kind(groups, **{"lr": 0.01, "hessian_interval": 2, **options})

    def loss(self) -> Tensor:
        return sum(param.float().pow(4).mean() + param.float().sin().mean() for param in self.params).square()  # type: ignore[union-attr]


def _by_closure(opt: Any, loss: Callable[[], Tensor], scaler: GradScaler) -> None:
    opt.step(loss, scaler=scaler)


def _by_hand(opt: Any, loss: Callable[[], Tensor], scaler: GradScaler) -> None:
    opt.zero_grad()
    if "rho" in opt.defaults:
        scaler.scale(loss()).backward()
        opt.perturb()
    with opt.hessian_pass():
        scaler.scale(loss()).backward()
    scaler.step(opt)


# The scaler refuses to unscale gradients in float16 beforehand; step() divides them as it divides all others.
@pytest.mark.parametrize("take", [_by_closure, _by_hand], ids=["closure", "phases"])
@pytest.mark.parametrize("kind", [Sassha, SophiaH])
def test_parameters_of_every_dtype_take_the_unscaled_steps(kind: type[Any], take: Callable[..., None]) -> None:
    problems = [Mixed(kind), Mixed(kind)]
    for problem, scale in zip(problems, (2.0**6, 1.0), strict=True):
        scaler = scaler_of(scale)
        for _ in range(4):
            take(problem.opt, problem.loss, scaler)
            scaler.update()
        assert scaler.get_scale() == scale
        assert problem.opt.skipped_steps == 0
    assert_differ(weights(problems[0].params), weights(Mixed(kind).params))
    for scaled, unscaled in zip(*(problem.params for problem in problems), strict=True):
        # Scaled gradients do not underflow where others do, and N of float64 knows of what is added to it.
        tolerance = {"rtol": 2 * torch.finfo(scaled.dtype).eps, "atol": 1e-11}
        torch.testing.assert_close(scaled, unscaled, **tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# what else a step may do


@pytest.mark.parametrize("unscale", [None, "before", "after"])
@pytest.mark.parametrize("variant", ["Sassha", "Sassha by blocks", "SAMSGD", "MSassha", "MSassha by blocks"])
def test_restore_before_the_step_changes_nothing(variant: str, unscale: str | None) -> None:
    runs = []
    for scale, restores in ((2.0**30, True), (1.0, True)):
        problem, scaler = variant_of(variant), scaler_of(scale)
        for _ in range(5):
            problem.opt.zero_grad()
            passes(problem, scaler, problem.loss, scaler if unscale else None)
            if unscale == "before":
                scaler.unscale_(problem.opt)
            if restores:
                problem.opt.restore()
            assert not problem.opt.perturbed
            if unscale == "after":
                scaler.unscale_(problem.opt)
            scaler.step(problem.opt)
            scaler.update()
            problem.steps += 1
        runs.append(problem)
    assert_same(runs[0].snapshot(), runs[1].snapshot())


@pytest.mark.parametrize("by_hand", [False, True], ids=["hessian_pass", "create_graph"])
@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("variant", ["MSassha", "SAMAdamW along momentum"])
def test_along_the_momentum_perturb_is_told_the_scaler_whatever_rho_is(variant: str, rho: float, by_hand: bool) -> None:
    runs = [(variant_of(variant, rho=rho), scaler_of(scale)) for scale in (2.0**30, 1.0)]
    for problem, scaler in runs:
        for _ in range(5):
            problem.opt.zero_grad()
            problem.opt.perturb(scaler)
            if by_hand:
                backward(scaler.scale(problem.loss()), create_graph=problem.opt.hessian_due)
            else:
                with problem.opt.hessian_pass():
                    scaler.scale(problem.loss()).backward()
            scaler.unscale_(problem.opt)
            scaler.step(problem.opt)
            scaler.update()
            problem.steps += 1
    assert_same(runs[0][0].snapshot(), runs[1][0].snapshot())


@each_loop
def test_groups_whose_modes_differ_are_unscaled_each(loop: str) -> None:
    runs = []
    for scale in (2.0**30, 1.0):
        problem = variant_of("Sassha")
        problem.opt.param_groups[1]["eps"] = 0.01  # a bucket of its own
        runs.append(train(problem, scaler_of(scale), loop, 4).snapshot())
    assert_same(*runs)


@pytest.mark.parametrize("loop", ["closure", "standard, clipped", "phases", "told, clipped"])
def test_a_parameter_that_only_one_pass_reaches_is_left_alone(loop: str) -> None:
    runs = []
    for scale in (2.0**30, 1.0):
        problem, scaler = variant_of("Sassha"), scaler_of(scale)
        train(problem, scaler, loop, 1)
        before = weights(problem.params)

        def loss(problem: OfMember = problem) -> Tensor:
            extra = problem.params[3].sum() if not problem.opt.second_pass else 0
            return problem.params[0].square().sum() + extra

        step(problem, scaler, loop, loss)
        assert_same(weights(problem.params[1:]), before[1:])
        runs.append(problem.snapshot())
    assert_same(*runs)


@pytest.mark.parametrize("loops", [("closure", "closure"), ("phases", "told, clipped"), ("told", "standard")], ids=str)
def test_two_optimizers_share_one_scaler(loops: tuple[str, str]) -> None:
    scaler = scaler_of(2.0**20, growth_interval=3)
    both = [variant_of(variant) for variant in ("Sassha", "MSassha")]
    for _ in range(5):
        for problem, loop in zip(both, loops, strict=True):
            problem.opt.zero_grad()
            LOOPS[loop](problem, scaler, problem.loss)
            problem.steps += 1
        scaler.update()
    assert scaler.get_scale() == 2.0**21
    for problem, variant, loop in zip(both, ("Sassha", "MSassha"), loops, strict=True):
        assert_same(problem.snapshot(), train(variant_of(variant), scaler_of(1.0), loop, 5).snapshot())


def test_two_optimizers_of_one_loss_share_a_scaler_in_phase_style() -> None:
    runs = []
    for scale in (2.0**20, 1.0):
        problem, scaler = Problem(), scaler_of(scale)
        opts = [Sassha(problem.params[:2], lr=0.05, hessian_interval=2), Sassha(problem.params[2:], hessian_interval=3)]
        for problem.steps in range(4):
            problem.model.zero_grad()
            scaler.scale(problem.loss()).backward()
            for opt in opts:
                opt.perturb(scaler)
            with opts[0].hessian_pass(), opts[1].hessian_pass():
                scaler.scale(problem.loss()).backward()
            scaler.unscale_(opts[1])
            for opt in opts:
                scaler.step(opt)
            scaler.update()
        runs.append([weights(problem.params), [copy.deepcopy(opt.state_dict()) for opt in opts]])
    assert_same(*runs)


def test_a_step_within_the_closure_of_another_may_have_the_same_scaler() -> None:
    runs = []
    for scale in (2.0**20, 1.0):
        outer, inner, scaler = variant_of("Sassha"), variant_of("SAMSGD"), scaler_of(scale)

        def loss(outer: OfMember = outer, inner: OfMember = inner, scaler: GradScaler = scaler) -> Tensor:
            if not outer.opt.second_pass:
                inner.opt.step(inner.loss, scaler=scaler)
            value = outer.loss()
            scaler.scale(value).backward()
            return value

        for _ in range(3):
            outer.opt.step(loss, scaler=scaler)
            scaler.update()
        assert "scale" not in vars(scaler)
        runs.append([outer.snapshot(), inner.snapshot()])
    assert_same(*runs)


# ---------------------------------------------------------------------------------------------------------------------
# micro-batches


def _list_of(problem: OfMember, scaler: GradScaler, closures: list[Callable[[], Tensor]]) -> Tensor | None:
    return problem.opt.step(closures, scaler=scaler)


def _accumulated(problem: OfMember, scaler: GradScaler, closures: list[Callable[[], Tensor]]) -> Tensor | None:
    losses = [problem.opt.accumulate(closure, scaler=scaler) for closure in closures[:-1]]
    return torch.stack([*losses, problem.opt.step(closures[-1], scaler=scaler)]).sum()


@pairs(
    take=[_list_of, _accumulated],
    runs_backward=[False, True],
    variant=list(VARIANTS),
)
def test_scaled_micro_batches_are_the_unscaled_ones(
    take: Callable[..., Tensor], runs_backward: bool, variant: str
) -> None:
    runs = []
    for scale in (2.0**30, 1.0):
        problem, scaler = variant_of(variant), scaler_of(scale)

        def closure(i: int, problem: OfMember = problem, scaler: GradScaler = scaler) -> Tensor:
            rows = slice(4 * i, 4 * i + 4)
            out = problem.model(problem.inputs[problem.steps][rows]) - problem.targets[problem.steps][rows]
            value = out.square().mean()
            if runs_backward:
                scaler.scale(value).backward()
                if i == 2:  # the last one may unscale all of them, in each pass
                    scaler.unscale_(problem.opt)
                    nn.utils.clip_grad_norm_(problem.params, 0.1)
            return value

        losses = []
        for problem.steps in range(4):
            losses.append(take(problem, scaler, [lambda i=i: closure(i) for i in range(3)]))
            scaler.update()
        runs.append([losses, problem.snapshot()])
    assert_same(*runs)


# ---------------------------------------------------------------------------------------------------------------------
# saving


@pytest.mark.parametrize("loop", ["closure", "told, clipped", "phases"])
@pytest.mark.parametrize("variant", ["Sassha", "MSassha by blocks", "SAMAdamW", "SophiaH"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_run_resumed_with_its_scaler_is_the_uninterrupted_one(at: int, variant: str, loop: str) -> None:
    def begun() -> tuple[OfMember, GradScaler]:
        problem = variant_of(variant)
        problem.targets *= 8  # the first losses overflow: steps are skipped, and the scale changes on the way
        return problem, scaler_of(2.0**127, growth_interval=2)

    one, its_scaler = begun()
    train(one, its_scaler, loop, at)
    states = copy.deepcopy((one.model.state_dict(), one.opt.state_dict(), its_scaler.state_dict()))
    train(one, its_scaler, loop, 5)

    other, other_scaler = begun()
    for thing, state in zip((other.model, other.opt, other_scaler), states, strict=True):
        thing.load_state_dict(state)
    other.steps = at
    train(other, other_scaler, loop, 5)
    assert one.opt.skipped_steps
    assert other_scaler.state_dict() == its_scaler.state_dict()
    assert_same(other.snapshot(), one.snapshot())


@each_variant
@pytest.mark.parametrize("loop", ["closure", "standard", "phases", "told"])
def test_a_scaler_that_is_off_is_none_at_all(loop: str, variant: str) -> None:
    problem, plain = train(variant_of(variant), scaler_of(1.0), loop, 4), variant_of(variant)
    for _ in range(4):
        plain.step("phases" if loop == "told" else loop)
    assert_same(problem.snapshot(), plain.snapshot())
