"""Along the momentum its norm comes from the step before; where that may be another by now, it is measured."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused.bucket import Bucket
from tests.support.backends import each_backend
from tests.support.members import OfMember, each_along_momentum
from tests.support.problems import assert_same, weights

STEPS = 8


@contextmanager
def always_measured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "knows_norm_of", lambda self, rows: False)
        yield


@contextmanager
def measurements() -> Iterator[list[str]]:
    """A list of what was found each time that a norm was asked for: known, or to be measured."""
    found: list[str] = []
    original = Bucket.knows_norm_of

    def knows(self: Bucket, rows: Any) -> bool:
        known = original(self, rows)
        found.append("known" if known else "measured")
        return known

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "knows_norm_of", knows)
        yield found


def average(problem: OfMember, i: int = 1) -> Tensor:
    name = problem.opt._run.flat.method.averages[0]
    found: Tensor = problem.opt.state[problem.params[i]][name]
    return found


def nothing(problem: OfMember) -> None:
    pass


def written(problem: OfMember) -> None:
    average(problem).mul_(3)


def written_unseen(problem: OfMember) -> None:
    average(problem).data.mul_(3)


def written_through_numpy(problem: OfMember) -> None:
    average(problem).numpy()[...] *= 3


def written_in_a_state_dict(problem: OfMember) -> None:
    state = problem.opt.state_dict()["state"][1]
    state[problem.opt._run.flat.method.averages[0]].data.mul_(3)


def written_in_an_old_state_dict(problem: OfMember) -> None:
    if not hasattr(problem, "kept"):
        state = problem.opt.state_dict()["state"][1]
        problem.kept = state[problem.opt._run.flat.method.averages[0]]  # type: ignore[attr-defined]
    for _ in range(2):
        problem.step()
    problem.kept.mul_(3)  # type: ignore[attr-defined]


def loaded(problem: OfMember) -> None:
    state = copy.deepcopy(problem.opt.state_dict())
    for entry in state["state"].values():
        entry[problem.opt._run.flat.method.averages[0]].mul_(3)
    problem.opt.load_state_dict(state)


def removed(problem: OfMember) -> None:
    del problem.opt.state[problem.params[2]]


def frozen(problem: OfMember) -> None:
    problem.params[0].requires_grad_(not problem.params[0].requires_grad)


def added(problem: OfMember) -> None:
    problem.params.append(torch.nn.Parameter(torch.ones(3)))
    problem.opt.add_param_group({"params": problem.params[-1:]})


def scaled_by_weights(problem: OfMember) -> None:
    for group in problem.opt.param_groups:
        group["adaptive"] = not group["adaptive"] and group.get("exact_restore", True)


def scaled_by_weights_and_given_up(problem: OfMember) -> None:
    scaled_by_weights(problem)
    given_up(problem)
    for group in problem.opt.param_groups:
        group["adaptive"] = False


def of_two_settings(problem: OfMember) -> None:
    name = "dampening" if "dampening" in problem.opt.defaults else "eps"
    problem.opt.param_groups[1][name] = 0.02


def not_perturbed(problem: OfMember) -> None:
    for group in problem.opt.param_groups:
        group["rho"] = 0.0 if group["rho"] else 0.05


def skipped(problem: OfMember) -> None:
    problem.opt.step(lambda: problem.loss() * torch.inf)


def given_up(problem: OfMember) -> None:
    problem.opt.zero_grad()
    problem.opt.perturb()
    problem.opt.restore()


def without_a_gradient(problem: OfMember) -> None:
    def closure() -> Tensor:
        problem.opt.zero_grad()
        loss = problem.loss()
        loss.backward()
        problem.params[3].grad = None
        return loss

    problem.opt.step(closure)


Act = Callable[[OfMember], None]
ACTS: tuple[Act, ...] = (
    nothing, written, written_unseen, written_through_numpy, written_in_a_state_dict, written_in_an_old_state_dict,
    loaded, removed, frozen, added, scaled_by_weights, scaled_by_weights_and_given_up, of_two_settings, not_perturbed,
    skipped, given_up, without_a_gradient,
)  # fmt: skip


def trained(member: str, act: Act, backend: str, **options: Any) -> OfMember:
    """Between any two steps something happens, or by every second one has happened."""
    problem = OfMember(member, backend, **options)
    for _ in range(STEPS):
        problem.step()
        act(problem)
        problem.step()
    return problem


@each_along_momentum
@pytest.mark.parametrize("act", ACTS)
def test_a_step_is_the_one_whose_norm_is_measured(member: str, act: Act) -> None:
    with always_measured():
        expected = trained(member, act, "cpu")
    found = trained(member, act, "cpu")
    assert_same(weights(found.params), weights(expected.params))
    assert found.opt.skipped_steps == expected.opt.skipped_steps == (STEPS if act is skipped else 0)


@each_along_momentum
def test_where_nothing_happens_it_is_measured_after_products_alone(member: str) -> None:
    problem = OfMember(member)
    with measurements() as found:
        for _ in range(7):
            problem.step()
    # Every third step of MSassha has products, but by blocks they are averaged before the update.
    assert found[0] == "measured"
    assert found.count("measured") == (3 if member == "MSassha" else 1)


def test_who_has_had_the_state_has_it_measured_from_then_on() -> None:
    with always_measured():
        expected = OfMember("SAMSGD along momentum")
        for step in range(10):
            expected.step()
            if step >= 4:
                average(expected).data.mul_(3)
    problem = OfMember("SAMSGD along momentum")
    for step in range(10):
        problem.step()
        if step == 3:
            kept = [average(problem)]
        if step >= 4:
            kept[0].data.mul_(3)
    assert_same(weights(problem.params), weights(expected.params))


@pytest.mark.parametrize("laid_out_by", ["the first step", "a new group", "another momentum"])
def test_who_has_had_the_state_before_it_was_laid_out_has_it_measured_too(laid_out_by: str) -> None:
    def run() -> OfMember:
        problem = OfMember("SAMSGD along momentum")
        kept = problem.opt.state if laid_out_by == "the first step" else {}
        for step in range(8):
            problem.step()
            if step == 1 and laid_out_by != "the first step":
                kept = problem.opt.state
                if laid_out_by == "a new group":
                    added(problem)
                else:
                    problem.opt.param_groups[1]["momentum"] = 0.8
            if step > 3:
                kept[problem.params[1]]["momentum_buffer"].data.mul_(3)
        return problem

    with always_measured():
        expected = run()
    assert_same(weights(run().params), weights(expected.params))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda opt: opt.state_dict()])
def test_after_a_copy_the_norm_is_measured_once(copied: Callable[[Any], Any]) -> None:
    problem = OfMember("SAMSGD along momentum")
    for _ in range(2):
        problem.step()
    copied(problem.opt)
    with measurements() as found:
        for _ in range(3):
            problem.step()
    assert found[0] == "measured" and found.count("measured") == 1


def test_state_that_was_loaded_in_inference_mode_is_measured() -> None:
    problem, expected = OfMember("SAMSGD along momentum"), OfMember("SAMSGD along momentum")
    for step in range(5):
        problem.step()
        expected.step()
        if step == 2:
            state = problem.opt.state_dict()
            with torch.inference_mode():
                problem.opt.load_state_dict(state)
    assert_same(weights(problem.params), weights(expected.params))


@each_backend
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_a_copy_of_the_state_goes_on_by_the_same_bits(backend: str, how: str) -> None:
    # In float64 the order in which squares are summed would show.
    problem = OfMember("MSassha by blocks", backend, torch.float64)
    for _ in range(2):
        problem.step()
    other = OfMember("MSassha by blocks", backend, torch.float64)
    other.steps = problem.steps
    with torch.no_grad():
        for param, value in zip(other.params, problem.params, strict=True):
            param.copy_(value)
    state = problem.opt.state_dict() if how == "state_dict" else copy.deepcopy(problem.opt).state_dict()
    other.opt.load_state_dict(state)
    for _ in range(3):
        problem.step()
        other.step()
        assert_same(weights(problem.params), weights(other.params))
