"""The hooks that torch lets users register, around steps and states of each member."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.support.generic import make, regression, states_of
from tests.support.members import STYLES, OfMember, each_member
from tests.support.problems import assert_same, weights


@each_member
@pytest.mark.parametrize("style", STYLES)
def test_step_hooks_run_once_a_step_and_in_order_around_it(member: str, style: str) -> None:
    problem, other = OfMember(member), SGD([nn.Parameter(torch.ones(1))])
    calls: list[str] = []
    handles = [register_optimizer_step_pre_hook(lambda *_: calls.append("every optimizer's, before"))]
    for opt in (problem.opt, other):
        handles.append(opt.register_step_pre_hook(lambda *_: calls.append("before")))
        handles.append(opt.register_step_post_hook(lambda *_: calls.append("after")))
    handles.append(register_optimizer_step_post_hook(lambda *_: calls.append("every optimizer's, after")))
    expected = ["every optimizer's, before", "before", "after", "every optimizer's, after"]
    try:
        problem.step(style)
        assert calls == expected
        other.step()
        problem.step(style)
        assert calls == 3 * expected
    finally:
        for handle in handles:
            handle.remove()
    problem.step(style)
    assert calls == 3 * expected


@each_member
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "entry", [1, "mine", torch.ones(2), {"mine": torch.ones(2)}], ids=["int", "str", "tensor", "dict"]
)
def test_what_a_hook_puts_into_the_state_under_a_key_of_its_own_is_kept(member: str, steps: int, entry: Any) -> None:
    params, loss = regression()
    undisturbed, same = regression()
    opts = [make(member, params), make(member, undisturbed)]
    for _ in range(steps):
        opts[0].step(loss)
        opts[1].step(same)

    def put(opt: Any) -> None:
        opt.state["note"] = entry

    handle = opts[0].register_state_dict_pre_hook(put)
    state = copy.deepcopy(opts[0].state_dict())
    handle.remove()
    assert_same(state["state"]["note"], entry)
    for _ in range(3):
        opts[0].step(loss)
        opts[1].step(same)
    assert_same(weights(params), weights(undisturbed))
    twin = copy.deepcopy(opts[0])
    assert_same(twin.state["note"], entry)
    fresh, again = regression()
    other = make(member, fresh)
    other.load_state_dict(state)
    assert_same(other.state["note"], entry)
    other.step(again)
    assert [int(other.state[param]["step"]) for param in fresh] == [steps + 1] * 2


@each_member
def test_state_dict_hooks_run_around_it_and_see_each_others_work(member: str) -> None:
    params, loss = regression()
    opt = make(member, params)
    opt.step(loss)
    expected = states_of(opt, params)
    seen = []

    def take_out(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(state["state"].pop("note", None))
        assert all(type(values) is dict for values in state["state"].values())
        return {**state, "taken": seen[-1]}

    opt.register_state_dict_post_hook(take_out)
    assert opt.state_dict()["taken"] is None
    opt.register_state_dict_pre_hook(lambda opt: opt.state.update(note=1))
    state = opt.state_dict()
    assert state["taken"] == 1 and list(state["state"]) == [0, 1]
    assert_same(list(state["state"].values()), expected)


@each_member
def test_load_hooks_run_in_order_and_the_last_word_is_that_of_the_last(member: str) -> None:
    params, loss = regression()
    opt = make(member, params)
    opt.step(loss)
    saved = copy.deepcopy(opt.state_dict())
    rates = []

    def edit(opt: Any, state: dict[str, Any]) -> None:
        assert all(type(values) is dict for values in state["state"].values())
        state["param_groups"][0]["lr"] = 0.002

    def replace(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    opt.register_load_state_dict_post_hook(lambda opt: rates.append(opt.param_groups[0]["lr"]))
    opt.load_state_dict(saved)
    handle = opt.register_load_state_dict_pre_hook(edit)
    opt.load_state_dict(copy.deepcopy(saved))
    first = opt.register_load_state_dict_pre_hook(replace, prepend=True)
    opt.load_state_dict(copy.deepcopy(saved))
    first.remove()
    opt.register_load_state_dict_pre_hook(replace)
    opt.load_state_dict(copy.deepcopy(saved))
    handle.remove()
    opt.load_state_dict(saved)
    assert rates == [saved["param_groups"][0]["lr"], 0.002, 0.002, 0.003, 0.003]
    opt.step(loss)
    assert all(int(opt.state[param]["step"]) == 2 for param in params)
