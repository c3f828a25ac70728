"""Groups that somebody edits between steps or between the passes: checked before weights move, at every call."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.kinds import all_styles, assert_goes_on, refused
from tests.support.problems import ALL_STYLES, Problem, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)

NAN, INF = float("nan"), float("inf")
NUMBERS = ["lr", "eps", "weight_decay", "rho", "hessian_power"]
INTEGERS = ["hessian_interval", "hessian_warmup", "hessian_samples", "seed"]
BAD: list[tuple[str, Any]] = [
    *((name, value) for name in NUMBERS for value in (NAN, INF, -INF, -0.1, "0.1", None, True, 1j, [0.1])),
    ("hessian_power", 0.0),
    ("hessian_power", 1.5),
    ("lr", torch.tensor(NAN)),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor(1)),
    *(("betas", value) for value in ((NAN, 0.9), (0.9, INF), (-0.1, 0.9), (0.9, 1.0), (0.9,), 0.9, "ab", None)),
    *((name, value) for name in INTEGERS for value in (2.5, 2.0, NAN, -1, "2", None, True, 2**64)),
    ("hessian_interval", 0),
    ("hessian_samples", 0),
    ("bias_correction", "steps"),
    ("bias_correction", None),
    *((name, value) for name in ("adaptive", "maximize") for value in (1, 0.0, "yes", None)),
]


def id_of(edit: tuple[str, Any]) -> str:
    return f"{edit[0]}-{edit[1]!r}"


each_bad_value = pytest.mark.parametrize("name, value", BAD, ids=map(id_of, BAD))


class Edited:
    """Values put into groups, and taken out again."""

    def __init__(self, problem: Problem) -> None:
        self.groups = problem.opt.param_groups
        self.kept = [dict(group) for group in self.groups]

    def put(self, name: str, value: Any, group: int | None = None) -> None:
        for i, each in enumerate(self.groups):
            if group is None or group == i:
                each[name] = value

    def back(self) -> None:
        for group, kept in zip(self.groups, self.kept):
            group.update(kept)


@each_bad_value
def test_a_bad_value_is_named_at_every_call(name: str, value: Any) -> None:
    problem = Problem().train(1)
    problem.opt.zero_grad()
    edited = Edited(problem)
    for style in ("closure", "phase"):
        with pytest.raises((TypeError, ValueError), match=f"^{name}"):
            before = problem.snapshot()
            edited.put(name, value, group=None if name in INTEGERS else 1)
            ALL_STYLES[style](problem.opt, problem.loss)
        assert not problem.opt.perturbed
        edited.back()
        assert_same(problem.snapshot(), before)
        problem.opt.zero_grad()
    assert_goes_on(problem, 2)


# What equals the number that stands there is no edit.
ACCEPTED = Problem().opt.param_groups[0]
NO_EDITS = [edit for edit in BAD if isinstance(edit[1], (int, float)) and edit[1] == ACCEPTED[edit[0]]]
EDITS = [edit for edit in BAD if id_of(edit) not in map(id_of, NO_EDITS)]


@pytest.mark.parametrize("name, value", EDITS, ids=map(id_of, EDITS))
def test_between_the_passes_too(name: str, value: Any) -> None:
    problem = Problem().train(1)
    edited = Edited(problem)
    before = problem.snapshot()
    problem.perturb()
    problem.loss().backward()
    edited.put(name, value, group=None if name in INTEGERS else 0)
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        problem.opt.step()
    assert not problem.opt.perturbed
    edited.back()
    assert_same(problem.snapshot(), before)
    assert_goes_on(problem, 2)


@pytest.mark.parametrize("name, value", NO_EDITS, ids=map(id_of, NO_EDITS))
def test_a_number_that_equals_the_one_that_stands_there_is_no_edit(name: str, value: Any) -> None:
    one, other = Problem().train(1), Problem().train(1)
    for problem in (one, other):
        problem.perturb()
        problem.loss().backward()
    Edited(one).put(name, value, group=None if name in INTEGERS else 0)
    for problem in (one, other):
        problem.opt.step()
    assert_same(weights(one.params), weights(other.params))


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_has_several_elements_is_refused_by_name(kind: Any, name: str) -> None:
    problem = Problem().train(1)
    Edited(problem).put(name, kind([0.1, 0.2]), group=0)
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        problem.step("closure")


@each_bad_value
def test_a_bad_value_in_a_state_dict_is_refused_before_anything_changes(name: str, value: Any) -> None:
    problem = Problem().train(1)
    state = copy.deepcopy(problem.opt.state_dict())
    for group in state["param_groups"]:
        group[name] = value
    with refused(problem, f"^{name}", (TypeError, ValueError)):
        problem.opt.load_state_dict(state)
    assert_goes_on(problem, 2)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("how", ["edited", "between the passes", "loaded", "added"])
def test_what_all_groups_share_cannot_differ(how: str, name: str) -> None:
    problem = Problem().train(1)
    edited = Edited(problem)
    with pytest.raises(ValueError, match=f"^{name} must be the same in all groups"):
        before = problem.snapshot()
        if how == "loaded":
            state = copy.deepcopy(before)
            state.pop("weights")
            state["param_groups"][1][name] = 7
            problem.opt.load_state_dict(state)
        elif how == "added":
            problem.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], name: 7})
        else:
            if how == "between the passes":
                problem.perturb()
                problem.loss().backward()
            edited.put(name, 7, group=1)
            problem.opt.step(problem.loss) if how == "edited" else problem.opt.step()
    edited.back()
    assert_same(problem.snapshot(), before)
    assert_goes_on(problem, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Edits that are right


GOOD: list[tuple[str, Any]] = [
    ("lr", 0.02),
    ("eps", 0.01),
    ("weight_decay", 0.3),
    ("rho", 0.05),
    ("hessian_power", 1),
    ("betas", [0.8, 0.95]),
    ("hessian_interval", 2),
    ("hessian_warmup", 4),
    ("hessian_samples", 2),
    ("seed", 3),
    ("adaptive", True),
    ("maximize", True),
]


@all_styles
@pytest.mark.parametrize("name, value", GOOD, ids=[name for name, _ in GOOD])
def test_an_edit_counts_from_the_next_step_on_in_every_style(name: str, value: Any, style: str) -> None:
    def edit(problem: Problem) -> Problem:
        for group in problem.opt.param_groups:
            group[name] = value
        return problem

    problem = edit(Problem().train(2, style)).train(4, style)
    other = Problem(backend="eager").train(2)
    loaded = Problem(**{name: value}, backend="cpu")
    state = copy.deepcopy(other.opt.state_dict())
    for group, _own in zip(state["param_groups"], loaded.opt.param_groups):
        group[name] = value
    loaded.model.load_state_dict(other.model.state_dict())
    loaded.opt.load_state_dict(state)
    loaded.steps = 2
    torch.testing.assert_close(problem.params, loaded.train(4).params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3], ids=["lazy", "Hessian"])
def test_a_learning_rate_set_between_the_passes_is_that_of_the_step(steps: int) -> None:
    problem, other = Problem().train(steps), Problem().train(steps)
    problem.perturb()
    problem.loss().backward(create_graph=problem.opt.hessian_due)
    for group, own in zip(problem.opt.param_groups, other.opt.param_groups):
        group["lr"] = own["lr"] = 0.01
    problem.opt.step()
    problem.steps += 1
    other.step()
    assert_same(problem.snapshot(), other.snapshot())


@pytest.mark.parametrize("name, value", [("hessian_interval", 2), ("hessian_warmup", 9), ("rho", 0.0)])
def test_a_schedule_set_between_the_passes_is_that_of_the_next_step(name: str, value: Any) -> None:
    problem, other = Problem().train(1), Problem().train(1)
    problem.perturb()
    assert not problem.opt.hessian_due
    for group in problem.opt.param_groups:
        group[name] = value
    assert not problem.opt.hessian_due
    problem.loss().backward()
    problem.opt.step()
    problem.steps += 1
    other.step()
    for group in other.opt.param_groups:
        group[name] = value
    assert_same(problem.snapshot(), other.snapshot())
