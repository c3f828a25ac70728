"""load_state_dict: what it takes, converts and refuses, and that a run goes on bit for bit from what it has loaded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.problems import (
    BACKENDS,
    Problem,
    assert_same,
    continued,
    undisturbed,
    weights,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
STATES = ["step", "hessian_step", "exp_avg", "exp_hessian"]


@pytest.mark.parametrize("source, target", [("cpu", "eager"), ("eager", "cpu")])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_state_moves_between_backends_bit_for_bit(source: str, target: str, steps: int) -> None:
    problem = Problem(source, hessian_samples=2).train(steps)
    other = continued(problem, problem.opt.state_dict(), backend=target, hessian_samples=2)
    assert_same(other.snapshot()["state"], problem.snapshot()["state"])
    same = continued(problem, problem.opt.state_dict(), backend=source, hessian_samples=2)
    assert_same(other.train(4).snapshot()["weights"], same.train(4).snapshot()["weights"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_keeps_float32_state_for_16_bit_parameters(dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype, lr=0.001).train(3)
    other = continued(problem, problem.opt.state_dict(), dtype=dtype, lr=0.001)
    assert other.opt.state[other.params[0]]["exp_avg"].dtype == torch.float32
    assert_same(other.opt.state_dict()["state"], problem.opt.state_dict()["state"])


def test_state_of_another_dtype_is_converted_to_the_parameters() -> None:
    problem = Problem().train(3)
    other = Problem(dtype=torch.float64)
    other.opt.load_state_dict(problem.opt.state_dict())
    for param, source in zip(other.params, problem.params):
        assert_same(other.opt.state[param]["exp_avg"], problem.opt.state[source]["exp_avg"].double())


@pytest.mark.parametrize("converted", [torch.float64, torch.bfloat16])
def test_averages_may_come_in_other_dtypes_and_strides(converted: torch.dtype) -> None:
    problem = Problem().train(4)
    state = copy.deepcopy(problem.opt.state_dict())
    for values in state["state"].values():
        for name in ("exp_avg", "exp_hessian"):
            wide = values[name].to(converted)
            values[name] = wide.t().contiguous().t() if wide.dim() == 2 else wide
    loaded = continued(problem, state).opt.state_dict()["state"]
    assert_same(loaded[0]["exp_avg"], state["state"][0]["exp_avg"].float().contiguous())
    assert loaded[0]["exp_avg"].is_contiguous()


def test_a_state_dict_without_our_own_group_entries_loads_with_defaults() -> None:
    problem = Problem(hessian_interval=10).train(2)
    state = copy.deepcopy(problem.opt.state_dict())
    state["param_groups"] = [{key: group[key] for key in ("lr", "params")} for group in state["param_groups"]]
    other = continued(problem, state, hessian_interval=10, hessian_power=1.0)
    group = other.opt.param_groups[0]
    assert (group["lr"], group["hessian_power"], group["hessian_interval"]) == (0.05, 1.0, 10)
    assert other.opt.skipped_steps == 0
    other.train(2)
    assert int(other.opt.state[other.params[0]]["step"]) == 4


def test_a_state_dict_from_before_steps_were_counted_loads_the_largest_step_of_a_parameter() -> None:
    problem = Problem().train(4)
    state = copy.deepcopy(problem.opt.state_dict())
    for group in state["param_groups"]:
        del group["steps"]
    state["state"][2]["step"] -= 1
    other = continued(problem, state)
    assert [group["steps"] for group in other.opt.param_groups] == [4, 4]
    state["state"][2]["step"] += 1
    after, expected = continued(problem, state).train(3).snapshot(), undisturbed(Problem, "cpu", 7)
    assert_same([after["weights"], after["state"]], [expected["weights"], expected["state"]])


def test_entries_of_the_user_in_state_and_groups_are_kept() -> None:
    problem = Problem().train(2)
    problem.opt.param_groups[0]["note"] = "mine"
    problem.opt.state[problem.params[0]]["age"] = 7
    problem.step()
    state = copy.deepcopy(problem.opt.state_dict())
    other = continued(problem, state)
    for opt, param in ((problem.opt, problem.params[0]), (other.opt, other.params[0])):
        assert opt.param_groups[0]["note"] == "mine"
        assert opt.state[param]["age"] == 7
    assert_same(other.train(3).snapshot()["weights"], undisturbed(Problem, "cpu", 6)["weights"])


def foreign(problem: Problem) -> dict[str, Any]:
    """The state of an Adam that stepped the same network."""
    model = copy.deepcopy(problem.model)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    adam = torch.optim.Adam(groups)
    model(problem.inputs[0]).sum().backward()
    adam.step()
    return adam.state_dict()


def other_shapes(problem: Problem) -> dict[str, Any]:
    state = copy.deepcopy(problem.opt.state_dict())
    state["state"][3]["exp_avg"] = torch.zeros(9)
    return state


def broadcast_shapes(problem: Problem) -> dict[str, Any]:
    state = copy.deepcopy(problem.opt.state_dict())
    state["state"][1]["exp_hessian"] = torch.zeros(1)
    return state


def fewer_groups(problem: Problem) -> dict[str, Any]:
    state = copy.deepcopy(problem.opt.state_dict())
    del state["param_groups"][1]
    return state


def other_sizes(problem: Problem) -> dict[str, Any]:
    state = copy.deepcopy(problem.opt.state_dict())
    state["param_groups"][1]["params"].append(4)
    return state


def half_a_state(problem: Problem) -> dict[str, Any]:
    state = copy.deepcopy(problem.opt.state_dict())
    del state["state"][2]["exp_hessian"]
    return state


@pytest.mark.parametrize(
    "wrong, message",
    [
        (foreign, "Sassha"),
        (half_a_state, "exp_hessian"),
        (fewer_groups, "parameter groups"),
        (other_sizes, "size of optimizer's group"),
        (other_shapes, "shape"),
        (broadcast_shapes, "shape"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(
    wrong: Callable[[Problem], dict[str, Any]], message: str
) -> None:
    problem = Problem().train(2)
    before = problem.snapshot()
    with pytest.raises(ValueError, match=message):
        problem.opt.load_state_dict(wrong(problem))
    assert_same(problem.snapshot(), before)
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, "cpu", 6))


@both_backends
@pytest.mark.parametrize("second_pass", [False, True])
def test_loading_into_a_perturbed_optimizer_restores_its_weights_first(backend: str, second_pass: bool) -> None:
    problem = Problem(backend).train(1)
    saved = copy.deepcopy(problem.opt.state_dict())
    problem.perturb()
    if second_pass:
        problem.loss().backward()
    problem.opt.load_state_dict(saved)
    assert not problem.opt.perturbed
    assert_same(weights(problem.params), undisturbed(Problem, backend, 1)["weights"])
    problem.opt.zero_grad()
    assert_same(problem.train(3).snapshot()["weights"], undisturbed(Problem, backend, 4)["weights"])


def test_loading_twice_and_going_back_in_time_works() -> None:
    problem = Problem().train(1)
    early = copy.deepcopy((problem.opt.state_dict(), problem.model.state_dict()))
    problem.train(4)
    for _ in range(2):
        problem.opt.load_state_dict(early[0])
        problem.model.load_state_dict(early[1])
        problem.steps = 1
        assert_same(problem.train(3).snapshot()["weights"], undisturbed(Problem, "cpu", 4)["weights"])


def test_loading_a_state_that_lacks_some_parameters_starts_those_anew() -> None:
    problem = Problem().train(2)
    state = copy.deepcopy(problem.opt.state_dict())
    del state["state"][3]
    other = continued(problem, state)
    assert other.opt.state.get(other.params[3], {}) == {}
    other.step()
    counts = [[int(other.opt.state[param][name]) for name in STATES[:2]] for param in other.params]
    # The one that starts anew needs a Hessian, and so the step is a Hessian step of all.
    assert counts == [[3, 3]] * 3 + [[1, 1]]
