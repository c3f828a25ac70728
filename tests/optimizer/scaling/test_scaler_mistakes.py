"""Loops that a loss scale would go wrong in, silently: each is refused, says what to do, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler

from sassha_fused import Sassha
from tests.support.kinds import assert_clean
from tests.support.members import OfMember
from tests.support.problems import assert_same, single_threaded, weights
from tests.support.scaling import LOOPS, each_loop, passes, scaler_of, step, train, variant_of

one_thread = pytest.fixture(autouse=True)(single_threaded)
each_step = pytest.mark.parametrize("before", [0, 1, 3], ids=["first", "lazy", "Hessian"])
VARIANTS = ("Sassha", "MSassha", "SAMAdamW", "AdaHessian")
some_variants = pytest.mark.parametrize("variant", VARIANTS)
two_passes = pytest.mark.parametrize("variant", ["Sassha", "SAMAdamW"])


@contextmanager
def refused(problem: OfMember, match: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises; weights and counts are as before, nothing of a scaler is left, and training goes on."""
    before, steps, skipped = weights(problem.params), problem.steps, problem.opt.skipped_steps
    with pytest.raises(error, match=match):
        yield
    assert not {"grad_scale", "found_inf"} & set(vars(problem.opt))
    problem.opt.restore()
    assert not problem.opt.perturbed
    assert_same(weights(problem.params), before)
    assert (problem.steps, problem.opt.skipped_steps) == (steps, skipped)
    problem.opt.zero_grad()
    assert_clean(problem.params)


def assert_goes_on(problem: OfMember, scaler: GradScaler, variant: str, loop: str) -> None:
    """The next steps are those of a run that nothing has disturbed."""
    problem.opt.zero_grad()
    off = scaler_of(1.0)
    twin = train(train(variant_of(variant), off, "closure", problem.steps), off, loop, 3)
    train(problem, scaler, loop, 3)
    assert_same(problem.snapshot(), twin.snapshot())


def begun(variant: str, before: int) -> tuple[OfMember, GradScaler]:
    """A run of some steps by closures, and its scaler, which has been told of none of the next."""
    problem, scaler = variant_of(variant), scaler_of(2.0**20)
    train(problem, scaler, "closure", before)
    problem.opt.zero_grad()
    scaler.scale(torch.zeros(()))  # which makes the scale, as any use does
    return problem, scaler


# ---------------------------------------------------------------------------------------------------------------------
# unscale_()


@each_step
@two_passes
def test_unscale_before_perturb_is_refused_by_perturb_that_is_told(variant: str, before: int) -> None:
    problem, scaler = begun(variant, before)
    with refused(problem, r"perturb\(\) after scaler.unscale_\(\).*after its last backward"):
        scaler.scale(problem.loss()).backward()
        scaler.unscale_(problem.opt)
        problem.opt.perturb(scaler)
    scaler.update()
    assert_goes_on(problem, scaler, variant, "told, clipped")


@each_step
@pytest.mark.parametrize("restores", [False, True])
@pytest.mark.parametrize("early", [False, True], ids=["late", "before perturb"])
@two_passes
def test_unscale_without_telling_perturb_is_refused_by_the_step(
    variant: str, early: bool, restores: bool, before: int
) -> None:
    problem, scaler = begun(variant, before)
    with refused(problem, r"say it by opt.perturb\(scaler=scaler\)"):
        scaler.scale(problem.loss()).backward()
        if early:
            scaler.unscale_(problem.opt)
        problem.opt.perturb()
        with problem.opt.hessian_pass():
            scaler.scale(problem.loss()).backward()
        if not early:
            scaler.unscale_(problem.opt)
        if restores:
            problem.opt.restore()
        scaler.step(problem.opt)
    scaler.update()
    assert_goes_on(problem, scaler, variant, "told, clipped")


@pytest.mark.parametrize("variant, remedy", [("MSassha", "perturb"), ("AdaHessian", "hessian_pass")])
def test_unscale_on_a_hessian_step_of_one_pass_needs_the_scale_too(variant: str, remedy: str) -> None:
    problem, scaler = begun(variant, 3)
    with refused(problem, rf"say it by (with )?opt.{remedy}\(scaler=scaler\)"):
        passes(problem, scaler, problem.loss)
        scaler.unscale_(problem.opt)
        scaler.step(problem.opt)
    scaler.update()
    assert_goes_on(problem, scaler, variant, "told, clipped")


@pytest.mark.parametrize("variant", ["MSassha", "AdaHessian", "SAMAdamW along momentum"])
def test_on_a_lazy_step_of_one_pass_nothing_is_to_be_told(variant: str) -> None:
    runs = []
    for scale in (2.0**20, 1.0):
        problem, scaler = variant_of(variant), scaler_of(scale)
        train(problem, scaler, "told", 1)
        problem.opt.zero_grad()
        passes(problem, scaler, problem.loss)
        scaler.unscale_(problem.opt)
        scaler.step(problem.opt)
        runs.append(problem.snapshot())
    assert_same(*runs)


def test_a_scaler_that_perturb_is_told_of_must_be_the_one_that_has_unscaled() -> None:
    problem, scaler = begun("Sassha", 0)
    other = scaler_of(2.0**10)
    other.scale(torch.zeros(()))  # which makes the scale, as any use does
    with refused(problem, r"say it by opt.perturb\(scaler=scaler\)"):
        passes(problem, scaler, problem.loss, other)
        scaler.unscale_(problem.opt)
        scaler.step(problem.opt)


@each_step
@pytest.mark.parametrize("loop", ["closure", "standard"])
def test_unscale_before_a_closure_is_refused(loop: str, before: int) -> None:
    problem, scaler = begun("Sassha", before)
    with refused(problem, r"step\(closure\) after scaler.unscale_\(\)"):
        scaler.unscale_(problem.opt)
        LOOPS[loop](problem, scaler, problem.loss)
    scaler.update(2.0**20)
    assert_goes_on(problem, scaler, "Sassha", loop)


def test_unscale_in_a_micro_batch_that_is_not_the_last_is_refused() -> None:
    for before in (0, 1):
        problem, scaler = begun("Sassha", before)

        def closure(problem: OfMember = problem, scaler: GradScaler = scaler) -> Tensor:
            value = problem.loss()
            scaler.scale(value).backward()
            scaler.unscale_(problem.opt)
            return value

        for take in (
            lambda: problem.opt.accumulate(closure, scaler=scaler),
            lambda: problem.opt.step([closure] * 2, scaler=scaler),
        ):
            with refused(problem, r"unscale_\(\) in the closure of a micro-batch that is not the last"):
                take()
        assert_goes_on(problem, scaler, "Sassha", "standard, clipped")


# ---------------------------------------------------------------------------------------------------------------------
# update() and step()


@some_variants
@each_loop
def test_a_forgotten_update_is_refused(loop: str, variant: str) -> None:
    problem, scaler = begun(variant, 0)
    problem.opt.step(problem.loss, scaler=scaler)
    problem.steps += 1
    error, match = ValueError, r"scaler.update\(\) was not called after the step before"
    if loop == "phases":  # torch's own scaler says it, where the optimizer does not know of one
        error, match = RuntimeError, r"step\(\) has already been called since the last update\(\)"
    with refused(problem, match, error):
        problem.opt.zero_grad()
        LOOPS[loop](problem, scaler, problem.loss)
    scaler.update()
    assert_goes_on(problem, scaler, variant, loop)


@each_step
@some_variants
def test_step_instead_of_the_scalers_step_is_refused(variant: str, before: int) -> None:
    problem, scaler = begun(variant, before)
    for unscale in (False, True):
        with refused(problem, r"call scaler.step\(opt\)"):
            passes(problem, scaler, problem.loss, scaler)
            if unscale:
                scaler.unscale_(problem.opt)
            problem.opt.step()
        problem.opt.zero_grad()
    assert_goes_on(problem, scaler, variant, "told, clipped")


@each_step
@some_variants
def test_a_scaler_for_a_step_without_a_closure_is_refused(variant: str, before: int) -> None:
    problem, scaler = begun(variant, before)
    with refused(problem, r"step\(scaler=<.*GradScaler.*>\) needs a closure; without one call scaler.step\(opt\)"):
        passes(problem, scaler, problem.loss)
        problem.opt.step(scaler=scaler)
    assert_goes_on(problem, scaler, variant, "phases")


@each_step
@some_variants
def test_a_closure_for_the_scalers_step_is_refused(variant: str, before: int) -> None:
    problem, scaler = begun(variant, before)
    with refused(problem, r"call opt.step\(closure, scaler=scaler\)"):
        scaler.step(problem.opt, problem.loss)
    with refused(problem, "Closure use is not currently supported", RuntimeError):  # torch's own words
        scaler.step(problem.opt, closure=problem.loss)
    assert_goes_on(problem, scaler, variant, "closure")


# ---------------------------------------------------------------------------------------------------------------------
# closures


@each_step
@some_variants
def test_a_backward_in_the_closure_without_the_scale_is_refused(variant: str, before: int) -> None:
    problem, scaler = begun(variant, before)

    def closure() -> Tensor:
        value = problem.loss()
        value.backward()
        return value

    with refused(problem, r"a loss without the loss scale.*scaler.scale\(loss\).backward\(\)"):
        problem.opt.step(closure, scaler=scaler)
    assert all(param.grad is None for param in problem.params)
    assert_goes_on(problem, scaler, variant, "standard")


@pytest.mark.parametrize("variant", ["Sassha", "SAMAdamW"])
def test_also_in_the_second_pass_alone(variant: str) -> None:
    problem, scaler = begun(variant, 1)

    def closure() -> Tensor:
        value = problem.loss()
        (value if problem.opt.second_pass else scaler.scale(value)).backward()
        return value

    with refused(problem, "a loss without the loss scale"):
        problem.opt.step(closure, scaler=scaler)
    assert_goes_on(problem, scaler, variant, "standard, clipped")


@each_step
@some_variants
def test_a_closure_that_returns_a_scaled_loss_is_refused(variant: str, before: int) -> None:
    problem, scaler = begun(variant, before)
    with refused(problem, "closure must return the loss itself"):
        problem.opt.step(lambda: scaler.scale(problem.loss()), scaler=scaler)
    assert_goes_on(problem, scaler, variant, "closure")


@each_step
@pytest.mark.parametrize("clips", [False, True])
@two_passes
def test_an_exception_in_the_second_pass_leaves_the_scaler_ready(variant: str, clips: bool, before: int) -> None:
    problem, scaler = begun(variant, before)

    def closure() -> Tensor:
        if problem.opt.second_pass:
            raise KeyError("as a loader does")
        value = problem.loss()
        scaler.scale(value).backward()
        if clips:
            scaler.unscale_(problem.opt)
        return value

    with refused(problem, "as a loader does", KeyError):
        problem.opt.step(closure, scaler=scaler)
    assert "scale" not in vars(scaler)
    assert_goes_on(problem, scaler, variant, "standard, clipped")


def test_so_does_a_gradient_that_perturb_refuses() -> None:
    problem, scaler = begun("Sassha", 1)

    def closure() -> Tensor:
        value = problem.loss()
        scaler.scale(value).backward()
        scaler.unscale_(problem.opt)
        problem.params[0].grad = problem.params[0].grad.to_sparse()
        return value

    with refused(problem, "sparse"):
        problem.opt.step(closure, scaler=scaler)
    assert_goes_on(problem, scaler, "Sassha", "standard, clipped")


def test_so_does_one_behind_unscale_in_the_last_pass() -> None:
    for variant in VARIANTS:
        problem, scaler = begun(variant, 1)

        def closure(problem: OfMember = problem, scaler: GradScaler = scaler) -> Tensor:
            value = problem.loss()
            scaler.scale(value).backward()
            scaler.unscale_(problem.opt)
            raise KeyError("as a logger does")

        with refused(problem, "as a logger does", KeyError):
            problem.opt.step(closure, scaler=scaler)
        assert_goes_on(problem, scaler, variant, "standard, clipped")


@pytest.mark.parametrize("given", [torch.amp.GradScaler, 1024.0, "scaler"])
@pytest.mark.parametrize("call", ["step", "accumulate", "perturb", "hessian_pass"])
def test_what_is_no_grad_scaler_is_named(call: str, given: Any) -> None:
    problem, _ = begun("Sassha, rho 0" if call == "hessian_pass" else "Sassha", 0)
    with refused(problem, r"scaler must be a torch.amp.GradScaler, got .*(1024.0|scaler|GradScaler)", TypeError):
        if call == "perturb":
            problem.loss().backward()
            problem.opt.perturb(given)
        elif call == "hessian_pass":
            with problem.opt.hessian_pass(given):
                pass
        else:
            getattr(problem.opt, call)(problem.loss, scaler=given)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_accumulate_and_step_need_one_scaler(first: int, last: int) -> None:
    problem, scaler = begun("Sassha", 1)
    scalers = [scaler, scaler_of(2.0**10), None]
    problem.opt.accumulate(problem.loss, scaler=scalers[first])
    if first == last:
        problem.opt.step(problem.loss, scaler=scalers[last])
        return
    with refused(problem, r"scaler must be the same in accumulate\(\) and step\(\), got (<|None)"):
        problem.opt.step(problem.loss, scaler=scalers[last])
    assert_goes_on(problem, scaler, "Sassha", "closure")


def test_a_scaler_that_is_off_is_none_in_accumulate_too() -> None:
    problem = variant_of("Sassha")
    problem.opt.accumulate(problem.loss, scaler=scaler_of(1.0))
    problem.opt.step(problem.loss)
    plain = variant_of("Sassha")
    plain.opt.step([plain.loss] * 2)
    assert_same(problem.snapshot(), plain.snapshot())


# ---------------------------------------------------------------------------------------------------------------------
# errors that have nothing to do with the scale


@each_step
@some_variants
@pytest.mark.parametrize("unscale", [False, True])
def test_an_error_in_the_scalers_step_leaves_nothing_of_it(unscale: bool, variant: str, before: int) -> None:
    problem, scaler = begun(variant, before)
    rate = problem.opt.param_groups[0]["lr"]
    with refused(problem, "lr"):
        passes(problem, scaler, problem.loss, scaler)
        if unscale:
            scaler.unscale_(problem.opt)
        problem.opt.param_groups[0]["lr"] = -1.0
        scaler.step(problem.opt)
    problem.opt.param_groups[0]["lr"] = rate
    assert_goes_on(problem, scaler, variant, "told, clipped")


def test_a_step_that_is_given_up_takes_its_scale_along() -> None:
    problem, scaler = begun("Sassha", 0)
    scaler.scale(problem.loss()).backward()
    problem.opt.perturb(scaler)
    problem.opt.restore()  # without second gradients: the step is over
    problem.opt.zero_grad()
    plain = variant_of("Sassha")
    for each in (problem, plain):
        each.step("phases")
    assert_same(problem.snapshot(), plain.snapshot())


def test_a_step_without_any_gradient_is_none() -> None:
    problem, scaler = begun("Sassha, rho 0", 0)
    before = weights(problem.params)
    scaler.step(problem.opt)
    assert_same(weights(problem.params), before)
    assert not {"grad_scale", "found_inf"} & set(vars(problem.opt))
    scaler.update(2.0**20)
    opt = Sassha(problem.params, rho=0.0)
    opt.step(lambda: torch.zeros((), requires_grad=True) * 1, scaler=scaler)
    assert_same(weights(problem.params), before)
    step(problem, scaler, "closure")
    twin = step(variant_of("Sassha, rho 0"), scaler_of(1.0), "closure")
    assert_same(problem.snapshot(), twin.snapshot())
