"""Names of parameters, hooks around state and step, edits of opt.state, and groups that join after steps."""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from sassha_fused.parameter_state import ParameterState, States
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_same,
    parameter,
    undisturbed,
    weights,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
STATES = ["step", "hessian_step", "exp_avg", "exp_hessian"]


# ---------------------------------------------------------------------------------------------------------------------
# Names and hooks


def test_named_parameters_are_saved_with_their_names() -> None:
    problem = Problem()
    named = list(problem.model.named_parameters())
    opt = Sassha([{"params": named[:2]}, {"params": named[2:], "lr": 0.03, "weight_decay": 0.1}], lr=0.05)
    groups = opt.state_dict()["param_groups"]
    assert [group["param_names"] for group in groups] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    opt.step(problem.loss)
    other = Sassha(problem.model.parameters())
    with pytest.raises(ValueError, match="parameter groups"):
        other.load_state_dict(opt.state_dict())
    plain = Sassha([{"params": problem.params[:2]}, {"params": problem.params[2:]}])
    plain.load_state_dict(opt.state_dict())
    assert plain.state_dict()["param_groups"][1]["param_names"] == ["2.weight", "2.bias"]


def test_names_of_a_group_added_later_are_needed_where_there_are_names() -> None:
    named = list(Problem().model.named_parameters())
    opt = Sassha(named[:2])
    with pytest.raises(ValueError, match="names"):
        opt.add_param_group({"params": [named[2][1]]})
    opt.add_param_group({"params": named[2:]})
    assert opt.param_groups[1]["param_names"] == ["2.weight", "2.bias"]


def test_step_hooks_run_in_order_around_the_step_and_may_replace_its_arguments() -> None:
    problem = Problem()
    calls: list[str] = []
    problem.opt.register_step_pre_hook(lambda opt, args, kwargs: calls.append("first"))
    problem.opt.register_step_pre_hook(lambda opt, args, kwargs: calls.append("second"))
    problem.opt.register_step_post_hook(lambda opt, args, kwargs: calls.append("after"))

    def loss() -> Tensor:
        calls.append("closure")
        return problem.loss()

    problem.opt.step(loss)
    assert calls == ["first", "second", "closure", "closure", "after"]
    problem.opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 2 * problem.loss()), {}))
    expected = 2 * problem.loss().detach()
    assert_same(problem.opt.step(loss), expected)


def test_state_dict_hooks_run_in_order_and_may_replace_the_result() -> None:
    problem = Problem().train(1)
    calls: list[str] = []
    problem.opt.register_state_dict_pre_hook(lambda opt: calls.append("second"))
    problem.opt.register_state_dict_pre_hook(lambda opt: calls.append("first"), prepend=True)
    problem.opt.register_state_dict_post_hook(lambda opt, state: calls.append("after"))
    problem.opt.register_state_dict_post_hook(lambda opt, state: {**state, "note": "mine"})
    assert problem.opt.state_dict()["note"] == "mine"
    assert calls == ["first", "second", "after"]


def test_load_hooks_run_in_order_and_may_replace_the_state() -> None:
    problem = Problem().train(2)
    saved = copy.deepcopy(problem.opt.state_dict())
    calls: list[str] = []

    def replace(opt: Sassha, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("replace")
        assert set(state["state"][0]) == set(STATES)  # the user's hook sees the plain state
        changed = copy.deepcopy(state)
        for values in changed["state"].values():
            values["exp_avg"].fill_(0.25)
        return changed

    def edit(opt: Sassha, state: dict[str, Any]) -> None:
        calls.append("edit")
        state["state"][0]["exp_hessian"].fill_(0.5)

    problem.opt.register_load_state_dict_pre_hook(edit)
    problem.opt.register_load_state_dict_pre_hook(replace, prepend=True)
    problem.opt.register_load_state_dict_post_hook(lambda opt: calls.append("after"))
    problem.opt.load_state_dict(saved)
    assert calls == ["replace", "edit", "after"]
    loaded = problem.opt.state[problem.params[0]]
    assert (loaded["exp_avg"] == 0.25).all() and (loaded["exp_hessian"] == 0.5).all()
    problem.opt.load_state_dict(saved)
    assert calls == ["replace", "edit", "after"] * 2


def test_a_load_hook_that_raises_changes_nothing() -> None:
    problem = Problem().train(2)
    before = problem.snapshot()

    def refuse(opt: Sassha, state: dict[str, Any]) -> None:
        raise KeyError("no")

    handle = problem.opt.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(KeyError):
        problem.opt.load_state_dict(problem.opt.state_dict())
    handle.remove()
    assert not problem.opt._optimizer_load_state_dict_pre_hooks
    assert_same(problem.snapshot(), before)


# ---------------------------------------------------------------------------------------------------------------------
# opt.state in its owner's hands


@both_backends
@pytest.mark.parametrize("steps", [1, 3])
def test_replaced_entries_are_adopted_at_the_next_step(backend: str, steps: int) -> None:
    written, replaced = (Problem(backend).train(steps) for _ in range(2))
    for problem in (written, replaced):
        state = problem.opt.state[problem.params[2]]
        if problem is written:
            state["exp_avg"].mul_(2)
        else:
            state["exp_avg"] = state["exp_avg"] * 2
    assert_same(replaced.train(3).snapshot(), written.train(3).snapshot())
    state = replaced.opt.state_dict()["state"]
    assert len({state[i]["exp_avg"].untyped_storage().data_ptr() for i in (2, 3)}) == 1


@pytest.mark.parametrize("empty", [lambda state: state.clear(), lambda state: [state.pop(name) for name in STATES]])
def test_an_emptied_entry_starts_anew(empty: Callable[[dict[str, Any]], Any]) -> None:
    problem = Problem().train(2)
    empty(problem.opt.state[problem.params[1]])
    problem.step()
    counts = [[int(problem.opt.state[param][name]) for name in STATES[:2]] for param in problem.params]
    assert counts == [[3, 3], [1, 1], [3, 3], [3, 3]]


def test_half_an_entry_is_refused_and_names_what_is_missing() -> None:
    problem = Problem().train(2)
    before = weights(problem.params)
    average = problem.opt.state[problem.params[1]].pop("exp_hessian")
    with pytest.raises(ValueError, match="exp_hessian"):
        problem.step()
    assert_same(weights(problem.params), before)
    problem.opt.state[problem.params[1]]["exp_hessian"] = average
    assert_same(problem.train(2).snapshot()["weights"], undisturbed(Problem, "cpu", 4)["weights"])


def test_copies_of_the_state_are_plain_defaultdicts() -> None:
    problem = Problem().train(1)
    states = problem.opt.state
    for other in (copy.copy(states), copy.deepcopy(states), states.copy(), states | {}, {} | states):
        assert type(other) in (defaultdict, dict) and len(other) == len(problem.params)
    assert type(pickle.loads(pickle.dumps(states))) is defaultdict
    assert states[problem.params[0]] is copy.copy(states)[problem.params[0]]


def assigned_anew(problem: Problem) -> None:
    problem.opt.state = dict(problem.opt.state)
    problem.opt.state.clear()


def held(problem: Problem) -> None:
    states = problem.opt.state
    problem.opt.state |= {}
    problem.opt.state = problem.opt.state
    states.clear()


def taken_one_by_one(problem: Problem) -> None:
    while problem.opt.state:
        problem.opt.state.popitem()


@both_backends
@pytest.mark.parametrize("empty", [lambda problem: problem.opt.state.clear(), assigned_anew, held, taken_one_by_one])
def test_a_state_that_was_emptied_starts_anew(backend: str, empty: Callable[[Problem], None]) -> None:
    problem = Problem(backend).train(2)
    empty(problem)
    problem.step()
    assert [int(state["step"]) for state in problem.opt.state.values()] == [1] * len(problem.params)


@pytest.mark.parametrize("interrupted", [(ParameterState, "__init__"), (States, "lay_out")])
def test_an_interrupt_while_the_state_is_laid_out_loses_no_edit(
    interrupted: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, other = Problem().train(2), Problem().train(2)
    for one in (problem, other):
        state = one.opt.state[one.params[1]]
        state["exp_avg"] = torch.full_like(one.params[1], 100.0)
        state["hessian_step"] = torch.tensor(0)  # so that the next step is a Hessian step
    act = getattr(*interrupted)

    def interrupt(*arguments: Any) -> None:
        act(*arguments)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(*interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        problem.step()
    assert_same(problem.train(2).snapshot(), other.train(2).snapshot())


def test_a_group_that_was_replaced_counts() -> None:
    problem = Problem().train(2)
    problem.opt.param_groups[:] = [{**group, "lr": 0.0} for group in problem.opt.param_groups]
    before = weights(problem.params)
    problem.step()
    assert_same(weights(problem.params), before)


def test_copies_of_an_entry_are_plain_dicts() -> None:
    problem = Problem().train(1)
    state = problem.opt.state[problem.params[0]]
    assert isinstance(state, dict)
    assert type(copy.deepcopy(state)) is type(copy.copy(state)) is dict
    assert type(pickle.loads(pickle.dumps(state))) is dict
    assert {type(entry) for entry in problem.opt.state_dict()["state"].values()} == {dict}


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that join


@both_backends
@pytest.mark.parametrize("style", STYLES)
def test_a_silent_group_added_after_steps_leaves_the_others_on_their_course(backend: str, style: str) -> None:
    # Its gradients are zero, so that N is what it was; with S = 1 the signs it has taken part in drop out. All steps
    # are Hessian steps, since the first gradient of a group makes one of its step.
    problem, undisturbed = (Problem(backend, hessian_interval=1).train(2, style) for _ in range(2))
    late = parameter(1.0, 2.0)
    problem.opt.add_param_group({"params": [late]})
    assert_same(problem.snapshot()["state"], undisturbed.snapshot()["state"])
    STYLES[style](problem.opt, lambda: problem.loss() + 0 * late.sum())
    problem.steps += 1
    expected = undisturbed.train(1, style).snapshot()
    assert_same(weights(problem.params), expected["weights"])
    state = problem.snapshot()["state"]
    assert_same({key: state[key] for key in range(4)}, expected["state"])
    assert int(state[4]["hessian_step"]) == 1


@both_backends
@pytest.mark.parametrize("style", STYLES)
def test_a_group_that_joins_on_a_lazy_step_makes_it_a_hessian_step_of_all(backend: str, style: str) -> None:
    problem = Problem(backend).train(2, style)
    late = parameter(1.0, 2.0)
    problem.opt.add_param_group({"params": [late]})
    STYLES[style](problem.opt, lambda: problem.loss() + (late**3).sum())
    assert [int(state["hessian_step"]) for state in problem.opt.state.values()] == [3, 3, 3, 3, 1]
    group = problem.opt.state_dict()["param_groups"][0]
    assert (group["steps"], group["hessian_evaluations"]) == (3, 2)
    STYLES[style](problem.opt, problem.loss)  # T = 3: by the schedule, which does not start anew
    assert problem.opt.state_dict()["param_groups"][0]["hessian_evaluations"] == 3


@both_backends
@pytest.mark.parametrize("samples", [1, 3])
def test_a_group_added_last_does_not_move_the_signs_of_the_others(backend: str, samples: int) -> None:
    # All join in the first step; the diagonal Hessian of a separable loss shows no other parameter's signs.
    hessians = []
    for extra in ([], [parameter(1.0, 2.0)]):
        params = [parameter(1.0, -2.0, 3.0), parameter(0.5)]
        opt = Sassha(params, rho=0.0, hessian_samples=samples, backend=backend)
        for param in extra:
            opt.add_param_group({"params": [param]})

        def loss(first: Tensor = params[0], rest: tuple[Tensor, ...] = (params[1], *extra)) -> Tensor:
            return (first.sum() ** 4) + sum((param**4).sum() for param in rest)

        opt.step(loss)
        hessians.append([opt.state[param]["exp_hessian"].clone() for param in params])
    assert_same(*hessians)


@both_backends
def test_state_that_moves_when_a_parameter_joins_keeps_its_numbers(backend: str) -> None:
    params = [nn.Parameter(torch.full((n,), 1.0 + n)) for n in (3, 200, 5)]
    opt = Sassha(params, hessian_interval=100, backend=backend)
    opt.step(lambda: (params[0] ** 3).sum() + (params[2] ** 3).sum())
    before = [{name: value.clone() for name, value in opt.state[params[i]].items()} for i in (0, 2)]
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.perturb()  # the middle one joins, and the third one's part moves
    opt.restore()
    assert_same([opt.state[params[i]] for i in (0, 2)], before)
    assert opt.state[params[2]]["exp_avg"].storage_offset() == 128 + 256
