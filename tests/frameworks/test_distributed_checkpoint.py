"""torch.distributed.checkpoint on a fresh optimizer: what goes on is bitwise the run that was saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.support.kinds import all_styles
from tests.support.problems import Problem, assert_same, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)


@all_styles
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_fresh_optimizer_goes_on_bitwise(steps: int, flatten: bool, style: str) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    problem = Problem().train(steps, style)
    saved: dict[str, Any] = copy.deepcopy(get_optimizer_state_dict(problem.model, problem.opt, options=options))
    fresh = Problem()
    fresh.model.load_state_dict(problem.model.state_dict())
    set_optimizer_state_dict(fresh.model, fresh.opt, saved, options=options)
    fresh.steps = steps
    mine, theirs = (one.train(5, style).snapshot() for one in (fresh, problem))
    for name in ("weights", "state"):
        assert_same(mine[name], theirs[name])
    assert fresh.opt.skipped_steps == 0
