"""State that its owner edits: adopted as if it had been so from the start, or refused where it cannot be."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.kinds import all_styles, refused
from tests.support.problems import Problem, assert_same, continued, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
each_step = pytest.mark.parametrize("steps", [1, 3], ids=["before a lazy step", "before a Hessian step"])


def loaded(problem: Problem, edit: Callable[[dict[int, Any]], None]) -> Problem:
    """Another run whose state was made so from the start."""
    state = copy.deepcopy(problem.opt.state_dict())
    edit(state["state"])
    return continued(problem, state)


def average_replaced(state: dict[str, Any]) -> None:
    state["exp_avg"] = torch.full_like(state["exp_avg"], 0.25)


def average_in_another_dtype(state: dict[str, Any]) -> None:
    state["exp_avg"] = state["exp_avg"].double() * 2


def curvature_replaced(state: dict[str, Any]) -> None:
    state["exp_hessian"] = state["exp_hessian"] + 1


def written_in_place(state: dict[str, Any]) -> None:
    state["exp_avg"].mul_(0.5)
    state["exp_hessian"].add_(0.5)


def data_swapped(state: dict[str, Any]) -> None:
    state["exp_avg"].data.zero_()


def counts_replaced(state: dict[str, Any]) -> None:
    state["step"], state["hessian_step"] = torch.tensor(7), 5


def counts_as_floats(state: dict[str, Any]) -> None:
    state["step"] = torch.tensor(3.0)


def updated(state: dict[str, Any]) -> None:
    state.update(exp_avg=torch.ones_like(state["exp_avg"]))


EDITS = [
    average_replaced,
    average_in_another_dtype,
    curvature_replaced,
    written_in_place,
    data_swapped,
    counts_replaced,
    counts_as_floats,
    updated,
]


@all_styles
@each_step
@pytest.mark.parametrize("which", [0, 3])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_what_is_put_into_a_state_is_adopted(edit: Any, which: int, steps: int, style: str) -> None:
    problem = Problem().train(steps)
    problem.opt.zero_grad()
    expected = loaded(problem, lambda states: edit(states[which]))
    edit(problem.opt.state[problem.params[which]])
    assert_same(problem.train(4, style).snapshot(), expected.train(4).snapshot())


@each_step
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_between_the_passes_it_counts_or_is_refused(edit: Any, steps: int) -> None:
    problem = Problem().train(steps)
    problem.opt.zero_grad()
    expected = loaded(problem, lambda states: edit(states[0]))
    before = weights(problem.params)
    problem.perturb()
    edit(problem.opt.state[problem.params[0]])
    problem.loss().backward(create_graph=problem.opt.hessian_due)
    if edit in (written_in_place, data_swapped):
        problem.opt.step()
        problem.steps += 1
    else:
        with pytest.raises(ValueError, match=r"opt.state was replaced between perturb\(\) and step\(\)"):
            problem.opt.step()
        assert_same(weights(problem.params), before)
        assert not problem.opt.perturbed
        problem.opt.zero_grad()  # the edit stays, and counts from here on
    assert_same(problem.train(2).snapshot(), expected.train(problem.steps - steps).snapshot())


def test_entries_of_other_people_may_come_between_the_passes() -> None:
    problem = Problem().train(1)
    problem.perturb()
    problem.opt.state[problem.params[0]]["note"] = "kept"
    problem.opt.state["a name"] = {}
    problem.loss().backward()
    problem.opt.step()
    problem.steps += 1
    assert_same(weights(problem.train(2).params), weights(Problem().train(4).params))
    assert problem.opt.state[problem.params[0]]["note"] == "kept"


def emptied(problem: Problem) -> None:
    problem.opt.state[problem.params[0]].clear()


def deleted(problem: Problem) -> None:
    del problem.opt.state[problem.params[0]]


def popped(problem: Problem) -> None:
    problem.opt.state.pop(problem.params[0])


def replaced_by_nothing(problem: Problem) -> None:
    problem.opt.state[problem.params[0]] = {}


@all_styles
@pytest.mark.parametrize("edit", [emptied, deleted, popped, replaced_by_nothing], ids=lambda edit: edit.__name__)
def test_a_parameter_without_state_starts_anew(edit: Any, style: str) -> None:
    problem = Problem().train(2)
    problem.opt.zero_grad()
    expected = loaded(problem, lambda states: states.pop(0))
    edit(problem)
    # The order in which entries stand is no matter.
    mine, theirs = problem.train(3, style), expected.train(3)
    assert_same(weights(mine.params), weights(theirs.params))
    for one, two in zip(mine.params, theirs.params):
        assert_same(dict(sorted(mine.opt.state[one].items())), dict(sorted(theirs.opt.state[two].items())))


def all_cleared(problem: Problem) -> None:
    problem.opt.state.clear()


def all_rebound(problem: Problem) -> None:
    problem.opt.state = defaultdict(dict)


@all_styles
@pytest.mark.parametrize("edit", [all_cleared, all_rebound], ids=lambda edit: edit.__name__)
def test_all_may_start_anew(edit: Any, style: str) -> None:
    problem = Problem().train(2)
    problem.opt.zero_grad()
    expected = loaded(problem, lambda states: states.clear())
    edit(problem)
    assert_same(problem.train(4, style).snapshot(), expected.train(4).snapshot())


def test_a_state_replaced_by_that_of_another_run_is_its() -> None:
    problem, other = Problem().train(2), Problem(lr=0.1).train(2)
    expected = loaded(problem, lambda states: states.update(copy.deepcopy(other.opt.state_dict()["state"])))
    for mine, theirs in zip(problem.params, other.params):
        problem.opt.state[mine] = dict(other.opt.state[theirs])
    assert_same(problem.train(4).snapshot(), expected.train(4).snapshot())
    # Nothing of the other run has been written.
    assert_same(other.snapshot(), Problem(lr=0.1).train(2).snapshot())


@all_styles
def test_what_others_put_there_is_kept(style: str) -> None:
    problem = Problem()
    problem.opt.state[problem.params[1]]["ema"] = mine = torch.ones(7)
    problem.train(2, style)
    problem.opt.state[problem.params[0]]["note"] = "kept"
    problem.opt.state["a name"] = {"anything": 1}
    problem.train(2, style)
    assert problem.opt.state[problem.params[1]]["ema"] is mine
    assert problem.opt.state[problem.params[0]]["note"] == "kept"
    assert problem.opt.state["a name"] == {"anything": 1}
    assert_same(weights(problem.params), weights(Problem().train(4).params))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


@all_styles
@pytest.mark.parametrize("name", ["step", "hessian_step", "exp_avg", "exp_hessian"])
def test_an_incomplete_entry_is_refused(name: str, style: str) -> None:
    problem = Problem().train(2)
    problem.opt.zero_grad()
    before = weights(problem.params)
    value = problem.opt.state[problem.params[2]].pop(name)
    with pytest.raises(ValueError, match=f"has no {name} any more: put it back, or empty the whole entry"):
        problem.step(style)
    assert_same(weights(problem.params), before)
    assert not problem.opt.perturbed
    problem.opt.zero_grad()
    problem.opt.state[problem.params[2]][name] = value
    assert_same(weights(problem.train(2, style).params), weights(Problem().train(4).params))


@all_styles
@pytest.mark.parametrize("name", ["exp_avg", "exp_hessian"])
@pytest.mark.parametrize("shape", [(3,), (2, 7, 1), ()], ids=str)
def test_a_state_of_another_shape_is_refused(name: str, shape: tuple[int, ...], style: str) -> None:
    problem = Problem().train(2)
    problem.opt.zero_grad()
    before, state = weights(problem.params), problem.opt.state[problem.params[2]]
    value = state[name]
    state[name] = torch.ones(shape)
    with pytest.raises(ValueError, match="shape"):
        problem.step(style)
    assert_same(weights(problem.params), before)
    assert not problem.opt.perturbed
    problem.opt.zero_grad()
    state[name] = value
    assert_same(weights(problem.train(2, style).params), weights(Problem().train(4).params))


def test_a_state_dict_lacking_an_entry_is_refused() -> None:
    problem = Problem().train(2)
    state = copy.deepcopy(problem.opt.state_dict())
    del state["state"][1]["exp_avg"]
    with refused(problem, "the state of parameter 1 has no exp_avg"):
        problem.opt.load_state_dict(state)
