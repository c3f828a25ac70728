"""What each member saves, prints and copies: states of every origin go on bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.backends import device_of, each_quick_backend
from tests.support.generic import INPUTS, inputs_of, make, regression, states_of
from tests.support.members import MEMBERS, each_member
from tests.support.problems import assert_differ, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
NAMES = ["weight", "bias"]


class Run:
    """A regression and the optimizer of a member, whose parameters have names or not."""

    def __init__(self, member: str, named: bool = False, device: str = "cpu", **more: Any) -> None:
        self.params, self.loss = regression(device=device)
        self.opt = make(member, zip(NAMES, self.params) if named else self.params, **more)

    def train(self, count: int = 3) -> Run:
        for _ in range(count):
            self.opt.step(self.loss)
        return self

    def goes_on_as(self, other: Run, state: dict[str, Any]) -> None:
        """From the other's weights and this state, by the same bits; loading leaves the state as it is."""
        with torch.no_grad():
            for mine, theirs in zip(self.params, other.params, strict=True):
                mine.copy_(theirs)
        before = copy.deepcopy(state)
        self.opt.load_state_dict(state)
        assert_same(state, before)
        start = weights(self.params)
        assert_same(weights(self.train().params), weights(other.train().params))
        assert_differ(self.params, start)
        assert_same(states_of(self.opt, self.params), states_of(other.opt, other.params))


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    groups = [{key: value for key, value in group.items() if key != "param_names"} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


@each_member
@pytest.mark.parametrize("saved", [False, True], ids=["plain", "named"])
@pytest.mark.parametrize("loaded", [False, True], ids=["into plain", "into named"])
def test_a_state_is_the_same_in_every_run_with_names_or_without(member: str, saved: bool, loaded: bool) -> None:
    one, other = Run(member, saved).train(), Run(member, loaded)
    other.goes_on_as(one, copy.deepcopy(one.opt.state_dict()))
    assert_same(without_names(other.opt.state_dict()), without_names(one.opt.state_dict()))
    assert other.opt.state_dict()["param_groups"][0].get("param_names") == (NAMES if saved or loaded else None)


@pytest.mark.parametrize("member, option", INPUTS)
def test_a_state_of_an_older_version_takes_what_it_lacks_from_the_constructor(member: str, option: str) -> None:
    arguments = inputs_of(member)[option]
    one, other = Run(member, **arguments).train(), Run(member, **arguments)
    state = copy.deepcopy(one.opt.state_dict())
    for group in state["param_groups"]:
        for name in group.keys() - {"params", "hessian_evaluations"}:  # the random signs go on from that count
            del group[name]
    other.goes_on_as(one, state)
    assert other.opt.param_groups[0]["steps"] == 6


@each_member
@pytest.mark.parametrize("convert", [int, float, Tensor.float])
def test_counts_may_be_numbers_or_other_tensors(member: str, convert: Callable[[Tensor], Any]) -> None:
    one, other = Run(member).train(), Run(member)
    state = copy.deepcopy(one.opt.state_dict())
    for values in state["state"].values():
        for name in values.keys() & {"step", "hessian_step"}:
            values[name] = convert(values[name])
    other.goes_on_as(one, state)


@pytest.mark.parametrize("member, option", INPUTS)
@pytest.mark.parametrize("lr", [0.03125, torch.tensor(0.03125)], ids=["number", "tensor"])
def test_torch_load_reads_the_same_with_weights_only(member: str, option: str, lr: Any) -> None:
    arguments = {**inputs_of(member)[option], "lr": copy.deepcopy(lr)}
    one = Run(member, named=True, **arguments).train()
    file = io.BytesIO()
    torch.save(one.opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same(loaded, one.opt.state_dict())
    assert all(type(values) is dict for values in loaded["state"].values())


@each_quick_backend
@each_member
def test_a_state_saved_on_the_cpu_moves_to_the_parameters_of_any_backend(backend: str, member: str) -> None:
    one, other = Run(member, backend="eager").train(), Run(member, device=device_of(backend), backend=backend)
    other.opt.load_state_dict(one.opt.state_dict())
    for state, param in zip(states_of(one.opt, one.params), other.params, strict=True):
        for name, value in other.opt.state[param].items():
            assert value.device == param.device
            if value.shape == state[name].shape:
                assert_same(value.cpu(), state[name])
    start = weights(other.params)
    assert_differ(other.train().params, start)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@each_member
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_all_public_attributes(member: str, how: str) -> None:
    one = Run(member).train()
    twin = COPIES[how](one.opt)
    public = {name for name in vars(one.opt) if not name.startswith("_")}
    assert public == {name for name in vars(twin) if not name.startswith("_")}
    assert type(twin) is type(one.opt)
    assert_same(twin.state_dict(), one.opt.state_dict())


@pytest.mark.parametrize("member, option", INPUTS)
def test_it_prints_every_entry_of_every_group(member: str, option: str) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], "lr": 0.125}]
    text = repr(make(member, groups, option))
    assert text.startswith(f"{MEMBERS[member][0].__name__} (\nParameter Group 0\n")
    first, second = text.split("Parameter Group 1\n")
    for name, value in inputs_of(member)[option].items():
        assert f"    {name}: {value}\n" in first
        assert f"    {name}: {0.125 if name == 'lr' else value}\n" in second
