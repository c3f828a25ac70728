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
ASKED: dict[str, Callable[[Sassha], Any]] = {
    "state_dict": Sassha.state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
}


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
        assert (group["lr"], group["seed"]) == (lr, 5)
        assert [group[name] for name in ("steps", "hessian_evaluations", "skipped_steps")] == [3, 2, 1]
    late = parameter(1.0)
    problem.opt.add_param_group({"params": [late]})
    for group in (*Problem().opt.param_groups, problem.opt.param_groups[2]):
        assert {"steps", "hessian_evaluations", "skipped_steps"} <= group.keys()


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
@pytest.mark.parametrize("second_pass", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_state_asked_for_between_the_passes_is_of_w_and_gives_the_step_up(
    backend: str, steps: int, second_pass: bool, asked: str
) -> None:
    problem = Problem(backend).train(steps)
    before = undisturbed(Problem, backend, steps)
    problem.perturb()
    if second_pass:
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
    found = ASKED[asked](problem.opt)
    assert not problem.opt.perturbed
    assert_same(weights(problem.params), before["weights"])
    if steps:
        state = found if asked == "state_dict" else found.state_dict()
        assert_same(state, {key: before[key] for key in state})
    with pytest.raises(ValueError, match="given up"):
        problem.opt.step()
    assert_same(weights(problem.params), before["weights"])
    problem.opt.zero_grad()
    assert_same(problem.train(3, "phase").snapshot(), undisturbed(Problem, backend, steps + 3))


def test_perturb_starts_anew_after_a_step_that_was_given_up() -> None:
    problem = Problem().train(1)
    problem.perturb()
    problem.opt.state_dict()
    assert_same(problem.train(3, "phase").snapshot(), undisturbed(Problem, "cpu", 4))


def test_a_closure_that_saves_in_the_second_pass_is_told_so() -> None:
    problem = Problem().train(1)
    before = problem.snapshot()

    def loss() -> Tensor:
        value = problem.loss()
        if problem.opt.perturbed:
            problem.opt.state_dict()
        return value

    with pytest.raises(ValueError, match="given up"):
        problem.opt.step(loss)
    assert_same(problem.snapshot(), before)
    assert_same(problem.train(3).snapshot(), undisturbed(Problem, "cpu", 4))


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
        assert (twin._run.flat.backend, twin._run.hvp) == (backend, "autograd")


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
