"""torch.distributed.checkpoint on a fresh optimizer: what goes on is bitwise the run that was saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sassha_fused.compat import SASSHA
from tests.support.kinds import all_styles
from tests.support.members import OfMember, each_member
from tests.support.problems import Problem, assert_same, single_threaded
from tests.support.published import INTERVAL, Schedule, Training, image_step

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
one_thread = pytest.fixture(autouse=True)(single_threaded)
nested_and_flattened = pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
# Before a lazy step and before a Hessian step, which is every third.
before_either_step = pytest.mark.parametrize("steps", [2, 3])


def through_disk(model: nn.Module, opt: Any, other: nn.Module, fresh: Any, folder: Path, flatten: bool) -> None:
    """Saves the one and loads it into the other, as a job that starts again does."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt, options=options)}
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    loaded = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, fresh, loaded["optimizer"], options=options)


def assert_goes_on(fresh: Problem, problem: Problem, style: str = "closure") -> None:
    for _ in range(5):
        fresh.step(style)
        problem.step(style)
    mine, theirs = fresh.snapshot(), problem.snapshot()
    assert_same(mine["weights"], theirs["weights"])
    assert_same(dict(sorted(mine["state"].items())), dict(sorted(theirs["state"].items())))
    assert mine["param_groups"] == theirs["param_groups"]


@all_styles
@nested_and_flattened
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_fresh_optimizer_goes_on_bitwise(steps: int, flatten: bool, style: str) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    problem = Problem().train(steps, style)
    saved: dict[str, Any] = copy.deepcopy(get_optimizer_state_dict(problem.model, problem.opt, options=options))
    fresh = Problem()
    fresh.model.load_state_dict(problem.model.state_dict())
    set_optimizer_state_dict(fresh.model, fresh.opt, saved, options=options)
    fresh.steps = steps
    assert_goes_on(fresh, problem, style)
    assert fresh.opt.skipped_steps == 0


@each_member
@nested_and_flattened
@before_either_step
@pytest.mark.parametrize("backends", [("cpu", "cpu"), ("cpu", "eager")], ids="-to-".join)
def test_every_member_goes_on_bitwise_from_disk(
    member: str, flatten: bool, steps: int, backends: tuple[str, str], tmp_path: Path
) -> None:
    """On another backend from what it has read, the same bits as a run there that reads them in torch's usual way."""
    problem, fresh = OfMember(member, backends[0]), OfMember(member, backends[1])
    for _ in range(steps):
        problem.step()
    through_disk(problem.model, problem.opt, fresh.model, fresh.opt, tmp_path, flatten)
    fresh.steps = steps
    if backends[0] != backends[1]:
        other = OfMember(member, backends[1])
        other.model.load_state_dict(problem.model.state_dict())
        other.opt.load_state_dict(problem.opt.state_dict())
        other.steps, problem = steps, other
    assert_goes_on(fresh, problem)


@nested_and_flattened
@before_either_step
def test_the_float32_state_of_bfloat16_parameters_comes_along(flatten: bool, steps: int, tmp_path: Path) -> None:
    problem, fresh = (Problem(dtype=torch.bfloat16, lr=0.001) for _ in range(2))
    problem.train(steps)
    through_disk(problem.model, problem.opt, fresh.model, fresh.opt, tmp_path, flatten)
    fresh.steps = steps
    assert fresh.opt.state[fresh.params[0]]["exp_avg"].dtype == torch.float32
    assert_goes_on(fresh, problem)


@nested_and_flattened
@before_either_step
def test_the_optimizers_own_counts_come_along(flatten: bool, steps: int, tmp_path: Path) -> None:
    """Also a skipped step's, and a schedule that parameters do not tell."""
    problem, fresh = Problem(), Problem()
    problem.inputs[1, 0, 0] = torch.inf
    problem.train(steps)
    through_disk(problem.model, problem.opt, fresh.model, fresh.opt, tmp_path, flatten)
    counts = [
        [group[name] for name in ("steps", "hessian_evaluations", "skipped_steps")] for group in fresh.opt.param_groups
    ]
    assert counts == [[steps - 1, 1, 1]] * 2
    assert fresh.opt.skipped_steps == 1


@nested_and_flattened
def test_a_run_that_has_taken_no_step_may_be_saved(flatten: bool, tmp_path: Path) -> None:
    problem, fresh = Problem(), Problem()
    with torch.no_grad():
        problem.params[0].add_(1)
    through_disk(problem.model, problem.opt, fresh.model, fresh.opt, tmp_path, flatten)
    assert_goes_on(fresh, problem)


@nested_and_flattened
def test_the_published_interface_goes_on_bitwise_with_its_schedule(flatten: bool, tmp_path: Path) -> None:
    def made() -> tuple[Training, SASSHA]:
        training = Training()
        opt = SASSHA(training.groups, lr=0.05, rho=0.1, lazy_hessian=INTERVAL)
        opt.hessian_power_scheduler = Schedule(lambda t: 0.5 + t / 40)
        return training, opt

    (training, opt), (other, fresh) = made(), made()
    for t in range(4):
        image_step(training, opt, t)
        fresh.hessian_power_scheduler.step()
    through_disk(training.model, opt, other.model, fresh, tmp_path, flatten)
    assert fresh.hessian_power_scheduler.t == 4
    for t in range(4, 9):
        image_step(training, opt, t)
        image_step(other, fresh, t)
    assert_same(fresh.state_dict(), opt.state_dict())
    assert_same(list(other.model.parameters()), list(training.model.parameters()))
