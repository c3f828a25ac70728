"""State: what state_dict holds, where it lies, and that what is saved anywhere goes on bit for bit anywhere else."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_differ,
    assert_same,
    backward,
    continued,
    parameter,
    undisturbed,
    weights,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
STATES = ["step", "hessian_step", "exp_avg", "exp_hessian"]


# ---------------------------------------------------------------------------------------------------------------------
# What a state_dict holds


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_parameter_has_counts_and_two_averages_in_the_state_dtype(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(backend, dtype=dtype, lr=0.001).train(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for param in problem.params:
        state = problem.opt.state[param]
        assert list(state) == STATES
        assert [state[name].dtype for name in STATES] == [torch.int64, torch.int64, wide, wide]
        assert [state[name].shape for name in STATES] == [(), (), param.shape, param.shape]
        assert (int(state["step"]), int(state["hessian_step"])) == (2, 1)
        assert not any(value.requires_grad for value in state.values())


def test_a_fresh_optimizer_has_no_state() -> None:
    problem = Problem()
    assert problem.opt.state_dict()["state"] == {}
    assert [group["params"] for group in problem.opt.state_dict()["param_groups"]] == [[0, 1], [2, 3]]


def test_groups_carry_the_options_and_the_counts_of_the_optimizer() -> None:
    problem = Problem(hessian_interval=2, seed=5).train(3)
    problem.opt.step(lambda: problem.loss() * float("nan"))
    for group, lr in zip(problem.opt.state_dict()["param_groups"], (0.05, 0.03)):
        assert (group["lr"], group["seed"], group["hessian_evaluations"], group["skipped_steps"]) == (lr, 5, 2, 1)


@both_backends
def test_the_parts_of_one_buffer_start_on_256_byte_boundaries(backend: str) -> None:
    shapes = [(), (3,), (5, 7), (64,), (65,), (128,), (129,), (2, 3, 4)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    opt = Sassha(params, backend=backend)
    opt.step(lambda: sum((param**2).sum() for param in params))
    for name in ("exp_avg", "exp_hessian"):
        parts = [opt.state[param][name] for param in params]
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
        starts = [part.storage_offset() * part.element_size() for part in parts]
        assert all(start % 256 == 0 for start in starts)
        assert starts == sorted(set(starts))
        ends = [start + part.numel() * part.element_size() for start, part in zip(starts, parts)]
        assert all(end <= start for end, start in zip(ends, starts[1:]))


def test_state_lies_in_the_strides_of_its_parameter() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    transposed = nn.Parameter(torch.ones(4, 3).t())
    opt = Sassha([*model.parameters(), transposed])
    opt.step(lambda: model(torch.ones(1, 3, 4, 4)).square().sum() + (transposed**2).sum())
    for param, state in opt.state.items():
        assert state["exp_avg"].stride() == state["exp_hessian"].stride() == param.stride()


def test_state_dict_is_deterministic_and_a_view_of_now() -> None:
    problem = Problem().train(2)
    first, second = problem.opt.state_dict(), problem.opt.state_dict()
    assert_same(first, second)
    assert first["state"][0]["exp_avg"].data_ptr() == problem.opt.state[problem.params[0]]["exp_avg"].data_ptr()
    problem.step()
    assert int(first["state"][0]["step"]) == 3


def test_asking_for_the_state_changes_no_step() -> None:
    problem = Problem()
    for _ in range(5):
        problem.opt.state_dict()
        problem.step()
    assert_same(problem.snapshot(), undisturbed(Problem, "cpu", 5))


def test_a_loaded_state_dict_is_the_one_that_was_saved() -> None:
    problem = Problem().train(4)
    saved = copy.deepcopy(problem.opt.state_dict())
    other = continued(problem, saved)
    assert_same(other.opt.state_dict(), saved)
    other.opt.load_state_dict(other.opt.state_dict())
    assert_same(other.opt.state_dict(), saved)


def test_a_loaded_state_is_a_copy() -> None:
    problem = Problem().train(2)
    other = continued(problem, problem.opt.state_dict())
    before = copy.deepcopy(other.opt.state_dict())
    problem.train(2)
    assert_same(other.opt.state_dict(), before)


@both_backends
def test_a_perturbed_optimizer_restores_the_weights_for_its_state_dict(backend: str) -> None:
    problem = Problem(backend).train(1)
    before = problem.snapshot()
    problem.perturb()
    assert_differ(weights(problem.params), before["weights"])
    state = problem.opt.state_dict()
    assert_same(weights(problem.params), before["weights"])
    assert_same(state["state"], before["state"])
    assert not problem.opt.perturbed


@both_backends
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_state_dict_between_the_second_pass_and_the_step_does_not_change_the_step(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    problem.perturb()
    backward(problem.loss(), create_graph=problem.opt.hessian_due)
    state = copy.deepcopy(problem.opt.state_dict())
    if steps:
        assert_same(state, {key: undisturbed(Problem, backend, steps)[key] for key in state})
    problem.opt.step()
    problem.steps += 1
    assert_same(problem.train(3).snapshot(), undisturbed(Problem, backend, steps + 4))


# ---------------------------------------------------------------------------------------------------------------------
# Copies and files


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both_backends
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_copied_optimizer_goes_on_by_itself(backend: str, copied: Callable[[Any], Any], steps: int) -> None:
    problem = Problem(backend).train(steps)
    other = Problem(backend)
    other.model, other.opt = copied((problem.model, problem.opt))
    other.params = list(other.model.parameters())
    other.steps = steps
    assert other.opt.param_groups[0]["params"][0] is other.params[0]
    other.train(3)
    assert_same(weights(problem.params), undisturbed(Problem, backend, steps)["weights"])
    assert_same(weights(other.params), undisturbed(Problem, backend, steps + 3)["weights"])
    assert_same(other.snapshot()["state"], undisturbed(Problem, backend, steps + 3)["state"])
    problem.train(3)
    assert_same(problem.snapshot(), undisturbed(Problem, backend, steps + 3))


def test_a_copy_of_a_perturbed_optimizer_is_restored() -> None:
    problem = Problem().train(1)
    problem.perturb()
    twin = copy.deepcopy(problem.opt)
    assert not twin.perturbed
    copies = [param for group in twin.param_groups for param in group["params"]]
    assert_same(weights(copies), undisturbed(Problem, "cpu", 1)["weights"])


def test_a_copy_keeps_backend_and_source_of_products() -> None:
    for backend in BACKENDS:
        twin = copy.deepcopy(Problem(backend).train(1).opt)
        assert (twin._backend, twin._hvp) == (backend, "autograd")


@both_backends
def test_a_state_dict_loads_with_weights_only(backend: str) -> None:
    problem = Problem(backend, lr=torch.tensor(0.05)).train(4)
    file = io.BytesIO()
    torch.save(problem.opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same(loaded, problem.opt.state_dict())
    other = continued(problem, loaded, backend=backend)
    assert_same(other.train(3).snapshot()["weights"], problem.train(3).snapshot()["weights"])


# ---------------------------------------------------------------------------------------------------------------------
# Loading


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


@pytest.mark.parametrize("convert", [int, float, Tensor.float])
def test_counts_may_come_as_numbers_or_other_tensors(convert: Callable[[Tensor], Any]) -> None:
    problem = Problem().train(4)
    state = copy.deepcopy(problem.opt.state_dict())
    for values in state["state"].values():
        for name in ("step", "hessian_step"):
            values[name] = convert(values[name])
    other = continued(problem, state)
    assert_same(other.train(3).snapshot()["weights"], undisturbed(Problem, "cpu", 7)["weights"])
    assert other.opt.state[other.params[0]]["step"].dtype == torch.int64


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
    assert counts == [[3, 1]] * 3 + [[1, 1]]


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
# Parameters that join


@both_backends
@pytest.mark.parametrize("style", STYLES)
def test_a_silent_group_added_after_steps_leaves_the_others_on_their_course(backend: str, style: str) -> None:
    # Its gradients are zero, so that N is what it was; with S = 1 the signs it has taken part in drop out.
    problem = Problem(backend).train(2, style)
    late = parameter(1.0, 2.0)
    problem.opt.add_param_group({"params": [late]})
    assert_same(problem.snapshot()["state"], undisturbed(Problem, backend, 2)["state"])
    STYLES[style](problem.opt, lambda: problem.loss() + 0 * late.sum())
    problem.steps += 1
    expected = undisturbed(Problem, backend, 3)
    assert_same(weights(problem.params), expected["weights"])
    state = problem.snapshot()["state"]
    assert_same({key: state[key] for key in range(4)}, expected["state"])
    assert int(state[4]["hessian_step"]) == 1


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
